import assert from "node:assert/strict";
import { test } from "node:test";

import { estimateViews } from "../../web/lib/estimate_view.mjs";
import { ESTIMATE_ROUTE, estimatesOf, watchEstimates } from "../../web/lib/estimates.mjs";
import { graphModels } from "../../web/lib/graph_models.mjs";
import { LANGUAGES, stringsFor } from "../../web/lib/strings.mjs";
import { buildView } from "../../web/lib/view.mjs";
import { GIB, STATES, estimate, feedState, known, model, status } from "./states.mjs";

const EN = stringsFor("en");
const FLUX = known().model;
const QWEN = { ...FLUX, name: "qwen image.safetensors", folder: "diffusion_models", weightDtype: "fp8_e4m3fn", limit: 4 };

const settled = () => new Promise((resolve) => setTimeout(resolve, 0));

/** A server that answers what a test says. */
class Server {
  /** @type {string[]} */
  asked = [];
  clientId = "page";
  addEventListener = () => {};
  answer = () => Response.json(estimate());

  fetchApi = async (/** @type {string} */ route) => {
    this.asked.push(route);
    return this.answer();
  };
}

/** What is asked and known, as the panel does it once a second. */
function watched() {
  const server = new Server();
  let changes = 0;
  const estimates = watchEstimates(server, () => void (changes += 1));
  return { server, of: estimates.of, changes: () => changes };
}

test("each model is asked for once, and again only when there is another moment", async () => {
  const { server, of, changes } = watched();
  for (const _ of [1, 2, 3]) assert.deepEqual(of([FLUX], "waiting"), []);
  await settled();
  assert.deepEqual(server.asked, [`${ESTIMATE_ROUTE}?name=flux1-dev.safetensors&weight_dtype=default`]);
  assert.deepEqual(of([FLUX], "waiting"), [{ model: FLUX, estimate: estimate(), error: "" }]);
  of([FLUX, QWEN], "waiting");
  assert.equal(server.asked[1], `${ESTIMATE_ROUTE}?name=qwen+image.safetensors&weight_dtype=fp8_e4m3fn&folder=diffusion_models&vram_limit_gb=4`);
  await settled();
  assert.equal(changes(), 2);
  server.answer = () => Response.json(estimate({ loaded: true }));
  assert.equal(of([FLUX], "running")[0].estimate?.loaded, false, "what was known until there is an answer");
  await settled();
  assert.equal(of([FLUX], "running")[0].estimate?.loaded, true);
  assert.equal(server.asked.length, 3);
});

test("a model that was away is asked for anew, and a late answer is dropped", async () => {
  const { server, of, changes } = watched();
  of([FLUX], "waiting");
  of([], "waiting");
  await settled();
  assert.equal(changes(), 0);
  assert.deepEqual(of([FLUX], "waiting"), []);
  await settled();
  assert.equal(server.asked.length, 2);
});

test("a refusal is told, and an older or silent server says nothing", async () => {
  const { server, of } = watched();
  server.answer = () => Response.json({ error: "x: there is no such file in diffusion_models" }, { status: 404 });
  of([FLUX], "1");
  await settled();
  assert.equal(of([FLUX], "1")[0].error, "x: there is no such file in diffusion_models");
  for (const answer of [() => new Response("404: Not Found", { status: 404 }), () => { throw new TypeError("Failed to fetch"); }]) {
    server.answer = answer;
    of([FLUX], String(answer));
    await settled();
    assert.deepEqual(of([FLUX], String(answer)), []);
  }
});

test("nothing is asked of what is loaded, of a server that does not answer, or without a GPU", () => {
  /** @type {string[][]} */
  const asked = [];
  const estimates = { of: (/** @type {readonly any[]} */ models, /** @type {string} */ moment) => (asked.push([...models.map(({ name }) => name), moment]), []) };
  const loaded = status({ models: [model(), model({ name: "qwen image.safetensors", ladder: "unloaded", pinned_bytes: 0 })] });
  const models = () => [FLUX, QWEN];
  estimatesOf(feedState(loaded), estimates, models);
  estimatesOf(feedState(loaded, { progress: { done: 1, total: 4, left: null } }), estimates, models);
  assert.deepEqual(asked, [["qwen image.safetensors", "waiting"], ["qwen image.safetensors", "running"]]);
  for (const state of [STATES.gone, STATES.starting, STATES.noGpu, STATES.newer]) estimatesOf(state, estimates, models);
  assert.equal(asked.length, 2);
});

