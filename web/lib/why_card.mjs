/**
 * "Why is it slow?" in a model's card, or that it is not: the first cause and what to do, the others behind it.
 */

import { el, setAttribute, setOptional, setShown, setText, syncList } from "./dom.mjs";

/** @import { Part } from "./dom.mjs" */
/** @import { Strings } from "./strings.mjs" */
/** @import { CauseView } from "./why.mjs" */

/** @param {Strings} strings */
export function whyCard(strings) {
  const list = el("ol", { class: "ws-list ws-causes" });
  const title = el("p", { class: "ws-heading", "aria-hidden": "true" });
  const element = el("section", { class: "ws-why" }, title, list);
  const rows = new Map();
  return {
    element,
    /** @param {readonly CauseView[]} causes */
    update(causes) {
      setShown(element, causes.length > 0);
      const heading = causes[0]?.kind === "compute" ? strings.asFast : strings.why;
      setText(title, heading);
      setAttribute(element, "aria-label", heading);
      syncList(list, rows, causes, causeRow);
    },
  };
}

/** @returns {Part<CauseView>} */
function causeRow() {
  const device = el("span", { class: "ws-device-name" });
  const text = el("span");
  const costs = el("span", { class: "ws-badge ws-tone-warning" });
  const todo = el("p", { class: "ws-todo" });
  const element = el("li", { class: "ws-cause" }, el("p", {}, device, " ", text, " ", costs), todo);
  return {
    element,
    update(view) {
      element.dataset.kind = view.kind;
      setOptional(device, view.device);
      setText(text, view.text);
      setOptional(costs, view.costs);
      setText(todo, view.todo);
    },
  };
}
