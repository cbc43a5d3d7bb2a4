/**
 * The host's own text on a node: what the server says there in English, to pages without this.
 */

export const HOST_TEXT = "$$node-text-preview";

/**
 * Take it away where the same is said otherwise.
 * @param {any} node
 * @param {(text: unknown) => boolean} [is]  what it says then
 */
export function withoutHostText(node, is = () => true) {
  const widget = (node.widgets ?? []).find((/** @type {any} */ each) => each.name === HOST_TEXT);
  if (widget && is(widget.value)) node.removeWidget(widget);
}
