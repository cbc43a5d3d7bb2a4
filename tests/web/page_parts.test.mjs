import assert from "node:assert/strict";
import { test } from "node:test";

import { badgeView } from "../../web/lib/badge.mjs";
import { graphNodes } from "../../web/lib/graph_nodes.mjs";
import { issueReport } from "../../web/lib/issue_report.mjs";
import { watchProgress } from "../../web/lib/progress.mjs";
import { stringsFor } from "../../web/lib/strings.mjs";
import { NOTICE_EVENT, toasts } from "../../web/lib/toasts.mjs";
import { watchWorkflows } from "../../web/lib/workflows.mjs";
import { GIB, STATES, cause, device, feedState, model, status } from "./states.mjs";

const EN = stringsFor("en");

/** A server that a test lets say things. */
class Server {
  /** @type {[type: string, listener: (event: any) => void][]} */
  listeners = [];
  clientId = "page";
  fetchApi = async () => new Response("{}");
  addEventListener = (/** @type {string} */ type, /** @type {(event: any) => void} */ listener) => void this.listeners.push([type, listener]);

  /**
   * @param {string} type
   * @param {any} detail
   */
  say(type, detail) {
    for (const [each, listener] of this.listeners) if (each === type) listener({ detail });
  }
}

test("progress tells what is left from the steps that have ended", () => {
  const server = new Server();
  let now = 0;
  let changes = 0;
  const progress = watchProgress(server, () => now, () => void (changes += 1));
  assert.equal(progress(), null);
  const step = (/** @type {number} */ value, /** @type {any} */ more = {}) => server.say("progress", { value, max: 20, prompt_id: "a", node: "3", ...more });
  now = 10_000;
  step(1);
  assert.deepEqual(progress(), { done: 1, total: 20, left: null });
  now = 12_000;
  step(2);
  assert.deepEqual(progress(), { done: 2, total: 20, left: 36 });
  now = 13_000;
  assert.equal(progress()?.left, 35);
  now = 60_000;
  assert.equal(progress()?.left, 34, "a step that takes long takes no others away");
  step(1, { node: "9" });
  assert.deepEqual(progress(), { done: 1, total: 20, left: null });
  server.say("execution_success", { prompt_id: "a" });
  assert.equal(progress(), null);
  assert.equal(changes, 4);
});

test("a sampler that begins anew has no time left yet", () => {
  const server = new Server();
  let now = 0;
  const progress = watchProgress(server, () => now, () => {});
  for (const value of [1, 2, 3, 2]) {
    server.say("progress", { value, max: 20, prompt_id: "a", node: "3" });
    now += 1000;
  }
  assert.deepEqual(progress(), { done: 2, total: 20, left: null });
});

test("of prompts that run at once the progress is that of the first, until it ends", () => {
  const server = new Server();
  let now = 0;
  const progress = watchProgress(server, () => now, () => {});
  for (const value of [1, 2, 3]) {
    now += 1000;
    server.say("progress", { value, max: 20, prompt_id: "a", node: "3" });
    server.say("progress", { value, max: 8, prompt_id: "b", node: "3" });
  }
  assert.deepEqual(progress(), { done: 3, total: 20, left: 17 });
  server.say("execution_success", { prompt_id: "c" });
  assert.equal(progress()?.total, 20);
  server.say("execution_success", { prompt_id: "a" });
  assert.deepEqual(progress(), { done: 3, total: 8, left: 5 });
});

test("a page that was not connected does not know what has ended meanwhile", () => {
  const server = new Server();
  let changes = 0;
  const progress = watchProgress(server, () => 0, () => void (changes += 1));
  server.say("reconnected", undefined);
  assert.equal(changes, 0);
  server.say("progress", { value: 1, max: 20, prompt_id: "a", node: "3" });
  server.say("reconnected", undefined);
  assert.equal(progress(), null);
  assert.equal(changes, 2);
});

test("bars of bytes are no steps", () => {
  const server = new Server();
  const progress = watchProgress(server, () => 0, () => assert.fail("nothing of a run has changed"));
  server.say("progress", { value: 5, max: 23_800_000_000, node: "1" });
  server.say("progress", { value: 1, max: 1, node: "1" });
  server.say("execution_error", {});
  assert.equal(progress(), null);
});

test("the badge says how full the fullest device is, and what part of the last run waited", () => {
  assert.deepEqual(badgeView(STATES.slow, EN), {
    text: "VRAM 7.2 / 8.0 GiB · 86 % waiting", title: "gpu:0: 7.2 / 8.0 GiB of VRAM in use; 86 % of the last run was waiting for the bus",
  });
  assert.match(badgeView(STATES.eight, EN).title, /^gpu:7: 84\.1 \/ 150 GiB of VRAM in use; the fullest of 8 GPUs; 43 % /);
  assert.equal(badgeView(feedState(status()), EN).text, "VRAM 1.6 / 25.2 GiB", "nothing has run");
  for (const state of [STATES.starting, STATES.gone, STATES.noGpu]) assert.equal(badgeView(state, EN).text, "");
});

