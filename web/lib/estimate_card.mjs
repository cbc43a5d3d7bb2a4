/**
 * "Before a run": what each model of the open workflow that is not loaded will do.
 */

import { el, setAttribute, setOptional, setShown, setText, syncList } from "./dom.mjs";
import { stackedBar } from "./meter.mjs";
import { nodeButton } from "./node_button.mjs";

/** @import { Part } from "./dom.mjs" */
/** @import { EstimateView, Fact } from "./estimate_view.mjs" */
/** @import { GraphNodes } from "./graph_nodes.mjs" */
/** @import { Strings } from "./strings.mjs" */

/**
 * @param {Strings} strings
 * @param {GraphNodes} nodes
 */
export function estimateCards(strings, nodes) {
  const list = el("ul", { class: "ws-list" });
  const title = el("p", { class: "ws-heading", "aria-hidden": "true" }, strings.estimateTitle);
  const element = el("section", { class: "ws-estimates", "aria-label": strings.estimateTitle }, title, list);
  const rows = new Map();
  return {
    element,
    /** @param {readonly EstimateView[]} views */
    update(views) {
      setShown(element, views.length > 0);
      syncList(list, rows, views, () => card(nodes));
    },
  };
}

/**
 * @param {GraphNodes} nodes
 * @returns {Part<EstimateView>}
 */
function card(nodes) {
  const name = el("span", { class: "ws-model-name ws-ellipsis" });
  const node = nodeButton(nodes);
  const headline = el("p", { class: "ws-headline ws-number" });
  const note = el("p", { class: "ws-note" });
  const bar = stackedBar();
  const facts = el("dl", { class: "ws-facts" });
  const todo = el("p");
  const head = el("div", { class: "ws-model-head" }, name, node.element);
  const rows = new Map();
  return {
    element: el("li", { class: "ws-model" }, head, headline, todo, note, bar.element, facts),
    update(view) {
      setText(name, view.name);
      setAttribute(name, "title", view.name);
      node.update(view.node);
      setText(headline, view.headline);
      headline.className = view.tone === "error" && view.todo === "" ? "ws-note ws-tone-error" : "ws-headline";
      setOptional(note, view.note);
      setShown(bar.element, view.bar !== null);
      if (view.bar) bar.update(view.bar.meter, view.bar.segments, null);
      setShown(facts, view.facts.length > 0);
      syncList(facts, rows, view.facts, fact);
      setOptional(todo, view.todo);
      todo.className = `ws-note ws-tone-${view.tone}`;
    },
  };
}

/** @returns {Part<Fact>} */
function fact() {
  const label = el("dt");
  const text = el("dd");
  return {
    element: el("div", { class: "ws-fact" }, label, text),
    update(view) {
      setText(label, view.label);
      setText(text, view.text);
    },
  };
}
