import assert from "node:assert/strict";
import { test } from "node:test";

import { graphModels } from "../../web/lib/graph_models.mjs";

const SETTINGS = "WeightStreamOffloadSettings";
const PLACEMENT = "WeightStreamGPUPlacement";
const OURS = "WeightStreamModelLoader";
const THEIRS = "UNETLoader";
const [MUTED, BYPASSED] = [2, 4];
const [IN, OUT] = [-10, -20];

/**
 * @param {number} id
 * @param {string} type
 * @param {Record<string, any>} [values]
 * @param {any} [more]
 */
function node(id, type, values = {}, more = {}) {
  const widgets = Object.entries(values).map(([name, value]) => ({ name, value }));
  return { id, type, mode: 0, widgets, inputs: widgets.map(({ name }) => ({ name, widget: { name }, link: null })), ...more };
}

test("the models of a workflow are those that its loaders name, each once", () => {
  const ours = node(1, "WeightStreamModelLoader", { unet_name: "a", weight_dtype: "default", vram_limit_gb: 6.5 });
  const nodes = [
    ours, { ...ours, id: 2 }, node(3, "UNETLoader", { unet_name: "b", weight_dtype: "fp8_e5m2" }), node(4, "VAELoader", { vae_name: "c" }),
    node(5, "UNETLoader", { unet_name: "muted" }, { mode: 2 }), node(6, "UNETLoader", { unet_name: "bypassed" }, { mode: 4 }),
    node(7, "UNETLoader", { unet_name: "linked" }, { inputs: [{ name: "unet_name", widget: { name: "unet_name" }, link: 9 }] }),
    node(8, "UNETLoader", { unet_name: null }),
  ];
  const nothing = { reserve: 0, pinnedLimit: 0, mode: "auto", pinMemory: "auto", packing: "auto", limitBySettings: false, placed: false };
  assert.deepEqual(graphModels({ graph: { nodes } }), [
    { node: "1", title: "", name: "a", folder: "", weightDtype: "default", ...nothing, limit: 6.5, streams: true },
    { node: "3", title: "", name: "b", folder: "diffusion_models", weightDtype: "fp8_e5m2", ...nothing, limit: 0, streams: false },
  ]);
  assert.deepEqual(graphModels({}), []);
});

test("a loader in a subgraph is found, with what the subgraph's own input says", () => {
  // Pages before 1.47 have ids as numbers, later ones as text.
  for (const outside of [-10, "-10"]) {
    const promoted = [{ name: "unet_name", widget: { name: "unet_name" }, link: 3 }];
    const inner = node(7, "UNETLoader", { unet_name: "the inner one" }, { inputs: promoted });
    const getLink = (/** @type {number} */ id) => (id === 3 ? { origin_id: outside, origin_slot: 0 } : undefined);
    const outer = node(12, "some-uuid", { unet_name: "the outer one" }, { subgraph: { nodes: [inner], getLink } });
    const [found] = graphModels({ rootGraph: { nodes: [outer] } });
    assert.deepEqual([found.node, found.name], ["12:7", "the outer one"]);
    outer.inputs[0].link = 5;
    assert.deepEqual(graphModels({ rootGraph: { nodes: [outer] } }), [], "another node gives the name");
  }
});

/**
 * A graph whose nodes have one MODEL in and one out.
 * @param {any[]} nodes
 * @param {[from: number, to: number, slot?: number][]} links  by ids of nodes, and the slot of a frame
 */
function graph(nodes, links) {
  const table = links.map(([from, to, slot = 0], id) => ({ id, origin_id: from, origin_slot: from === IN ? slot : 0, target_id: to, target_slot: to === OUT ? slot : 0 }));
  for (const one of nodes) one.outputs = [{ type: "MODEL", links: table.filter(({ origin_id: from }) => from === one.id).map(({ id }) => id) }];
  const inputs = [0, 1].map((slot) => ({ linkIds: table.filter(({ origin_id: from, origin_slot: at }) => from === IN && at === slot).map(({ id }) => id) }));
  // Pages before 1.47 have ids as numbers, later ones as text.
  const getLink = (/** @type {number} */ id) => table[id] && { ...table[id], target_id: String(table[id].target_id) };
  return { nodes, inputs, getLink };
}

/**
 * @param {number} id
 * @param {Record<string, any>} [values]
 * @param {any} [more]
 */
const settings = (id, values = {}, more = {}) => node(id, SETTINGS, { mode: "auto", vram_limit_gb: 0, ...values }, more);

/** @param {any} root */
const streams = (root) => Object.fromEntries(graphModels({ rootGraph: root }).map((model) => [model.name, model.streams]));

