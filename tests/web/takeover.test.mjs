import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";

import { COMMAND, isLoader, message, replaceWorkflow, takeover } from "../../web/lib/takeover.mjs";
import { NOTES_IN_CHINESE, TAKEOVER_LANGUAGES } from "../../web/lib/takeover_strings.mjs";

const CHANGED = { code: "loader", weight: "changed", node: "4", kind: "UNETLoader", graph: "", values: {}, text: "is a Streamed Model Loader now" };
const LEFT = { code: "unread", weight: "left", node: "4", kind: "Old", graph: "Inner", values: { name: "a", value: "b" }, text: "a='b' cannot be read" };

/** A page that keeps states as ComfyUI's does, and a server that answers ``answer``. */
function page(/** @type {any} */ answer, /** @type {number} */ status = 200) {
  const states = { shown: { nodes: ["old"] } };
  const tracker = {
    /** @type {any} */ activeState: { nodes: ["noted"] },
    /** @type {any[]} */ undoQueue: [],
    redoQueue: [{ nodes: ["later"] }],
    /** @type {any[]} */ modified: [],
    captureCanvasState() {
      if (JSON.stringify(this.activeState) === JSON.stringify(states.shown)) return;
      this.undoQueue.push(this.activeState);
      this.activeState = states.shown;
    },
    async redo() {
      const next = this.redoQueue.pop();
      this.undoQueue.push(this.activeState);
      states.shown = { ...next, sizes: "as drawn" };
      this.activeState = next;
    },
    updateModified(/** @type {any} */ before) {
      this.modified.push(before);
    },
  };
  /** @type {any[]} */
  const toasts = [];
  /** @type {any[]} */
  const asked = [];
  const app = {
    rootGraph: { serialize: () => states.shown },
    extensionManager: { toast: { add: (/** @type {any} */ toast) => toasts.push(toast) }, workflow: { activeWorkflow: { changeTracker: tracker } } },
  };
  const api = {
    async fetchApi(/** @type {string} */ route, /** @type {any} */ options) {
      asked.push([route, JSON.parse(options.body)]);
      if (answer instanceof Error) throw answer;
      return { ok: status === 200, status, json: async () => answer };
    },
  };
  return { app, api, states, tracker, toasts, asked, ...takeover({ app, api, locale: () => "en" }) };
}

test("the converted workflow is shown, and undo has one more state: what was shown before", async () => {
  const { command, states, tracker, toasts, asked } = page({ workflow: { nodes: ["new"] }, changed: true, notes: [CHANGED] });
  await command.function();
  assert.deepEqual(asked, [["/weightstream/v1/convert", { nodes: ["old"] }]]);
  assert.deepEqual(tracker.undoQueue, [{ nodes: ["noted"] }, { nodes: ["old"] }]);
  assert.deepEqual(tracker.redoQueue, []);
  assert.deepEqual(tracker.activeState, states.shown);
  assert.deepEqual(tracker.modified, [{ nodes: ["old"] }], "it is another than this one");
  tracker.captureCanvasState();
  assert.equal(tracker.undoQueue.length, 2, "what the page makes of it is no step of its own");
  assert.equal(toasts[0].severity, "success");
  assert.equal(toasts[0].summary, "1 model streams now");
  assert.match(toasts[0].detail, /^UNETLoader is a Streamed Model Loader now\nRun, then read the line on the node\.\nUndo/);
});

test("a workflow that needs no change is left alone", async () => {
  const { command, tracker, toasts } = page({ workflow: {}, changed: false, notes: [] });
  await command.function();
  assert.deepEqual(tracker.undoQueue, []);
  assert.deepEqual(tracker.redoQueue, [{ nodes: ["later"] }]);
  assert.equal(toasts[0].severity, "info");
  assert.equal(toasts[0].detail, "");
});

test("two clicks convert once", async () => {
  const { command, asked } = page({ workflow: { nodes: [] }, changed: true, notes: [] });
  await Promise.all([command.function(), command.function()]);
  assert.equal(asked.length, 1);
});

test("an error is told, and the next click tries again", async () => {
  for (const [answer, status, text] of /** @type {[any, number, RegExp][]} */ ([
    [{ error: "it is no workflow" }, 400, /it is no workflow/],
    [{}, 404, /Restart ComfyUI/],
    [{}, 405, /Restart ComfyUI/],
    [{}, 413, /--max-upload-size/],
    [{}, 502, /HTTP status 502/],
    [null, 400, /TypeError/],
    [new TypeError("fetch failed"), 0, /fetch failed/],
  ])) {
    const { command, tracker, toasts } = page(answer, status);
    await command.function();
    await command.function();
    assert.equal(toasts.length, 2);
    assert.equal(toasts[0].severity, "error");
    assert.match(toasts[0].detail, text);
    assert.deepEqual(tracker.undoQueue, []);
  }
});

test("what was converted is not put in the place of anything else", async () => {
  const converted = { workflow: { nodes: ["new"] }, changed: true, notes: [CHANGED] };
  for (const [what, meanwhile] of /** @type {[string, (page: any) => void][]} */ ([
    ["another tab", ({ app }) => (app.extensionManager.workflow.activeWorkflow = { changeTracker: { redoQueue: [] } })],
    ["an edit", ({ states }) => (states.shown = { nodes: ["old", "added"] })],
  ])) {
    const one = page(converted);
    const { fetchApi } = one.api;
    one.api.fetchApi = async (/** @type {[any, any]} */ ...given) => {
      meanwhile(one);
      return fetchApi(...given);
    };
    await one.command.function();
    assert.deepEqual(one.tracker.undoQueue, [], what);
    assert.match(one.toasts[0].detail, /give the command again/, what);
    assert.equal(one.toasts[0].severity, "error");
  }
});

