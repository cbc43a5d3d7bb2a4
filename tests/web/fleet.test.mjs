import assert from "node:assert/strict";
import { test } from "node:test";

import { merge } from "../../web/lib/status.mjs";
import { stringsFor } from "../../web/lib/strings.mjs";
import { buildView } from "../../web/lib/view.mjs";
import { NOW, STATES, event, feedState, status, worker } from "./states.mjs";

/** @import { FleetView } from "../../web/lib/fleet_view.mjs" */
/** @import { Worker } from "../../web/lib/status.mjs" */

const EN = stringsFor("en");

/**
 * @param {Worker[]} workers
 * @param {{waiting?: number, reruns?: number}} [changes]
 * @returns {FleetView}
 */
function shown(workers, { waiting = 0, reruns = 0 } = {}) {
  const { fleet } = buildView(feedState(status({ fleet: { waiting, reruns, workers } })), EN);
  assert.ok(fleet);
  return fleet;
}

/** @param {number} count */
const many = (count) => Array.from({ length: count }, (_, place) => worker({ name: `gpu-${place}` }));

test("without a fleet there is no card, and texts are those of one ComfyUI", () => {
  for (const [name, state] of Object.entries(STATES)) {
    assert.equal(buildView(state, EN).fleet === null, state.status?.fleet === undefined, name);
  }
  assert.match(buildView(STATES.noGpu, EN).deviceNote, /Models run ComfyUI's own way\.$/);
  assert.equal(buildView(STATES.fleetStarts, EN).deviceNote, "No GPU to run on: no worker is up.");
});

test("each state of a worker has its words and its tone", () => {
  const since = NOW / 1000 - 12.4;
  const { workers } = shown([
    worker({ name: "a", state: "starting" }),
    worker({ name: "b" }),
    worker({ name: "c", state: "running", since }),
    worker({ name: "d", state: "restarting", reason: "its process ended (signal 9)" }),
  ]);
  assert.deepEqual(workers.map(({ name, state, tone, reason }) => [name, state, tone, reason]), [
    ["a", "starting", "neutral", ""],
    ["b", "free", "neutral", ""],
    ["c", "running for 12 s", "active", ""],
    ["d", "started again", "warning", "its process ended (signal 9)"],
  ]);
  const [failed, unknown, timeless] = shown([
    worker({ state: "failed", reason: "no such program" }), worker({ name: "x", state: "asleep" }), worker({ name: "y", state: "running" }),
  ]).workers;
  assert.deepEqual([failed.state, failed.tone, failed.reason], ["cannot be started", "error", "no such program"]);
  assert.deepEqual([unknown.state, unknown.tone], ["asleep", "neutral"], "a state of a later version is shown as it came");
  assert.equal(timeless.state, "running");
});

test("what was done and what is loaded is told in one line", () => {
  const [busy, fresh] = shown([worker({ done: 41, changes: 1, loaded: ["a", "b"] }), worker({ name: "gpu-1", done: 1 })]).workers;
  assert.equal(busy.detail, "41 prompts done · 1 change of models · a, b");
  assert.equal(fresh.detail, "1 prompt done · 0 changes of models · no model loaded");
});

test("what waits is always said, and what ran again only where something did", () => {
  assert.equal(shown([]).summary, "No prompt waits");
  assert.equal(shown([], { waiting: 1 }).summary, "1 prompt waits");
  assert.equal(shown([], { waiting: 3, reruns: 2 }).summary, "3 prompts wait · 2 ran again because a worker died");
});

test("the host is said where there are several", () => {
  const hosts = (/** @type {(string | null)[]} */ ...names) =>
    shown(names.map((host, place) => worker({ name: `gpu-${place}`, host }))).workers.map(({ host }) => host);
  assert.deepEqual(hosts("one", "one"), ["", ""]);
  assert.deepEqual(hosts("one", null), ["", ""], "one that starts is on no host yet");
  assert.deepEqual(hosts("one", "two", null), ["one", "two", ""]);
});

test("beyond four workers those that are free are one line, and never those that do not work", () => {
  assert.equal(shown(many(4)).idle.length, 0);
  const five = shown([worker({ name: "a", state: "running" }), worker({ name: "b", state: "failed" }), ...many(3)]);
  assert.deepEqual(five.workers.map(({ name }) => name), ["a", "b"]);
  assert.deepEqual(five.idle.map(({ name }) => name), ["gpu-0", "gpu-1", "gpu-2"]);
  assert.equal(five.idleText, "3 free workers");
  const one = shown([...many(4).map((each) => ({ ...each, state: "running" })), worker({ name: "z" })]);
  assert.equal(one.idle.length, 0, "a single one needs no more room than the line");
});

test("a worker that does not work is read out", () => {
  const { spoken } = buildView(STATES.fleet, EN).state;
  assert.equal(spoken, "Streaming. gpu-2: started again. gpu-3: cannot be started");
});

test("the device of a worker that runs something is not among the idle ones, whatever loaded it", () => {
  const { devices, idle, idleText } = buildView(STATES.fleet, EN);
  assert.deepEqual(devices.map(({ title }) => title), ["gpu-0", "gpu-1"]);
  assert.deepEqual(idle.map(({ title }) => title), ["gpu-4", "gpu-5"]);
  assert.equal(idleText, "2 idle GPUs");
});

test("an event renews all but hosts and models", () => {
  const fleet = { waiting: 0, reruns: 0, workers: [worker({ host: "one", loaded: ["a"] })] };
  const before = status({ fleet });
  const later = { waiting: 2, reruns: 1, workers: [worker({ state: "running", since: 5, done: 7, changes: 2 }), worker({ name: "gpu-1" })] };
  const merged = merge(before, event(status({ fleet: later, time: before.time + 1 })));
  assert.deepEqual(merged?.fleet, {
    waiting: 2,
    reruns: 1,
    workers: [
      worker({ host: "one", loaded: ["a"], state: "running", since: 5, done: 7, changes: 2 }),
      worker({ name: "gpu-1", host: null }),
    ],
  });
  assert.equal(merge(null, event(before))?.fleet?.workers.length, 1, "before the first status");
  assert.ok(!("fleet" in (merge(status(), event(status())) ?? {})));
});

test("how long a prompt runs is told by the server's clock alone", () => {
  const running = status({ time: 100, fleet: { waiting: 0, reruns: 0, workers: [worker({ state: "running", since: 90 })] } });
  assert.equal(buildView(feedState(running), EN).fleet?.workers[0].state, "running for 10 s");
  const later = feedState(running, { event: event({ ...running, time: 175 }) });
  assert.equal(buildView(later, EN).fleet?.workers[0].state, "running for 1:25");
});
