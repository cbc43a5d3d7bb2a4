import assert from "node:assert/strict";
import { test } from "node:test";

import { HOST_TEXT } from "../../web/lib/host_text.mjs";
import { nodeLines } from "../../web/lib/node_lines.mjs";
import { fakePage } from "./fake_dom.mjs";

fakePage();

const LOADER = "WeightStreamModelLoader";
const GIB = 2 ** 30;

/**
 * @param {string} node
 * @param {number} [seconds]
 * @returns {any}
 */
function line(node, seconds = 1) {
  const rest = { waiting: null, more_bytes: 0, more_seconds: 0, more_device: "", kept_bytes: GIB, total_bytes: 2 * GIB, staged_bytes: 0 };
  return { node, devices: ["gpu:0"], seconds, ...rest, synchronous: false, text: `${seconds} s/step`, details: ["gpu:0: a step in 1 s"] };
}

/** A node as the host has it; what is in `inside` makes it a subgraph's. */
class Node {
  /** @type {any[]} */
  widgets = [];
  /** @type {any[]} */
  badges = [];
  size = [200, 100];

  /**
   * @param {number} id
   * @param {string} title
   * @param {Graph | null} [inside]
   * @param {string} [type]
   */
  constructor(id, title, inside = null, type = LOADER) {
    Object.assign(this, { id, title, type: inside ? "some-uuid" : type });
    if (inside) this.subgraph = inside;
  }

  setSize = () => {};
  removeWidget = (/** @type {any} */ widget) => void (this.widgets = this.widgets.filter((each) => each !== widget));

  addDOMWidget(/** @type {string} */ name, /** @type {string} */ _type, /** @type {any} */ holder) {
    const widget = { name, holder };
    this.widgets.push(widget);
    return widget;
  }

  /** The lines on it. @returns {string[]} */
  get lines() {
    return this.widgets.filter(({ name }) => name === "weightstream_line").map(({ holder }) => holder.children[0].children[0].textContent);
  }

  /** The texts of the badges on it. @returns {string[]} */
  get texts() {
    return this.badges.map((badge) => badge().text);
  }
}

class Graph {
  /** @param {Node[]} nodes */
  constructor(...nodes) {
    this.nodes = nodes;
    for (const node of nodes) /** @type {any} */ (node).graph = this;
  }

  getNodeById = (/** @type {any} */ id) => this.nodes.find((/** @type {any} */ node) => node.id === id);

  remove(/** @type {any} */ node) {
    this.nodes = this.nodes.filter((each) => each !== node);
    node.onRemoved?.();
    node.graph = null;
  }
}

/** A page with a workflow, in which lines are heard. */
function page(/** @type {Graph} */ graph) {
  let open = {};
  const app = /** @type {any} */ ({ rootGraph: graph, canvas: { graph } });
  const workflows = { open: () => open, running: () => open, queued: () => open };
  const lines = nodeLines({ app, locale: () => "en", workflows });
  return {
    hear: (/** @type {any[]} */ ...heard) => heard.forEach((detail) => lines.hear({ detail })),
    /** Another workflow. */
    async change() {
      open = {};
      await lines.graphChanged();
    },
    /** The same workflow anew, as undo and redo show it. */
    async show(/** @type {Graph} */ anew) {
      app.rootGraph = app.canvas.graph = anew;
      await lines.graphChanged();
    },
  };
}

const SAID = "1 s/step · hardly any waiting for the bus";

test("the line is on its node, and on the node of the subgraph around it without a title", () => {
  const inner = new Node(20, "FLUX");
  const outer = new Node(40, "Loading", new Graph(inner));
  const { hear } = page(new Graph(outer));
  hear(line("40:20", 2), line("40:20", 1));
  assert.deepEqual([inner.lines, outer.texts], [[SAID], [SAID]]);
});

test("badges of several models are told apart by titles, and by numbers where these are the same", () => {
  const long = "The first of the two stages of a long workflow";
  const nodes = [new Node(20, "FLUX"), new Node(21, long), new Node(22, "Twin"), new Node(23, "Twin"), new Node(24, "")];
  const outer = new Node(40, "Loading", new Graph(...nodes));
  const other = () => ({ text: "of somebody else's" });
  outer.badges = [other];
  const { hear } = page(new Graph(outer));
  hear(line("40:20"));
  assert.deepEqual(outer.texts, ["of somebody else's", SAID]);
  hear(line("40:21"), line("40:22"), line("40:23"), line("40:24"), line("40:20", 3));
  assert.deepEqual(outer.texts, [
    "of somebody else's", `FLUX: ${SAID.replace("1", "3")}`, `The first of the two st…: ${SAID}`, `Twin 22: ${SAID}`, `Twin 23: ${SAID}`, `24: ${SAID}`,
  ]);
  assert.equal(outer.badges[0], other);
});

