/**
 * A line on a node that says how its model runs, with the details folded away behind it. Of a node in a subgraph, the
 * subgraph's node has the line as a badge: that is what one sees of it in most workflows, and the host lays out no
 * elements there but those of the inputs that lead inside.
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
// The pack's teal, with enough contrast for small letters.
const BADGE_TEXT = "#ffffff";
const BADGE_BACK = "#0f766e";
const CLOSED_HEIGHT = 46;
const OPEN_HEIGHT = 150;

/** @param {{app: any, locale: () => string}} options */
export function nodeLines({ app, locale }) {
  /** @type {WeakMap<any, (line: Line) => void>} */
  const shown = new WeakMap();
  /** For each node of a subgraph its badges, by the node that each is of. @type {WeakMap<any, Map<string, () => any>>} */
  const badges = new WeakMap();

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

  /**
   * @param {any} node  of a subgraph
   * @param {Line} line  of a node inside of it
   */
  function setBadge(node, line) {
    const Badge = /** @type {any} */ (globalThis).LGraphBadge;
    if (!Badge) return;
    const badge = new Badge({ text: lineText(line, stringsFor(locale())), fgColor: BADGE_TEXT, bgColor: BADGE_BACK });
    const own = badges.get(node) ?? new Map();
    badges.set(node, own);
    const others = (node.badges ?? []).filter((/** @type {any} */ each) => each !== own.get(line.node));
    own.set(line.node, () => badge);
    node.badges = [...others, own.get(line.node)];
    // Nodes 2.0 draws anew what it is told of.
    const change = { type: "node:property:changed", nodeId: node.id, property: "badges", oldValue: others, newValue: node.badges };
    node.graph?.trigger?.(change.type, change);
    app.canvas?.setDirty?.(true, true);
  }

  return {
    /** @param {{detail: Line}} event */
    hear({ detail: line }) {
      const path = findPath(app, line.node);
      const node = path.pop();
      if (!node) return;
      for (const outer of path) setBadge(outer, line);
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
 * The node with an id of a prompt, `4`, or `7:4` for a node of a subgraph; the subgraphs' nodes that it is in before it.
 * @param {any} app
 * @param {string} id
 * @returns {any[]}  empty where the graph has no such node
 */
function findPath(app, id) {
  let graph = app.rootGraph ?? app.graph;
  const path = [];
  for (const part of String(id).split(":")) {
    const node = graph?.getNodeById(part) ?? graph?.getNodeById(Number(part)) ?? null;
    if (!node) return [];
    path.push(node);
    graph = node.subgraph;
  }
  return path;
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
