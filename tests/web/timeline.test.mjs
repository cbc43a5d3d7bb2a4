import assert from "node:assert/strict";
import { test } from "node:test";

import { duration, estimated, timeLeft } from "../../web/lib/format.mjs";
import { stringsFor } from "../../web/lib/strings.mjs";
import { moved, spanAt, ticks, tickTexts, timelineView, zoomed } from "../../web/lib/timeline.mjs";
import { trace } from "./states.mjs";

const EN = stringsFor("en");
const noon = () => "12:00";

test("without a recorded step there is nothing to show", () => {
  assert.equal(timelineView([], EN), null);
});

test("each device has a lane for compute with its waits, and one for copies", () => {
  const view = timelineView([trace({}, 3), trace({ device: "gpu:1", offset: 0.5 }, 2)], EN, noon);
  assert.ok(view);
  assert.deepEqual(view.lanes.map(({ label }) => label), ["gpu:0 compute", "gpu:0 copies", "gpu:1 compute", "gpu:1 copies"]);
  assert.deepEqual(view.lanes[0].spans.map(({ kind }) => kind), [...Array(3).fill("compute"), ...Array(3).fill("waits")]);
  assert.equal(view.lanes[2].spans[0].begin, 0.5);
  assert.equal(view.seconds, 0.5 + 0.02);
  assert.equal(view.when, "Step 7 of its run, recorded at 12:00.");
});

test("the same stands there as text", () => {
  const view = timelineView([trace({}, 3)], EN, noon);
  assert.deepEqual(view?.lines, ["gpu:0: 30.0 ms in all; waiting 12.0 ms (40 %), 3 times; 1020 MiB in 3 copies."]);
  assert.equal(view?.waits.length, 3);
  assert.equal(view?.waits[0], "gpu:0 waiting 4.00 ms at 0.00 ms, in double_blocks.0");
  assert.equal(view?.label, `Timeline of a step. ${view?.lines[0]}`);
  assert.equal(view?.lanes[1].spans[0].text, "340 MiB: 9.80 ms at 0.00 ms", "what began before the step is not before time");
});

test("the longest waits come first, and no more of them than help", () => {
  const waits = Array.from({ length: 30 }, (_, place) => /** @type {[number, number, number]} */ ([place, place + place / 100, 0]));
  const view = timelineView([trace({ waits, compute: [], blocks: [] })], EN, noon);
  assert.equal(view?.waits.length, 8);
  assert.equal(view?.waits[0], "gpu:0 waiting 0.290 s at 29.0 s");
});

test("what lies on top is found first", () => {
  const view = timelineView([trace({}, 3)], EN, noon);
  assert.ok(view);
  assert.equal(spanAt(view.lanes[0], 0.012, 0)?.kind, "waits");
  assert.equal(spanAt(view.lanes[0], 0.018, 0)?.kind, "compute");
  assert.equal(spanAt(view.lanes[0], 0.5, 0), null);
});

test("a range stays within the step however it is zoomed and moved", () => {
  assert.deepEqual(zoomed({ from: 0, to: 10 }, 0.5, 10), { from: 2.5, to: 7.5 });
  assert.deepEqual(zoomed({ from: 0, to: 2 }, 4, 10), { from: 0, to: 8 });
  assert.deepEqual(zoomed({ from: 3, to: 9 }, 100, 10), { from: 0, to: 10 });
  const smallest = zoomed({ from: 5, to: 5.01 }, 0.001, 10);
  assert.ok(Math.abs(smallest.to - smallest.from - 0.02) < 1e-9);
  assert.deepEqual(moved({ from: 0, to: 4 }, 0.5, 10), { from: 2, to: 6 });
  assert.deepEqual(moved({ from: 8, to: 10 }, 0.5, 10), { from: 8, to: 10 });
  assert.deepEqual(moved({ from: 1, to: 3 }, -0.9, 10), { from: 0, to: 2 });
});

test("an axis has round times, and not too many", () => {
  assert.deepEqual(ticks({ from: 0, to: 1 }, 4), [0, 0.5, 1]);
  assert.deepEqual(ticks({ from: 0.03, to: 0.09 }, 3).map((at) => at.toFixed(3)), ["0.040", "0.060", "0.080"]);
  assert.deepEqual(ticks({ from: 0, to: 0 }, 3), []);
});

test("an axis has one unit, and digits that tell its times apart", () => {
  assert.deepEqual(tickTexts(ticks({ from: 0, to: 0.12 }, 4)), ["0 ms", "50 ms", "100 ms"]);
  assert.deepEqual(tickTexts(ticks({ from: 0.03, to: 0.0311 }, 3)), ["30.0 ms", "30.5 ms", "31.0 ms"]);
  assert.deepEqual(tickTexts(ticks({ from: 0, to: 3 }, 4)), ["0 s", "1 s", "2 s", "3 s"]);
  assert.deepEqual(tickTexts(ticks({ from: 0, to: 1.2 }, 4)), ["0.0 s", "0.5 s", "1.0 s"]);
  assert.deepEqual(tickTexts([]), []);
});

test("short and long times are written so that they can be read", () => {
  assert.deepEqual([0.0052, 0.0312, 0.324, 12.51, null].map(duration), ["5.20 ms", "31.2 ms", "0.324 s", "12.5 s", "–"]);
  assert.deepEqual([0.00523, 0.0312, 0.3241, 1.714, 12.51].map(estimated), ["5.23 ms", "31.2 ms", "0.324 s", "1.71 s", "12.5 s"]);
  assert.deepEqual([0, 4.4, 59.6, 245, 3723].map(timeLeft), ["0 s", "4 s", "1:00", "4:05", "1:02:03"]);
});