test("a node that is deleted in a subgraph takes its badge with it", () => {
  const [one, other] = [new Node(20, "One"), new Node(21, "Other")];
  const inside = new Graph(one, other);
  const outer = new Node(40, "Loading", inside);
  let removed = 0;
  /** @type {any} */ (other).onRemoved = () => void (removed += 1);
  const { hear } = page(new Graph(outer));
  hear(line("40:20"), line("40:21"), line("40:21", 2));
  inside.remove(other);
  assert.deepEqual([outer.texts, removed], [[SAID], 1]);
  hear(line("40:21", 2));
  assert.deepEqual(outer.texts, [SAID], "of a node that is not there any more");
});

test("a line is told on each of the nodes around it", () => {
  const inner = new Node(3, "FLUX");
  const middle = new Node(7, "Middle", new Graph(inner));
  const outer = new Node(40, "Outer", new Graph(middle, new Node(8, "SDXL")));
  const { hear } = page(new Graph(outer));
  hear(line("40:7:3"), line("40:8"));
  assert.deepEqual([middle.texts, outer.texts], [[SAID], [`FLUX: ${SAID}`, `SDXL: ${SAID}`]]);
  assert.deepEqual(inner.lines, [SAID]);
});

test("another workflow has no lines of the one before", async () => {
  const inner = new Node(20, "FLUX");
  const outer = new Node(40, "Loading", new Graph(inner));
  const { hear, change } = page(new Graph(outer));
  hear(line("40:20"));
  await change();
  assert.deepEqual([inner.lines, outer.texts], [[], []]);
});

test("a subgraph that is used twice has on each of its nodes what was said there", () => {
  const inside = new Graph(new Node(20, "FLUX"));
  const [one, other] = [new Node(40, "One", inside), new Node(41, "Other", inside)];
  const { hear } = page(new Graph(one, other));
  hear(line("40:20", 1), line("41:20", 2));
  assert.deepEqual([one.texts, other.texts], [[SAID], [SAID.replace("1", "2")]]);
});

test("a node of ComfyUI's own with the id of ours has no line, and not the text either", () => {
  const foreign = new Node(5, "Empty Latent Image", null, "EmptyLatentImage");
  foreign.widgets = [{ name: HOST_TEXT, value: "1 s/step" }];
  const inside = new Graph(foreign);
  const outer = new Node(40, "Outer", inside);
  const { hear } = page(new Graph(outer));
  hear(line("40:5"));
  assert.deepEqual([foreign.lines, outer.texts], [[], []]);
  const top = new Node(5, "Empty Latent Image", null, "EmptyLatentImage");
  top.widgets = [{ name: HOST_TEXT, value: "1 s/step" }, { name: "width" }];
  page(new Graph(top)).hear(line("5"));
  assert.deepEqual(top.widgets, [{ name: "width" }]);
  top.widgets = [{ name: HOST_TEXT, value: "its own" }];
  page(new Graph(top)).hear(line("5"));
  assert.equal(top.widgets.length, 1);
});

test("undo and redo make nodes anew, and the lines are on these", async () => {
  const make = () => {
    const [alone, inner] = [new Node(4, "Alone"), new Node(20, "FLUX")];
    const outer = new Node(40, "Loading", new Graph(inner));
    return { alone, inner, outer, graph: new Graph(alone, outer) };
  };
  const [first, undone, redone] = [make(), make(), make()];
  const { hear, show } = page(first.graph);
  hear(line("4"), line("40:20"));
  for (const { alone, inner, outer, graph } of [undone, redone]) {
    await show(graph);
    assert.deepEqual([alone.lines, inner.lines, outer.texts], [[SAID], [SAID], [SAID]]);
  }
  const later = new Node(40, "Loading", new Graph());
  /** @type {any} */ (later).subgraph = redone.outer.subgraph;
  await show(new Graph(redone.alone, later));
  assert.deepEqual([redone.inner.lines, later.texts], [[SAID], [SAID]], "only the node around it is another");
  await show(new Graph());
  await show(first.graph);
  assert.deepEqual([first.alone.lines, first.outer.texts], [[SAID], [SAID]], "a node that undo has brought back");
});