test("Async Offload Settings count for the loader whose MODEL comes to them", () => {
  const nodes = () => [node(1, THEIRS, { unet_name: "a" }), node(2, THEIRS, { unet_name: "b" }), node(3, "LoraLoaderModelOnly"), node(5, "KSampler")];
  assert.deepEqual(streams(graph([...nodes(), settings(4)], [[1, 3], [3, 4], [4, 5], [2, 5]])), { a: true, b: false });
  assert.deepEqual(streams(graph([...nodes(), settings(4)], [[1, 3], [2, 5]])), { a: false, b: false }, "they are not connected");
  assert.deepEqual(streams(graph([...nodes(), settings(4, {}, { mode: BYPASSED })], [[1, 3], [3, 4]])), { a: false, b: false });
  const [one, two, lora, sampler] = nodes();
  lora.mode = BYPASSED;
  assert.deepEqual(streams(graph([one, two, lora, sampler, settings(4)], [[1, 3], [3, 4]])), { a: true, b: false }, "what is bypassed leads on");
  lora.mode = MUTED;
  assert.deepEqual(streams(graph([one, two, lora, sampler, settings(4)], [[1, 3], [3, 4]])), { a: false, b: false }, "what is muted does not");
});

test("a MODEL is followed by the names of Set and Get nodes", () => {
  const named = (/** @type {number} */ id, /** @type {string} */ type, /** @type {any} */ name) => node(id, type, { Constant: name });
  for (const [set, get] of [["SetNode", "GetNode"], ["easy setNode", "easy getNode"]]) {
    const found = (/** @type {any} */ given, /** @type {any} */ taken) =>
      streams(graph([node(1, THEIRS, { unet_name: "a" }), named(2, set, given), named(3, get, taken), settings(4)], [[1, 2], [3, 4]]));
    assert.deepEqual(found("model", "model"), { a: true });
    assert.deepEqual(found("model", "another"), { a: false });
    assert.deepEqual(found(undefined, undefined), { a: false }, "nothing was chosen");
  }
  const inner = graph([named(2, "SetNode", "m")], [[IN, 2]]);
  const outer = { ...node(12, "some-uuid"), subgraph: inner };
  assert.deepEqual(
    streams(graph([node(1, THEIRS, { unet_name: "a" }), outer, named(3, "GetNode", "m"), settings(4)], [[1, 12], [3, 4]])), { a: false },
    "names are those of one graph",
  );
});

test("GPU Placement counts for the loader whose MODEL comes to it", () => {
  const root = graph([node(1, THEIRS, { unet_name: "a" }), node(2, THEIRS, { unet_name: "b" }), node(3, PLACEMENT)], [[1, 3]]);
  assert.deepEqual(graphModels({ rootGraph: root }).map(({ name, streams, placed }) => [name, streams, placed]), [["a", true, true], ["b", false, false]]);
});

test("a MODEL is followed into subgraphs and out of them", () => {
  const inner = graph([settings(7, { reserve_vram_gb: 2 })], [[IN, 7, 1], [7, OUT, 1]]);
  const outer = { ...node(12, "some-uuid"), subgraph: inner };
  const root = graph([node(1, THEIRS, { unet_name: "a" }), outer, settings(3, { pinned_limit_gb: 5 })], [[1, 12], [12, 3]]);
  const enter = root.getLink;
  root.getLink = (id) => (id === 0 ? { ...enter(0), target_slot: 1 } : enter(id));
  outer.outputs = [{ type: "CLIP", links: [] }, { type: "MODEL", links: [1] }];
  const [found] = graphModels({ rootGraph: root });
  assert.deepEqual([found.streams, found.reserve, found.pinnedLimit], [true, 0, 5], "the last one decides");
  outer.mode = BYPASSED;
  outer.outputs = [{ type: "MODEL", links: [1] }];
  assert.ok(graphModels({ rootGraph: root })[0].streams);
  outer.outputs = [];
  assert.ok(!graphModels({ rootGraph: root })[0].streams, "what is inside does not run");

  const loader = graph([node(1, THEIRS, { unet_name: "b" })], [[1, OUT]]);
  const around = { ...node(12, "some-uuid"), subgraph: loader };
  assert.deepEqual(streams(graph([around, settings(3)], [[12, 3]])), { b: true });
  assert.deepEqual(streams(graph([around, settings(3)], [])), { b: false });
});

test("the limits are those of the last settings behind a loader; its own holds where they set none", () => {
  const limits = (/** @type {any[]} */ ...behind) => {
    const nodes = [node(1, OURS, { unet_name: "a", vram_limit_gb: 6 }), ...behind.map((values, place) => settings(place + 2, values))];
    const [found] = graphModels({ rootGraph: graph(nodes, behind.map((_, place) => [place + 1, place + 2])) });
    return [found.limit, found.limitBySettings, found.reserve, found.pinnedLimit, found.mode, found.streams];
  };
  assert.deepEqual(limits(), [6, false, 0, 0, "auto", true]);
  assert.deepEqual(limits({ reserve_vram_gb: 2 }), [6, false, 2, 0, "auto", true]);
  assert.deepEqual(limits({ vram_limit_gb: 0.5, pinned_limit_gb: 8, mode: "stream" }), [0.5, true, 0, 8, "stream", true]);
  assert.deepEqual(limits({ vram_limit_gb: 3, reserve_vram_gb: 2 }, { mode: "sync" }), [3, true, 0, 0, "sync", true]);
  assert.deepEqual(limits({ vram_limit_gb: 3 }, { vram_limit_gb: 4 }), [4, true, 0, 0, "auto", true]);
  assert.deepEqual(limits({ mode: "off" }), [6, false, 0, 0, "off", false]);
});

