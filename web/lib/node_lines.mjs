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
// Of the title of a node, on a badge beside others.
const MOST_LETTERS = 24;
/** Where the page does not tell which workflow is open. */
const NOWHERE = {};

/**
 * @typedef {{node: any, path: any[], show: (line: Line) => void, remove: () => void}} Shown  path: the nodes of subgraphs around it
 * @typedef {{told: Map<string, {inner: any, line: Line}>, drawn: (() => any)[]}} Badges  told: by the id of the node inside
 */

/** @param {{app: any, locale: () => string, workflows: Workflows}} options */
export function nodeLines({ app, locale, workflows }) {
  /** The last line of each node, by the workflow that it ran in. @type {WeakMap<object, Map<string, Line>>} */
  const known = new WeakMap();
  /** What the graph has now, by the node that it is of. @type {Map<string, Shown>} */
  const shown = new Map();
  /** For each node of a subgraph those that it has from here. @type {WeakMap<any, Badges>} */
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
   * @param {any} outer  the node of a subgraph
   * @param {string} id  of a node inside of it
   * @param {{inner: any, line: Line} | null} told  that node and its line; null takes its badge away
   */
  function tellAround(outer, id, told) {
    const Badge = /** @type {any} */ (globalThis).LGraphBadge;
    if (!Badge) return;
    const own = badges.get(outer) ?? { told: new Map(), drawn: [] };
    badges.set(outer, own);
    if (told) own.told.set(id, told);
    else if (!own.told.delete(id)) return;
    const before = outer.badges ?? [];
    const others = before.filter((/** @type {any} */ each) => !own.drawn.includes(each));
    own.drawn = badgeTexts(own.told, stringsFor(locale())).map((text) => {
      const badge = new Badge({ text, fgColor: BADGE_TEXT, bgColor: BADGE_BACK });
      return () => badge;
    });
    outer.badges = [...others, ...own.drawn];
    // Nodes 2.0 draws anew what it is told of.
    const change = { type: "node:property:changed", nodeId: outer.id, property: "badges", oldValue: before, newValue: outer.badges };
    outer.graph?.trigger?.(change.type, change);
    app.canvas?.setDirty?.(true, true);
  }

  /** @param {Line} line  of a node of the graph that is shown, if it has that */
  function showLine(line) {
    const path = findOurs(app, line.node);
    const before = shown.get(line.node);
    if (before && !isAt(before, path)) drop(line.node, before);
    const node = path.pop();
    if (!node) return;
    withoutHostText(node);
    const there = shown.get(line.node) ?? { node, path, ...attach(node) };
    if (!shown.has(line.node)) whenRemoved(node, () => forgetAround(line.node, there));
    shown.set(line.node, there);
    for (const outer of path) tellAround(outer, line.node, { inner: node, line });
    there.show(line);
  }

  /**
   * @param {string} id
   * @param {Shown} there
   */
  function forgetAround(id, { path }) {
    for (const outer of path) tellAround(outer, id, null);
  }

  /**
   * @param {string} id
   * @param {Shown} there
   */
  function drop(id, there) {
    shown.delete(id);
    forgetAround(id, there);
    // A node that is in no graph any more has nothing to give back.
    if (there.node.graph) there.remove();
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
      const there = shown.get(id);
      if (!there || !isAt(there, findOurs(app, id))) showLine(line);
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
 * Whether a line is on the node that has its id now, and on those around that: undo makes them anew.
 * @param {Shown} there
 * @param {any[]} path  with the node at its end
 */
function isAt({ node, path: around }, path) {
  const before = [...around, node];
  return before.length === path.length && before.every((each, place) => each === path[place]);
}

/**
 * Call `then` when a node is taken out of its graph.
 * @param {any} node
 * @param {() => void} then
 */
function whenRemoved(node, then) {
  const { onRemoved } = node;
  node.onRemoved = function (/** @type {any[]} */ ...given) {
    then();
    return onRemoved?.apply(this, given);
  };
}

/**
 * What stands on the node of a subgraph: a line for each node inside, with what that is called where there are several.
 * @param {Badges["told"]} told
 * @param {Strings} strings
 */
function badgeTexts(told, strings) {
  const titles = [...told.values()].map(({ inner }) => short(String(inner.title ?? "")));
  return [...told].map(([id, { line }], place) => {
    const text = lineText(line, strings);
    if (told.size === 1) return text;
    const title = titles[place];
    const isOne = title !== "" && titles.indexOf(title) === titles.lastIndexOf(title);
    // Within the subgraph, as it is numbered there.
    const number = id.split(":").slice(1).join(":");
    return strings.because(isOne ? title : `${title} ${number}`.trim(), text);
  });
}

/** @param {string} title */
function short(title) {
  const letters = [...title];
  return letters.length > MOST_LETTERS ? `${letters.slice(0, MOST_LETTERS - 1).join("").trimEnd()}…` : title;
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
