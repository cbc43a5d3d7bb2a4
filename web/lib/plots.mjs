/**
 * The steps of the last runs as plain values: lines to draw, and a table of means.
 */

import * as format from "./format.mjs";

/** @import { Strings } from "./strings.mjs" */

/**
 * @typedef {{number: number, steps: number[], seconds: number[], rate: number[], waiting: number[]}} RunSteps
 *   what the route tells of a run, a value for each step that was timed; waiting is a part of the step
 * @typedef {{key: string, path: string, age: number}} Line  age: 0 of the latest run
 * @typedef {{key: string, title: string, latest: string, most: string, lines: Line[], label: string}} PlotView
 *   latest: the mean of the latest run; most: what the upper edge stands for
 * @typedef {{key: string, name: string, age: number, steps: string, seconds: string, rate: string, waiting: string}} RunRow
 * @typedef {{plots: PlotView[], rows: RunRow[]}} StepsView
 */

export const PLOT = { width: 200, height: 46 };
// The first steps load kernels and are measured: they neither set the scale nor count in means, where there are more.
const UNSETTLED = 2;

const METRICS = /** @type {const} */ (["seconds", "rate", "waiting"]);
/** @type {Record<typeof METRICS[number], "secondsPerStep" | "copyRate" | "waitingPart">} */
const TITLES = { seconds: "secondsPerStep", rate: "copyRate", waiting: "waitingPart" };
/** @type {Record<typeof METRICS[number], (value: number | null) => string>} */
const TEXTS = {
  seconds: format.seconds,
  rate: format.rate,
  waiting: format.percent,
};

/**
 * @param {readonly RunSteps[]} runs  the oldest first
 * @param {Strings} strings
 * @returns {StepsView}
 */
export function stepsView(runs, strings) {
  const newest = [...runs].reverse();
  return {
    plots: newest.length === 0 ? [] : METRICS.map((metric) => plot(metric, newest, strings)),
    rows: newest.map((run, age) => ({
      key: String(run.number),
      name: age === 0 ? strings.latestRun(run.number) : strings.runName(run.number),
      age,
      steps: String(run.steps.at(-1) ?? 0),
      seconds: format.seconds(mean(run, "seconds")),
      rate: format.rate(mean(run, "rate")),
      waiting: format.percent(mean(run, "waiting")),
    })),
  };
}

/**
 * @param {typeof METRICS[number]} metric
 * @param {readonly RunSteps[]} newest
 * @param {Strings} strings
 * @returns {PlotView}
 */
function plot(metric, newest, strings) {
  const most = metric === "waiting" ? 1 : Math.max(...newest.flatMap((run) => settled(run, metric)), 0);
  const last = Math.max(...newest.map((run) => run.steps.at(-1) ?? 1));
  const title = strings[TITLES[metric]];
  return {
    key: metric,
    title,
    latest: TEXTS[metric](mean(newest[0], metric)),
    most: TEXTS[metric](most),
    // The latest on top of the others.
    lines: newest.map((run, age) => ({ key: String(run.number), age, path: path(run.steps, run[metric], last, most) })).reverse(),
    label: strings.plotLabel(title, TEXTS[metric](mean(newest[0], metric))),
  };
}

/**
 * @param {RunSteps} run
 * @param {typeof METRICS[number]} metric
 */
function settled(run, metric) {
  const values = run[metric].filter((_, place) => run.steps[place] > UNSETTLED);
  return values.length > 0 ? values : run[metric];
}

/**
 * @param {RunSteps} run
 * @param {typeof METRICS[number]} metric
 */
function mean(run, metric) {
  const values = settled(run, metric);
  return values.length > 0 ? values.reduce((sum, value) => sum + value, 0) / values.length : null;
}

/**
 * @param {readonly number[]} steps
 * @param {readonly number[]} values
 * @param {number} last  the step at the right edge
 * @param {number} most  the value at the upper edge; what is more is cut
 */
function path(steps, values, last, most) {
  const points = steps.map((step, place) => {
    const x = last > 1 ? ((step - 1) / (last - 1)) * PLOT.width : 0;
    const y = PLOT.height * (1 - (most > 0 ? Math.min(1, values[place] / most) : 0));
    return `${round(x)} ${round(y)}`;
  });
  // A single step is a dot, which a line of no length draws with round ends.
  return points.length === 0 ? "" : `M${points.join("L")}${points.length === 1 ? "h0" : ""}`;
}

/** @param {number} value */
function round(value) {
  return Math.round(value * 10) / 10;
}
