/**
 * Nodes 2.0 keeps the elements that it has mounted when undo puts another node with the same id in the place of one, so that
 * those of a node that is gone would go on being shown (ComfyUI_frontend 1.58).
 */

/**
 * Have an element of a node that was just configured shown where that of the node before it is.
 * @param {any} app  the host's
 * @param {any} node
 * @param {HTMLElement} element
 * @param {string} selector  what both match
 */
export function takePlace(app, node, element, selector) {
  const replace = () => {
    // One in a subgraph may have the id of another node, which is shown.
    if (node.graph !== app.canvas?.graph || element.isConnected) return;
    const shown = document.querySelector(`[data-node-id="${node.id}"] ${selector}`);
    shown?.replaceWith(element);
  };
  // Once the page has drawn what it makes of the nodes.
  requestAnimationFrame(() => requestAnimationFrame(replace));
}
