import assert from "node:assert/strict";
import { test } from "node:test";

import { merge, totalLoading } from "../../web/lib/status.mjs";
import { device, event, model, status } from "./states.mjs";

test("before anything has come there is no status", () => {
  assert.equal(merge(null, null), null);
  const only = status();
  assert.equal(merge(only, null), only);
});

test("an event before the first status gives devices and host, and no models", () => {
  const early = event(status({ devices: [device({ resident: 5e9 })] }));
  const merged = merge(null, early);
  assert.equal(merged?.devices[0].resident, 5e9);
  assert.equal(merged?.devices[0].name, "");
  assert.equal(merged?.devices[0].virtual, false);
  assert.equal(merged?.host.ram_total, early.host[0]);
  assert.deepEqual(merged?.models, []);
  assert.deepEqual(merged?.notices, []);
});

test("a newer event renews figures and keeps names", () => {
  const before = status({ devices: [device({ name: "NVIDIA H200", virtual: true })] });
  const after = event(status({ devices: [device({ resident: 7e9, total: null, free: null })] }), { time: before.time + 1 });
  const [merged] = merge(before, after)?.devices ?? [];
  assert.equal(merged.name, "NVIDIA H200");
  assert.equal(merged.virtual, true);
  assert.equal(merged.resident, 7e9);
  assert.equal(merged.total, null, "what is not known any more is not what was known before");
});

test("an event from before the status changes nothing", () => {
  const now = status();
  const old = event(status({ devices: [device({ resident: 7e9 })] }), { time: now.time - 1 });
  assert.equal(merge(now, old), now);
});

test("a device that the event does not name is gone, and a new one is there", () => {
  const before = status({ devices: [device(), device({ device: "gpu:1" })] });
  const after = event(status({ devices: [device({ device: "gpu:1" }), device({ device: "gpu:2" })] }));
  assert.deepEqual(merge(before, after)?.devices.map((each) => each.device), ["gpu:1", "gpu:2"]);
});

test("a row that is cut short has unknown values", () => {
  const short = event(status(), { devices: [["gpu:0", 100]], host: [] });
  const merged = merge(null, short);
  assert.equal(merged?.devices[0].total, 100);
  assert.equal(merged?.devices[0].free, null);
  assert.equal(merged?.host.pinned_limit, null);
});

test("loading and running end when the event says nothing of them", () => {
  const before = status({ models: [model({ running: true, loading: { done: 1, total: 2, rate: null } })] });
  const [merged] = merge(before, event(before, { running: [], loading: [] }))?.models ?? [];
  assert.equal(merged.running, false);
  assert.equal(merged.loading, null);
});

test("of models behind the last that an event can name the status is believed", () => {
  const loading = { done: 1, total: 2, rate: null };
  const before = status({ models: [model({ id: "last", loading, running: true })] });
  const full = event(before, {
    loading: ["a", "b", "c", "d"].map((id) => [id, 1, 2, null]),
    running: Array.from({ length: 16 }, (_, place) => `${place}`),
  });
  const [merged] = merge(before, full)?.models ?? [];
  assert.deepEqual(merged.loading, loading);
  assert.equal(merged.running, true);
});

test("several rows of one model add up, and an unknown rate is no rate", () => {
  assert.equal(totalLoading([]), null);
  const rows = [{ done: 1, total: 4, rate: 10 }, { done: 2, total: 6, rate: null }];
  assert.deepEqual(totalLoading(rows), { done: 3, total: 10, rate: 10 });
  assert.deepEqual(totalLoading([rows[1]]), { done: 2, total: 6, rate: null });
});
