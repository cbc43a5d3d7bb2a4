/**
 * A part of a card that is folded away until somebody asks for it.
 */

import { el } from "./dom.mjs";

/**
 * @param {string} title
 * @param {...(Node | string)} children
 */
export function fold(title, ...children) {
  const element = /** @type {HTMLDetailsElement} */ (
    el("details", { class: "ws-details" }, el("summary", { class: "ws-summary-line" }, title), el("div", { class: "ws-details-body" }, ...children))
  );
  return element;
}
