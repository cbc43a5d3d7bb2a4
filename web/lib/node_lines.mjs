/**
 * A line on a node that says how its model runs, with the details folded away behind it. Of a node in a subgraph, the
 * subgraph's node has the line as a badge: that is what one sees of it in most workflows, and the host lays out no
 * elements there but those of the inputs that lead inside.
 */

import { el, setText } from "./dom.mjs";
import { findOurs, isOurs } from "./graph_nodes.mjs";
import { withoutHostText } from "./host_text.mjs";
import { lineText } from "./line.mjs";
import { stringsFor } from "./strings.mjs";
import { takePlace } from "./take_place.mjs";

/** @import { Line } from "./line.mjs" */
/** @import { Strings } from "./strings.mjs" */
/** @import { Workflows } from "./workflows.mjs" */

export const LINE_EVENT = "weightstream.line";
const NAME = "weightstream_line";
const STYLES = new URL("../weightstream.css", import.meta.url).href;
// The pack's teal, with enough contrast for small letters.
const BADGE_TEXT = "#ffffff";
const BADGE_BACK = "#0f766e";
const CLOSED_HEIGHT = 46;
const OPEN_HEIGHT = 150;
const FRAMES = 20;
/** Where the page does not tell which workflow is open. */
const NOWHERE = {};

/** @typedef {{node: any, path: any[], show: (line: Line) => void, remove: () => void}} Shown  path: the nodes of subgraphs around it */

/** @param {{app: any, locale: () => string, workflows: Workflows}} options */
export function nodeLines({ app, locale, workflows }) {
  /** The last line of each node, by the workflow that it ran in. @type {WeakMap<object, Map<string, Line>>} */
  const known = new WeakMap();
  /** What the graph has now, by the node that it is of. @type {Map<string, Shown>} */
  const shown = new Map();
  /** For each node of a subgraph its badges, by the node that each is of. @type {WeakMap<any, Map<string, () => any>>} */
  const badges = new WeakMap();
  let round = 0;

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
    takePlace(app, node, holder, ".ws-line-holder");
    const resize = (/** @type {number} */ more) => {
      const least = node.computeSize?.()[1] ?? 0;
      node.setSize([node.size[0], Math.max(least, node.size[1] + more)]);
      app.canvas?.setDirty?.(true, true);
    };
    fold.addEventListener("toggle", () => resize(fold.open ? OPEN_HEIGHT - CLOSED_HEIGHT : CLOSED_HEIGHT - OPEN_HEIGHT));
    holder.addEventListener("keydown", keep);
    holder.addEventListener("wheel", (event) => fold.open && event.stopPropagation());
    resize(0);
    const show = (/** @type {Line} */ line) => {
      const strings = stringsFor(locale());
      const text = lineText(line, strings);
      const details = line.details.map((detail) => inWords(detail, strings));
      setText(summary, text);
      summary.setAttribute("title", [text, ...details].join("\n"));
      body.replaceChildren(...details.map((detail) => el("p", {}, detail)));
    };
    return { show, remove: () => node.removeWidget(widget) };
  }

  /**
   * @param {any} node  of a subgraph
   * @param {Line} line  of a node inside of it
   */
  function setBadge(node, line) {
    const Badge = /** @type {any} */ (globalThis).LGraphBadge;
    if (!Badge) return;
    const badge = new Badge({ text: lineText(line, stringsFor(locale())), fgColor: BADGE_TEXT, bgColor: BADGE_BACK });
    changeBadge(node, line.node, () => badge);
  }

  /**
   * @param {any} node  of a subgraph
   * @param {string} id  of the node inside of it
   * @param {(() => any) | null} badge
   */
  function changeBadge(node, id, badge) {
    const own = badges.get(node) ?? new Map();
    badges.set(node, own);
    const before = node.badges ?? [];
    const others = before.filter((/** @type {any} */ each) => each !== own.get(id));
    if (badge) own.set(id, badge);
    else own.delete(id);
    node.badges = badge ? [...others, badge] : others;
    // Nodes 2.0 draws anew what it is told of.
    const change = { type: "node:property:changed", nodeId: node.id, property: "badges", oldValue: before, newValue: node.badges };
    node.graph?.trigger?.(change.type, change);
    app.canvas?.setDirty?.(true, true);
  }

  /** @param {Line} line  of a node of the graph that is shown, if it has that */
  function showLine(line) {
    const path = findOurs(app, line.node);
    const node = path.pop();
    const before = shown.get(line.node);
    if (before && before.node !== node) drop(line.node, before);
    if (!node) return;
    for (const outer of path) setBadge(outer, line);
    withoutHostText(node);
    const there = shown.get(line.node) ?? { node, path, ...attach(node) };
    shown.set(line.node, there);
    there.show(line);
  }

  /**
   * @param {string} id
   * @param {Shown} there
   */
  function drop(id, there) {
    shown.delete(id);
    // A node that is in no graph any more has nothing to give back.
    if (!there.node.graph) return;
    there.remove();
    for (const outer of there.path) changeBadge(outer, id, null);
  }

  /**
   * The host shows a text on whichever node of the open workflow has its node's id.
   * @param {Line} line
   */
  function withoutStrayText({ node: id, text }) {
    const local = id.split(":").at(-1);
    const node = app.canvas?.graph?.getNodeById?.(local) ?? app.canvas?.graph?.getNodeById?.(Number(local));
    if (node && !isOurs(node)) withoutHostText(node, (said) => said === text);
  }

  /** Have the graph show the lines of the open workflow, and no others. */
  function refresh() {
    const wanted = known.get(workflows.open() ?? NOWHERE) ?? new Map();
    for (const [id, there] of shown) if (!wanted.has(id)) drop(id, there);
    for (const [id, line] of wanted) {
      if (findOurs(app, id).at(-1) !== shown.get(id)?.node) showLine(line);
    }
  }

  return {
    /** @param {{detail: Line}} event */
    hear({ detail: line }) {
      const open = workflows.open() ?? NOWHERE;
      const workflow = workflows.running() ?? open;
      const lines = known.get(workflow) ?? new Map();
      known.set(workflow, lines);
      lines.set(line.node, line);
      withoutStrayText(line);
      if (workflow === open) showLine(line);
    },
    /** Another graph is shown, or the same anew. The page tells which workflow it is of some frames later. */
    async graphChanged() {
      const mine = (round += 1);
      for (let frame = 0; frame < FRAMES && mine === round; frame++) {
        await new Promise((resolve) => requestAnimationFrame(resolve));
        if (mine === round) refresh();
      }
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
 * Keys that fold must not reach the canvas, which has its own use for them.
 * @param {KeyboardEvent} event
 */
function keep(event) {
  if (event.key === " " || event.key === "Enter") event.stopPropagation();
}
