import assert from "node:assert/strict";
import { test } from "node:test";

import { estimateViews } from "../../web/lib/estimate_view.mjs";
import { ESTIMATE_ROUTE, estimatesOf, watchEstimates } from "../../web/lib/estimates.mjs";
import { LANGUAGES, stringsFor } from "../../web/lib/strings.mjs";
import { buildView } from "../../web/lib/view.mjs";
import { GIB, STATES, estimate, feedState, known, model, status } from "./states.mjs";

const EN = stringsFor("en");
const FLUX = known().model;
const QWEN = { ...FLUX, name: "qwen image.safetensors", folder: "diffusion_models", weightDtype: "fp8_e4m3fn", limit: 4 };
const SET = { ...FLUX, limit: 0.5, reserve: 2, pinnedLimit: 8, mode: "stream", pinMemory: "off", packing: "on" };

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
  of([FLUX, SET], "waiting");
  assert.match(server.asked[2], /&vram_limit_gb=0\.5&reserve_vram_gb=2&pinned_limit_gb=8&mode=stream&pin_memory=off&packing=on$/);
  of([FLUX], "waiting");
  server.answer = () => Response.json(estimate({ loaded: true }));
  assert.equal(of([FLUX], "running")[0].estimate?.loaded, false, "what was known until there is an answer");
  await settled();
  assert.equal(of([FLUX], "running")[0].estimate?.loaded, true);
  assert.equal(server.asked.length, 4);
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
    ["limited", "error", "vram_limit_gb is too low: 819 MiB are the least that it runs with", "Raise vram_limit_gb of the loader"],
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
});

test("a card says whose limit it is, and that settings have switched streaming off", () => {
  const low = { fits: false, stays: 0, streamed_bytes: 0, limit: 0.5 * GIB, least_limit: 0.8 * GIB };
  const todo = (/** @type {any} */ changes) => estimateViews([known(low, changes)], EN, () => null)[0].todo;
  assert.match(todo({}), /^Raise vram_limit_gb of the loader, /);
  assert.match(todo({ limitBySettings: true }), /^Raise vram_limit_gb of Async Offload Settings, /);
  const [off, theirs] = estimateViews([known({}, { mode: "off", streams: false, placed: true }), known({}, { streams: false })], EN, () => null, true);
  assert.match(off.note, /^The mode of Async Offload Settings is off/);
  assert.match(theirs.note, /Stream this workflow's models/);
});

test("a card says what to do where somebody has set how much may be page-locked", () => {
  const todo = (/** @type {number | null} */ limit, /** @type {any} */ changes = {}) =>
    estimateViews([known({ from_file: 4 * GIB, pinnable: limit ?? 14 * GIB, pinned_limit: limit }, changes)], EN, () => null)[0].todo;
  assert.match(todo(0, { pinMemory: "off" }), /^Set pin_memory of Async Offload Settings to on: 4\.0 GiB /);
  assert.match(todo(0), /^Start ComfyUI without --disable-pinned-memory, /);
  assert.match(todo(14 * GIB, { pinnedLimit: 14 }), /^Raise pinned_limit_gb /);
  assert.match(todo(null), /^It runs, but /);
  const roomy = known({ from_file: 4 * GIB, pinnable: 14 * GIB, pinned_limit: 20 * GIB }, { pinnedLimit: 20 });
  assert.match(estimateViews([roomy], EN, () => null)[0].todo, /^It runs, but /, "the RAM is the limit, and not the setting");
});

test("where copies do not overlap a card says what each step takes more", () => {
  const [view] = estimateViews([known({ overlaps: false, packed_bus_seconds: null })], EN, () => null);
  assert.match(view.facts.find(({ key }) => key === "step")?.text ?? "", /a step takes 1\.5 s more than it computes/);
});

test("where there is too little VRAM a card says what is amiss first, and that ComfyUI loads the model", () => {
  const [view] = estimateViews([known({ fits: false, stays: 0, streamed_bytes: 0, missing_bytes: GIB }, { streams: false })], EN, () => null);
  assert.match(view.todo, /^Download the file again/);
  assert.match(view.note, /its own way/);
});

test("two loaders of one file with other limits have a card each", () => {
  const two = [known({}, { limit: 4 }), known({}, { node: "5", limit: 6 })];
  const keys = estimateViews(two, EN, () => null).map(({ key }) => key);
  assert.equal(new Set(keys).size, 2);
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

test("a size of nothing is no part of a bar", () => {
  const [view] = estimateViews([known({ streamed_bytes: 0, stays: GIB, model_bytes: GIB })], EN, () => null);
  assert.deepEqual(view.bar?.segments.map(({ size }) => size), [1, 0]);
});
