/**
 * A line on a node that says how its model runs, with the details folded away behind it.
 */

import { el, setText } from "./dom.mjs";
import { lineText } from "./line.mjs";
import { stringsFor } from "./strings.mjs";

/** @import { Line } from "./line.mjs" */
/** @import { Strings } from "./strings.mjs" */

export const LINE_EVENT = "weightstream.line";
const NAME = "weightstream_line";
// The host's own text on a node, which has said the same, in English, to pages without this.
const HOST_TEXT = "$$node-text-preview";
const STYLES = new URL("../weightstream.css", import.meta.url).href;
const CLOSED_HEIGHT = 46;
const OPEN_HEIGHT = 150;

/** @param {{app: any, locale: () => string}} options */
export function nodeLines({ app, locale }) {
  /** @type {WeakMap<any, (line: Line) => void>} */
  const shown = new WeakMap();

  /** @param {any} node */
  function attach(node) {
    const summary = el("summary", { class: "ws-line-text" });
    const body = el("div", { class: "ws-line-body" });
    const fold = /** @type {HTMLDetailsElement} */ (el("details", { class: "ws-line" }, summary, body));
    const holder = el("div", { class: "ws-holder ws-line-holder" }, fold, el("link", { rel: "stylesheet", href: STYLES }));
    const widget = node.addDOMWidget(NAME, NAME, holder, {
      serialize: false,
      hideOnZoom: false,
      getMinHeight: () => (fold.open ? OPEN_HEIGHT : CLOSED_HEIGHT),
    });
    widget.serialize = false;
    const resize = (/** @type {number} */ more) => {
      const least = node.computeSize?.()[1] ?? 0;
      node.setSize([node.size[0], Math.max(least, node.size[1] + more)]);
      app.canvas?.setDirty?.(true, true);
    };
    fold.addEventListener("toggle", () => resize(fold.open ? OPEN_HEIGHT - CLOSED_HEIGHT : CLOSED_HEIGHT - OPEN_HEIGHT));
    holder.addEventListener("keydown", keep);
    holder.addEventListener("wheel", (event) => fold.open && event.stopPropagation());
    resize(0);
    return (/** @type {Line} */ line) => {
      const strings = stringsFor(locale());
      const text = lineText(line, strings);
      const details = line.details.map((detail) => inWords(detail, strings));
      setText(summary, text);
      summary.setAttribute("title", [text, ...details].join("\n"));
      body.replaceChildren(...details.map((detail) => el("p", {}, detail)));
    };
  }

  return {
    /** @param {{detail: Line}} event */
    hear({ detail: line }) {
      const node = findNode(app, line.node);
      if (!node) return;
      withoutHostText(node);
      const show = shown.get(node) ?? attach(node);
      shown.set(node, show);
      show(line);
    },
  };
}

/**
 * A device and its plan.
 * @param {string} detail
 * @param {Strings} strings
 */
function inWords(detail, strings) {
  const [device, ...plan] = detail.split(": ");
  return strings.because(device, strings.fromServer(plan.join(": ")));
}

/**
 * The node with an id of a prompt: `4`, or `7:4` for a node of a subgraph.
 * @param {any} app
 * @param {string} id
 */
function findNode(app, id) {
  let graph = app.rootGraph ?? app.graph;
  let node = null;
  for (const part of String(id).split(":")) {
    node = graph?.getNodeById(part) ?? graph?.getNodeById(Number(part)) ?? null;
    graph = node?.subgraph;
  }
  return node;
}

/** @param {any} node */
function withoutHostText(node) {
  const widget = (node.widgets ?? []).find((/** @type {any} */ each) => each.name === HOST_TEXT);
  if (widget) node.removeWidget(widget);
}

/**
 * Keys that fold must not reach the canvas, which has its own use for them.
 * @param {KeyboardEvent} event
 */
function keep(event) {
  if (event.key === " " || event.key === "Enter") event.stopPropagation();
}
