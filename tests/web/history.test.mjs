import assert from "node:assert/strict";
import { test } from "node:test";

import { SPAN_MS, remember, sparkline } from "../../web/lib/history.mjs";

const BOX = { width: 60, height: 10 };

/** @param {number | null} total @param {number | null} free */
const gpu = (total, free) => [{ device: "gpu:0", total, free }];

test("two minutes are kept of each device", () => {
  /** @type {import("../../web/lib/history.mjs").History} */
  let history = new Map();
  for (let now = 0; now <= 500_000; now += 1000) history = remember(history, gpu(100, 60), now);
  const samples = history.get("gpu:0") ?? [];
  assert.equal(samples.length, SPAN_MS / 1000 + 1);
  assert.deepEqual(samples[0], [500_000 - SPAN_MS, 40]);
});

test("what is not known leaves no sample, and a device that is gone none at all", () => {
  const one = remember(new Map(), gpu(100, 60), 0);
  assert.equal(remember(one, gpu(null, 60), 1000).get("gpu:0")?.length, 1);
  assert.equal(remember(one, gpu(100, null), 1000).get("gpu:0")?.length, 1);
  assert.equal(remember(one, [], 1000).size, 0);
  assert.equal(one.get("gpu:0")?.length, 1, "the history that was given is as before");
});

test("samples of a clock that was set back are let go", () => {
  const ahead = remember(new Map(), gpu(100, 60), 90_000);
  assert.deepEqual(remember(ahead, gpu(100, 50), 1000).get("gpu:0"), [[1000, 50]]);
});

test("the line ends at the right, and its height is what is used of all", () => {
  const path = sparkline([[60_000, 0], [62_000, 50], [64_000, 100]], 100, 64_000, BOX);
  assert.equal(path, "M58 10L59 5L60 0");
});

test("no line is drawn across time in which nobody looked", () => {
  const path = sparkline([[0, 50], [1000, 50], [60_000, 50], [61_000, 50]], 100, 61_000, BOX);
  assert.equal(path.match(/M/g)?.length, 2);
});

test("nothing is drawn of nothing", () => {
  assert.equal(sparkline([], 100, 0, BOX), "");
  assert.equal(sparkline([[0, 1]], 100, 0, BOX), "");
  assert.equal(sparkline([[0, 1], [1000, 1]], 0, 1000, BOX), "");
  assert.equal(sparkline([[0, 1], [1000, 1]], null, 1000, BOX), "");
  assert.equal(sparkline([[0, 1], [1000, 1]], 100, 10 * SPAN_MS, BOX), "", "too old");
});