test("a workflow that was only looked at from elsewhere, or whose nodes have grown, is replaced", async () => {
  const one = page({ workflow: { nodes: ["new"] }, changed: true, notes: [CHANGED] });
  const looks = [1, 2, 3, 4, 5].map((scale) => ({ nodes: [{ id: 1, size: [200, scale] }], extra: { ds: { scale }, kept: true } }));
  one.app.rootGraph.serialize = () => looks.shift() ?? one.states.shown;
  await one.command.function();
  assert.equal(one.toasts[0].severity, "success");
});

test("a graph that cannot be read is told of", async () => {
  const one = page({});
  one.app.rootGraph.serialize = () => {
    throw new Error("a node is broken");
  };
  await one.command.function();
  assert.match(one.toasts[0].detail, /a node is broken/);
});

test("a page without these states loads the workflow", async () => {
  /** @type {any[]} */
  const loaded = [];
  const app = { extensionManager: {}, loadGraphData: async (/** @type {any[]} */ ...given) => loaded.push(given) };
  await replaceWorkflow(app, { nodes: [] });
  assert.deepEqual(loaded, [[{ nodes: [] }, true, false]]);
});

test("what is left to the user comes first, stays, and has its subgraph's name", () => {
  const many = Array.from({ length: 20 }, () => CHANGED);
  const told = message({ workflow: {}, changed: true, notes: [...many, LEFT] }, "en");
  assert.equal(told.severity, "warn");
  assert.equal(told.life, undefined);
  const lines = told.detail.split("\n");
  assert.equal(lines[0], "Old (in Inner): a='b' cannot be read");
  assert.equal(lines.length, 11);
  assert.equal(lines[8], "… and 13 more");
});

test("what differs is to be read too, though nothing is left to do", () => {
  const told = message({ workflow: {}, changed: true, notes: [CHANGED, { ...LEFT, weight: "differs" }] }, "en");
  assert.deepEqual([told.severity, told.life], ["warn", undefined]);
});

test("nodes have the page's names, and numbers where a name may mean several", () => {
  const named = (/** @type {string} */ kind) => (kind === "UNETLoader" ? "Load Diffusion Model" : kind);
  const notes = [{ ...CHANGED, graph: "Text to Image" }, CHANGED, { ...CHANGED, node: "9" }];
  const lines = message({ workflow: {}, changed: true, notes }, "en", named).detail.split("\n");
  assert.deepEqual(lines.slice(0, 3), [
    "Load Diffusion Model (in Text to Image) is a Streamed Model Loader now",
    "Load Diffusion Model 4 is a Streamed Model Loader now",
    "Load Diffusion Model 9 is a Streamed Model Loader now",
  ]);
});

test("Chinese has every text of the page, and one for every code of the server", () => {
  const kinds = (/** @type {object} */ table) => Object.entries(table).map(([key, text]) => `${key} ${typeof text}`).sort();
  assert.deepEqual(kinds(TAKEOVER_LANGUAGES.zh), kinds(TAKEOVER_LANGUAGES.en));
  const source = readFileSync(new URL("../../streaming/workflows/notes.py", import.meta.url), "utf-8");
  const codes = [...source.matchAll(/^ {4}"([\w-]+)": \(/gm)].map(([, code]) => code);
  assert.ok(codes.length > 15);
  assert.deepEqual(Object.keys(NOTES_IN_CHINESE).sort(), codes.sort());
  const values = new Proxy({}, { get: (_, name) => `<${String(name)}>` });
  for (const text of Object.values(NOTES_IN_CHINESE)) {
    assert.match(text(values), /[\u4e00-\u9fff]/);
    assert.doesNotMatch(text(values), /undefined/);
  }
  assert.match(message({ workflow: {}, changed: true, notes: [LEFT] }, "zh").detail, /Old（在 Inner 中）：无法读懂 a=b/);
});

test("the menu's entry is on loaders, and on the canvas", () => {
  const slots = (/** @type {string[]} */ ...types) => types.map((type) => ({ type }));
  const { nodeItems, canvasItems, menu, command } = page({});
  assert.ok(isLoader({ type: "UNETLoader", outputs: slots("MODEL"), inputs: slots("COMBO") }));
  assert.ok(isLoader({ type: "VAELoaderMultiGPU", outputs: slots("VAE") }));
  assert.ok(!isLoader({ type: "LoraLoader", outputs: slots("MODEL"), inputs: slots("MODEL") }));
  assert.ok(!isLoader({ type: "WeightStreamModelLoader", outputs: slots("MODEL") }));
  assert.equal(nodeItems({ type: "VAELoader", outputs: slots("VAE") }).length, 0);
  assert.equal(nodeItems({ type: "UNETLoader", outputs: slots("MODEL") })[0].content, command.label);
  assert.equal(canvasItems().at(-1)?.content, command.label);
  assert.deepEqual(menu.commands, [COMMAND]);
});
