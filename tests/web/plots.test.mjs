import assert from "node:assert/strict";
import { test } from "node:test";

import { PLOT, stepsView } from "../../web/lib/plots.mjs";
import { stringsFor } from "../../web/lib/strings.mjs";

const EN = stringsFor("en");
const GB = 1e9;

/**
 * @param {number} number
 * @param {number[]} seconds
 */
function run(number, seconds) {
  return {
    number, steps: seconds.map((_, place) => place + 1), seconds, rate: seconds.map(() => 20 * GB), waiting: seconds.map(() => 0.25),
  };
}

test("without a step there is neither plot nor row", () => {
  assert.deepEqual(stepsView([], EN), { plots: [], rows: [] });
});

test("runs stand side by side, the latest first, without the steps in which it was measured", () => {
  const { rows } = stepsView([run(4, [9, 9, 2, 2]), run(5, [8, 8, 1, 1, 1])], EN);
  assert.deepEqual(rows.map(({ name, steps, seconds, rate, waiting }) => [name, steps, seconds, rate, waiting]), [
    ["Run 5 (latest)", "5", "1.000 s", "20.0 GB/s", "25 %"],
    ["Run 4", "4", "2.000 s", "20.0 GB/s", "25 %"],
  ]);
});

test("a run of two steps counts as it is", () => {
  assert.equal(stepsView([run(1, [3, 1])], EN).rows[0].seconds, "2.000 s");
});

test("lines share a scale, in which the first steps are cut off", () => {
  const [seconds, , waiting] = stepsView([run(4, [9, 9, 2]), run(5, [8, 8, 1])], EN).plots;
  assert.equal(seconds.most, "2.000 s");
  assert.deepEqual(seconds.lines.map(({ key, age }) => [key, age]), [["4", 1], ["5", 0]]);
  assert.equal(seconds.lines[0].path, "M0 0L100 0L200 0");
  assert.equal(seconds.lines[1].path, `M0 0L100 0L200 ${PLOT.height / 2}`);
  assert.deepEqual([seconds.latest, waiting.latest, waiting.most], ["1.000 s", "25 %", "100 %"], "what is above is the latest run's");
  assert.equal(seconds.label, "s/step over the steps of the last runs; latest run on average 1.000 s");
});

test("one step is a dot, and no figure is divided by nothing", () => {
  const { plots } = stepsView([{ number: 1, steps: [1], seconds: [0], rate: [0], waiting: [0] }], EN);
  assert.equal(plots[0].lines[0].path, `M0 ${PLOT.height}h0`);
  assert.doesNotMatch(JSON.stringify(plots), /NaN|Infinity/);
});