test("a notice is said once, by the name that its node has, and only where that is wanted", () => {
  const server = new Server();
  /** @type {any[]} */
  const added = [];
  let wanted = true;
  const app = { extensionManager: { toast: { add: (/** @type {any} */ toast) => added.push(toast) } } };
  toasts({ app, api: server, strings: EN, wanted: () => wanted, title: (id) => (id === "9" ? "Placement" : "") });
  const notice = { node_id: "9", name: "GPU Placement", kind: "fallback", text: "gpu:3 is not there" };
  server.say(NOTICE_EVENT, notice);
  server.say(NOTICE_EVENT, notice);
  server.say(NOTICE_EVENT, { ...notice, node_id: null, kind: "inactive", name: "Flux" });
  server.say(NOTICE_EVENT, { ...notice, kind: "failed", text: "no room" });
  wanted = false;
  server.say(NOTICE_EVENT, { ...notice, text: "another" });
  assert.deepEqual(added.map(({ severity, summary, detail }) => [severity, summary, detail]), [
    ["warn", "Placed differently: Placement", "gpu:3 is not there"],
    ["warn", "Not streaming: Flux", "gpu:3 is not there"],
  ]);
});

test("a report has versions, devices, models and causes", () => {
  const slow = STATES.slow;
  const state = { ...slow, status: { ...slow.status, version: "0.3.0", comfyui: { version: "0.30.0", broken: [] } } };
  const text = issueReport(/** @type {any} */ (state), EN, "Firefox 150");
  assert.match(text, /^### WeightStream report\nWeightStream 0\.3\.0, ComfyUI 0\.30\.0, Firefox 150\n/);
  assert.match(text, /\| gpu:0 \| NVIDIA GeForce RTX 4060 \| 7\.2 \/ 8\.0 GiB \| 2\.9 GiB \| 6\.3 GB\/s \| 86 % \| PCIe 4\.0 x4 of PCIe 4\.0 x8 \|/);
  assert.match(text, /- flux1-dev\.safetensors on gpu:0: staged \(the limit of 12\.8 GiB/);
  assert.match(text, /- why: The card's link runs at PCIe 4\.0 x4/);
  for (const each of Object.values(STATES)) assert.doesNotMatch(issueReport(each, EN, ""), /undefined|NaN|\[object/);
});

test("a report has the causes of a model on two devices once, and what is amiss with ComfyUI", () => {
  const models = [model(), model({ device: "gpu:1" })];
  const text = issueReport(feedState(/** @type {any} */ ({ ...status({ models, causes: [cause()] }), comfyui: { version: "1", broken: ["x is gone"] } })), EN, "");
  assert.equal(text.split("- why: ").length - 1, 1);
  assert.match(text, /\nComfyUI is not as expected: x is gone\n/);
});

test("a report has versions, options and settings", () => {
  const environment = { torch: "2.9.1", driver: "580.1", options: "--lowvram" };
  const text = issueReport(feedState({ ...status(), environment, models: [model({ settings: { vram_limit: 5, mode: "stream" } })] }), EN, "");
  assert.match(text, /\ntorch 2\.9\.1, driver 580\.1, options --lowvram\n/);
  assert.match(text, /\n {2}- set: vram_limit=5, mode=stream\n/);
});

/** A page that shows a workflow. */
function shownPage(/** @type {any} */ app) {
  const server = new Server();
  const workflows = watchWorkflows(app, server);
  return { server, workflows, nodes: graphNodes(app, workflows, server) };
}

test("nodes are found in subgraphs too, and shown there", () => {
  const inner = { title: "Inner", type: "WeightStreamModelLoader", graph: {} };
  const outer = { title: "Outer", subgraph: { getNodeById: (/** @type {any} */ id) => (id === 7 ? inner : undefined) } };
  /** @type {any[]} */
  const done = [];
  const rootGraph = { getNodeById: (/** @type {any} */ id) => (id === 12 ? outer : undefined) };
  const canvas = {
    graph: rootGraph, setGraph: (/** @type {any} */ graph) => done.push(["graph", graph]),
    centerOnNode: (/** @type {any} */ node) => done.push(["center", node]),
  };
  const { nodes } = shownPage({ rootGraph, canvas });
  assert.deepEqual(["12", "12:7", "12:8", "5"].map((id) => nodes.title(id)), ["", "Inner", "", ""], "another's node has the id of ours by chance");
  nodes.show("12:7");
  assert.deepEqual(done, [["graph", inner.graph], ["center", inner]]);
  nodes.show("5");
  assert.equal(done.length, 2);
});

test("what is known of devices of a status without links is said", () => {
  const old = feedState(status({ devices: [device({ total: 24 * GIB })] }));
  assert.match(issueReport(old, EN, ""), /\| – \|\n/);
});
