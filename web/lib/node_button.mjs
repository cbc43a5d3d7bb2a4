/**
 * The name of a node, which shows that node in the graph when it is pressed.
 */

import { el, setAttribute, setShown, setText } from "./dom.mjs";

/** @import { GraphNodes } from "./graph_nodes.mjs" */
/** @import { NodeView } from "./view.mjs" */

/** @param {GraphNodes} nodes */
export function nodeButton(nodes) {
  const element = el("button", { type: "button", class: "ws-node ws-ellipsis" });
  let id = "";
  element.addEventListener("click", () => nodes.show(id));
  return {
    element,
    /** @param {NodeView | null} view  null hides it */
    update(view) {
      setShown(element, view !== null);
      if (view === null) return;
      id = view.id;
      setText(element, view.text);
      setAttribute(element, "aria-label", view.label);
      setAttribute(element, "title", view.label);
    },
  };
}
