/**
 * A recorded step as plain values: lanes of spans to draw, and the same in words.
 */

import * as format from "./format.mjs";

/** @import { Strings } from "./strings.mjs" */

/**
 * @typedef {[begin: number, end: number, value: number]} RawSpan  seconds since the device began the step
 * @typedef {{device: string, step: number, time: number, offset: number, seconds: number, waited: number, copied: number,
 *   blocks: string[], compute: RawSpan[], waits: RawSpan[], unpacking: RawSpan[], copies: RawSpan[]}} DeviceTrace
 *   what the route tells of a device
 * @typedef {"compute" | "waits" | "unpacking" | "copies"} LaneKind
 * @typedef {{begin: number, end: number, kind: LaneKind, text: string}} Span  seconds since the first device began
 * @typedef {{device: string, kind: LaneKind, label: string, spans: Span[]}} Lane
 * @typedef {{seconds: number, lanes: Lane[], when: string, lines: string[], waits: string[], label: string}} TimelineView
 * @typedef {{from: number, to: number}} Range
 */

// Waits and unpacking are drawn on top of the compute in which they are.
const LANES = /** @type {const} */ (["compute", "copies"]);
const ON_COMPUTE = /** @type {const} */ (["unpacking", "waits"]);
// More of them help nobody.
const MOST_WAITS = 8;
// So far in one may zoom.
const LEAST_RANGE = 1 / 500;

/**
 * @param {readonly DeviceTrace[]} devices
 * @param {Strings} strings
 * @param {(time: number) => string} [clock]  a time of day in words
 * @returns {TimelineView | null} null where nothing was recorded
 */
export function timelineView(devices, strings, clock = timeOfDay) {
  if (devices.length === 0) return null;
  const seconds = Math.max(...devices.map((device) => device.offset + device.seconds));
  const lines = devices.map((device) => deviceLine(device, strings));
  const lanes = devices.flatMap((device) => LANES.map((kind) => lane(device, kind, strings)));
  const when = strings.recordedAt(devices[0].step, clock(devices[0].time));
  return { seconds, lanes, when, lines, waits: longestWaits(devices, strings), label: strings.timelineLabel(lines.join(" ")) };
}

/**
 * @param {DeviceTrace} device
 * @param {"compute" | "copies"} kind
 * @param {Strings} strings
 * @returns {Lane}
 */
function lane(device, kind, strings) {
  const kinds = kind === "compute" ? [kind, ...ON_COMPUTE] : [kind];
  const spans = kinds.flatMap((each) => device[each].map((span) => spanOf(device, each, span, strings)));
  return { device: device.device, kind, label: `${device.device} ${strings[`lane${kind}`]}`, spans };
}

/**
 * @param {DeviceTrace} device
 * @param {LaneKind} kind
 * @param {RawSpan} span
 * @param {Strings} strings
 * @returns {Span}
 */
function spanOf(device, kind, [begin, end, value], strings) {
  const what = kind === "compute" ? (device.blocks[value] ?? String(value)) : kind === "copies" ? format.bytes(value) : strings[`lane${kind}`];
  const text = strings.spanText(what, format.duration(end - begin), format.duration(Math.max(0, device.offset + begin)));
  return { begin: device.offset + begin, end: device.offset + end, kind, text };
}

/**
 * @param {DeviceTrace} device
 * @param {Strings} strings
 */
function deviceLine(device, strings) {
  return strings.deviceSteps({
    device: device.device,
    seconds: format.duration(device.seconds),
    waited: format.duration(device.waited),
    part: format.percent(device.seconds > 0 ? device.waited / device.seconds : 0),
    waits: device.waits.length,
    copied: format.bytes(device.copied),
    copies: device.copies.length,
  });
}

/**
 * @param {readonly DeviceTrace[]} devices
 * @param {Strings} strings
 */
function longestWaits(devices, strings) {
  const all = devices.flatMap((device) => device.waits.map((wait) => ({ device, wait })));
  all.sort((one, other) => other.wait[1] - other.wait[0] - (one.wait[1] - one.wait[0]));
  return all.slice(0, MOST_WAITS).map(({ device, wait: [begin, end] }) => {
    const inside = device.compute.find((span) => span[0] <= begin && end <= span[1]);
    const next = device.compute.find((span) => span[0] >= begin);
    const block = device.blocks[(inside ?? next)?.[2] ?? -1] ?? "";
    return `${device.device} ${strings.longestWait(format.duration(end - begin), format.duration(device.offset + begin), block)}`;
  });
}

/** @param {number} time */
function timeOfDay(time) {
  return new Date(time * 1000).toLocaleTimeString();
}

/**
 * The span at a point of a lane, the topmost where several are; null where there is none.
 * @param {Lane} lane
 * @param {number} at  seconds
 * @param {number} near  seconds that a pointer may miss it by
 * @returns {Span | null}
 */
export function spanAt(lane, at, near) {
  return lane.spans.findLast((span) => span.begin - near <= at && at <= span.end + near) ?? null;
}

/**
 * A range that is `factor` times as long around the same middle, within the whole.
 * @param {Range} range
 * @param {number} factor
 * @param {number} whole
 * @returns {Range}
 */
export function zoomed({ from, to }, factor, whole) {
  const length = Math.min(whole, Math.max(whole * LEAST_RANGE, (to - from) * factor));
  return moved({ from: (from + to - length) / 2, to: (from + to + length) / 2 }, 0, whole);
}

/**
 * A range of the same length that begins `by` of its length later, within the whole.
 * @param {Range} range
 * @param {number} by
 * @param {number} whole
 * @returns {Range}
 */
export function moved({ from, to }, by, whole) {
  const length = Math.min(whole, to - from);
  const begin = Math.min(whole - length, Math.max(0, from + by * length));
  return { from: begin, to: begin + length };
}

/**
 * Times of an axis in one unit, with as many digits as tell them apart.
 * @param {readonly number[]} times  seconds, at equal distances
 */
export function tickTexts(times) {
  const [unit, size] = Math.max(...times, 0) < 1 ? ["ms", 1e-3] : ["s", 1];
  const step = times.length > 1 ? (times[1] - times[0]) / size : 1;
  const digits = Math.max(0, Math.ceil(-Math.log10(step) - 1e-9));
  return times.map((time) => `${(time / size).toFixed(digits)} ${unit}`);
}

/**
 * Round times for an axis: at most `count` of them in a range.
 * @param {Range} range
 * @param {number} count
 */
export function ticks({ from, to }, count) {
  const rough = (to - from) / Math.max(1, count);
  if (!(rough > 0)) return [];
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * ([1, 2, 5, 10].find((factor) => factor * power >= rough) ?? 10);
  const first = Math.ceil(from / step);
  const found = [];
  for (let number = first; number * step <= to; number++) found.push(number * step);
  return found;
}
