import assert from "node:assert/strict";
import { test } from "node:test";

import { graphNodes } from "../../web/lib/graph_nodes.mjs";
import { stringsFor } from "../../web/lib/strings.mjs";
import { buildView } from "../../web/lib/view.mjs";
import { watchWorkflows } from "../../web/lib/workflows.mjs";
import { feedState, model, status } from "./states.mjs";

const EN = stringsFor("en");
const MISSING = { node_id: "5", name: "GPU Placement", kind: /** @type {const} */ ("fallback"), text: "gpu:5 is not there" };

/** A page with two workflows, of which the first is shown: in each a node 5, of ours and not. */
function page() {
  const devices = { name: "devices", value: "gpu:5" };
  const placement = { id: 5, title: "My placement", type: "WeightStreamGPUPlacement", widgets: [devices, { name: "line", value: 1, serialize: false }] };
  const loader = { id: 6, title: "Loader", type: "WeightStreamModelLoader", widgets: [{ name: "unet_name", value: "sub/a.safetensors" }] };
  const latent = { id: 5, title: "Empty Latent Image", type: "EmptyLatentImage" };
  const workflows = [{ nodes: [placement, loader] }, { nodes: [latent] }].map(({ nodes }) => ({
    nodes, getNodeById: (/** @type {any} */ id) => nodes.find((node) => node.id === id),
  }));
  const app = {
    rootGraph: workflows[0], lastNodeErrors: /** @type {any} */ (null),
    extensionManager: { workflow: { activeWorkflow: workflows[0] } },
  };
  /** @type {[string, (event: any) => void][]} */
  const listeners = [];
  const api = /** @type {any} */ ({ addEventListener: (/** @type {string} */ type, /** @type {any} */ listener) => listeners.push([type, listener]) });
  const watched = watchWorkflows(app, api);
  return {
    app, devices, loader, workflows, watched, nodes: graphNodes(app, watched, api),
    show(/** @type {number} */ place) {
      app.rootGraph = app.extensionManager.workflow.activeWorkflow = workflows[place];
    },
    say(/** @type {string} */ type, /** @type {any} */ detail = {}) {
      for (const [each, listener] of listeners) if (each === type) listener({ detail });
    },
  };
}

test("what runs is of the workflow that was shown when it was queued", () => {
  const { say, show, watched, workflows } = page();
  assert.equal(watched.running(), null);
  say("promptQueueing", { batchCount: 2 });
  show(1);
  say("status", { exec_info: { queue_remaining: 2 } });
  say("promptQueueing", { batchCount: 1 });
  const running = [];
  for (let prompt = 0; prompt < 3; prompt++) {
    say("execution_start");
    running.push(watched.running());
    say("execution_success");
    assert.equal(watched.running(), null);
  }
  assert.deepEqual(running.map((workflow) => workflows.indexOf(/** @type {any} */ (workflow))), [0, 0, 1]);
});

test("a prompt that was refused is none that runs", () => {
  const { say, show, watched, workflows } = page();
  say("promptQueueing", { batchCount: 1 });
  show(1);
  say("promptQueueing", { batchCount: 1 });
  say("execution_start");
  assert.equal(watched.running(), workflows[1]);
});

test("a notice is shown while its workflow is, and its inputs are what they were", () => {
  const { say, show, nodes, devices } = page();
  say("promptQueueing", { batchCount: 1 });
  say("execution_start");
  say("weightstream.notice", MISSING);
  say("execution_success");
  const held = () => nodes.notices([MISSING]).length;
  assert.equal(held(), 1);
  show(1);
  assert.equal(held(), 0, "another workflow");
  show(0);
  assert.equal(held(), 1);
  devices.value = "";
  assert.equal(held(), 0, "another input");
});

test("a notice of nobody knows which workflow stays, and its inputs count from when it was seen", () => {
  const { show, nodes, devices } = page();
  const held = () => nodes.notices([MISSING, { ...MISSING, node_id: null }]).map((notice) => notice.node_id);
  assert.deepEqual(held(), ["5", null]);
  show(1);
  assert.deepEqual(held(), ["5", null]);
  show(0);
  devices.value = "gpu:0";
  assert.deepEqual(held(), [null]);
});

test("what ComfyUI refused of our nodes is a notice, until the input is another", () => {
  const { app, say, show, nodes, devices } = page();
  say("promptQueueing", { batchCount: 1 });
  const errors = [{ message: "Custom validation failed for node", details: "devices - 'cuda:x' is no GPU" }];
  app.lastNodeErrors = { 5: { class_type: "WeightStreamGPUPlacement", errors }, 6: { class_type: "KSampler", errors } };
  const notices = () => buildView(feedState(status()), EN, { title: nodes.title, held: nodes.notices }).notices;
  const [{ title, text, tone, node }, ...more] = notices();
  assert.deepEqual([title, node?.text, text, tone, more.length], ["Not run:", "My placement", "'cuda:x' is no GPU", "error", 0]);
  show(1);
  assert.deepEqual(notices(), []);
  show(0);
  devices.value = "gpu:0";
  assert.deepEqual(notices(), []);
  say("promptQueueing", { batchCount: 1 });
  assert.equal(notices().length, 1, "refused again");
});

test("a notice names its node once, as the link, and a failure is an error", () => {
  const { nodes } = page();
  const notices = [MISSING, { ...MISSING, name: "My placement" }, { ...MISSING, name: "a.safetensors", kind: /** @type {const} */ ("failed") }];
  const views = buildView(feedState(status({ notices })), EN, { title: nodes.title }).notices;
  assert.deepEqual(views.map(({ title, tone }) => [title, tone]), [
    ["Placed differently: GPU Placement", "warning"], ["Placed differently:", "warning"], ["Failed: a.safetensors", "error"],
  ]);
  assert.deepEqual(views.map(({ node }) => node?.text), ["My placement", "My placement", "My placement"]);
});

test("a card leads to no node that is another's, or loads another model", () => {
  const { show, nodes, loader } = page();
  const node = (/** @type {any} */ changes) =>
    buildView(feedState(status({ models: [model(changes)] })), EN, { title: nodes.title }).models[0].node?.text;
  assert.equal(node({ node_id: "6", name: "a.safetensors" }), "Loader");
  assert.equal(node({ node_id: "6", name: "b.safetensors" }), undefined);
  assert.equal(node({ node_id: "5", name: "b.safetensors" }), "My placement");
  loader.widgets[0].value = "b.safetensors";
  assert.equal(node({ node_id: "6", name: "a.safetensors" }), undefined);
  show(1);
  assert.deepEqual(["5", "6", "7"].map((id) => node({ node_id: id })), [undefined, undefined, undefined], "no link, and no number");
});