test("a card says what matters most, and the one thing to do", () => {
  const views = buildView(STATES.beforeRuns, EN, { estimates: STATES.beforeRuns.estimates }).estimates;
  assert.deepEqual(views.map(({ name, tone, headline, todo }) => [name, tone, headline, todo.split(/[:.,]/)[0]]), [
    ["measured", "", "About 1.6 s/step; 18.0 GiB stream in each", ""],
    ["fits", "", "All 4.1 GiB fit into VRAM; nothing streams", ""],
    ["too large", "error", "Too little VRAM: 3.3 GiB are the least that it runs with", "Use a smaller file (fp8 or GGUF)"],
    ["limited", "error", "The loader's limit is too low: 819 MiB are the least that it runs with", "Raise vram_limit_gb of the loader"],
    ["a small card", "error", "Too little VRAM: 3.3 GiB are the least that it runs with", "Use a smaller file (fp8 or GGUF)"],
    ["in little RAM", "warning", "18.0 GiB stream in each step, 1.5 s on the bus", "It runs"],
    ["from the disk", "warning", "18.0 GiB stream in each step, 1.5 s on the bus", "Use a smaller file (fp8 or GGUF)"],
    ["beside others", "warning", "18.0 GiB stream in each step, 1.5 s on the bus", "Close programs that take RAM"],
    ["a part", "error", "18.0 GiB stream in each step, 1.5 s on the bus", "Download the file again"],
    ["damaged.safetensors", "error", "damaged.safetensors: its header cannot be read; the file ends within it", ""],
  ]);
  const [measured] = views;
  assert.match(measured.note, /its own way/);
  assert.deepEqual(Object.fromEntries(measured.facts.map(({ key, text }) => [key, text])), {
    file: "22.2 GiB",
    vram: "4.2 GiB stay; gpu:0 has 8.0 GiB, of which 2.5 GiB are left to activations and others",
    streams: "18.0 GiB in each step, from 57 of 57 blocks",
    bus: "1.5 s of each step at 12.6 GB/s (measured); about 1.1 s with packed weights",
    step: "1.6 s predicted, with 1.2 s of compute as in its last run; about 1.2 s with packed weights",
    ram: "18.0 GiB are needed, page-locked; up to 25.0 GiB of 32.0 GiB may be",
  });
  assert.deepEqual(measured.bar?.segments.map(({ key, size }) => [key, Math.round(100 * size)]), [["resident", 19], ["staging", 81]]);
  const texts = views.flatMap(({ facts }) => facts.map(({ text }) => text));
  for (const part of ["PCIe 4.0 x8", "(assumed)", "known after the first run", "8.2 GiB; 4.1 GiB once it is loaded", "so 4.0 GiB of each step come from the file"]) {
    assert.ok(texts.some((text) => text.includes(part)), part);
  }
});

test("with GPU Placement a card says that it is for one of several GPUs", () => {
  const note = (/** @type {boolean} */ several) => estimateViews([known({}, { placed: true })], EN, () => null, several)[0].note;
  assert.deepEqual([note(true), note(false)], ["This is for gpu:0 alone; GPU Placement can share the model among GPUs.", ""]);
  const nodes = [node(1, "UNETLoader", { unet_name: "b" }), node(2, "WeightStreamGPUPlacement")];
  const [{ placed, streams }] = graphModels({ graph: { nodes } });
  assert.ok(placed && streams);
});

test("a model has one card: its own while that is shown", () => {
  const shown = status({ models: [model()] });
  assert.deepEqual(buildView(feedState(shown), EN, { estimates: [known()] }).estimates, []);
  const freed = status({ models: [model({ ladder: "unloaded", pinned_bytes: 0 })] });
  assert.equal(buildView(feedState(freed), EN, { estimates: [known()] }).estimates.length, 1);
  assert.deepEqual(buildView(feedState(freed), EN, { estimates: [known()], keep: () => true }).estimates, []);
});

test("the cards are Chinese in Chinese", () => {
  for (const view of estimateViews(STATES.beforeRuns.estimates ?? [], LANGUAGES.zh, () => null)) {
    for (const text of [view.headline, view.note, view.todo, view.bar?.meter.text ?? "", ...view.facts.flatMap(({ label, text }) => [label, text])]) {
      assert.doesNotMatch(text, /[a-z]+ [a-z]+ [a-z]+|undefined|NaN/);
    }
  }
});

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
  assert.deepEqual(graphModels({ graph: { nodes } }), [
    { node: "1", title: "", name: "a", folder: "", weightDtype: "default", limit: 6.5, streams: true, placed: false },
    { node: "3", title: "", name: "b", folder: "diffusion_models", weightDtype: "fp8_e5m2", limit: 0, streams: false, placed: false },
  ]);
  const settings = node(9, "WeightStreamOffloadSettings");
  assert.deepEqual(graphModels({ graph: { nodes: [...nodes, settings] } }).map(({ streams }) => streams), [true, true]);
  assert.deepEqual(graphModels({ graph: { nodes: [...nodes, { ...settings, mode: 4 }] } }).map(({ streams }) => streams), [true, false]);
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

test("a size of nothing is no part of a bar", () => {
  const [view] = estimateViews([known({ streamed_bytes: 0, stays: GIB, model_bytes: GIB })], EN, () => null);
  assert.deepEqual(view.bar?.segments.map(({ size }) => size), [1, 0]);
});