test("what the last settings choose about page-locking and packing counts", () => {
  const chosen = (/** @type {any[]} */ ...behind) => {
    const nodes = [node(1, OURS, { unet_name: "a" }), ...behind.map((values, place) => settings(place + 2, values))];
    const [found] = graphModels({ rootGraph: graph(nodes, behind.map((_, place) => [place + 1, place + 2])) });
    return [found.mode, found.pinMemory, found.packing];
  };
  assert.deepEqual(chosen({}), ["auto", "auto", "auto"]);
  assert.deepEqual(chosen({ mode: "sync", pin_memory: "off", packing: "on" }), ["sync", "off", "on"]);
  assert.deepEqual(chosen({ pin_memory: "off" }, { packing: "off" }), ["auto", "auto", "off"]);
});

test("a limit that is no number is none", () => {
  const found = graphModels({ graph: { nodes: [node(1, OURS, { unet_name: "a", vram_limit_gb: "much" }), node(2, OURS, { unet_name: "b", vram_limit_gb: null })] } });
  assert.deepEqual(found.map(({ limit }) => limit), [0, 0]);
});

test("only a MODEL is followed, through reroutes too", () => {
  const lora = node(2, "LoraLoader");
  const root = graph([node(1, THEIRS, { unet_name: "a" }), lora, settings(3)], [[1, 2], [2, 3]]);
  const { links } = lora.outputs[0];
  lora.outputs = [{ type: "MODEL", links: null }, { type: "CLIP", links }];
  assert.deepEqual(streams(root), { a: false });
  lora.outputs = [{ type: "*", links }];
  assert.deepEqual(streams(root), { a: true });
});

test("a subgraph that is said to be in itself comes to an end", () => {
  const inner = graph([node(1, THEIRS, { unet_name: "a" })], []);
  const outer = { ...node(12, "some-uuid"), subgraph: inner };
  inner.nodes.push(outer);
  assert.deepEqual(graphModels({ rootGraph: graph([outer], []) }).map((model) => model.node), ["12:1"]);
  const round = graph([], [[IN, 12]]);
  const again = { ...node(12, "some-uuid"), subgraph: round };
  round.nodes.push(again);
  assert.deepEqual(streams(graph([node(1, THEIRS, { unet_name: "b" }), again], [[1, 12]])), { b: false });
});

test("a preset decides whatever the inputs say", () => {
  const one = settings(2, { preset: "least VRAM", vram_limit_gb: 3, pin_memory: "off", packing: "on" });
  const least = { mode: "stream", vram_limit_gb: 0, reserve_vram_gb: 0, pinned_limit_gb: 0, pin_memory: "auto", packing: "auto" };
  const presets = { custom: {}, "least VRAM": least };
  one.constructor = { nodeData: { inputs: { preset: { weightstream_presets: presets } } } };
  const found = () => graphModels({ rootGraph: graph([node(1, THEIRS, { unet_name: "a" }), one], [[1, 2]]) })[0];
  assert.deepEqual([found().mode, found().limit, found().pinMemory, found().packing], ["stream", 0, "auto", "auto"]);
  one.widgets.find((/** @type {any} */ each) => each.name === "preset").value = "custom";
  assert.deepEqual([found().mode, found().limit, found().pinMemory, found().packing], ["auto", 3, "off", "on"]);
});

test("loaders of one file are one where all is the same, and several where it is not", () => {
  const nodes = [1, 2, 3].map((id) => node(id, OURS, { unet_name: "a", vram_limit_gb: id === 2 ? 4 : 8 }));
  const found = graphModels({ rootGraph: graph([...nodes, settings(4)], []) });
  assert.deepEqual(found.map((model) => [model.node, model.limit]), [["1", 8], ["2", 4]]);
  const apart = graphModels({ rootGraph: graph([...nodes, settings(4, { reserve_vram_gb: 1 })], [[3, 4]]) });
  assert.deepEqual(apart.map((model) => [model.node, model.limit, model.reserve]), [["1", 8, 0], ["2", 4, 0], ["3", 8, 1]]);
});

test("links in a circle, and ways that meet again, come to an end", () => {
  const nodes = Array.from({ length: 40 }, (_, id) => node(id + 1, id === 0 ? THEIRS : "Merge", id === 0 ? { unet_name: "a" } : {}));
  /** @type {[number, number][]} */
  const links = nodes.flatMap(({ id }) => (id < 39 ? [[id, id + 1], [id, id + 2]] : [[id, 2]]));
  assert.deepEqual(streams(graph([...nodes, settings(50)], [...links, [40, 50]])), { a: true });
});
