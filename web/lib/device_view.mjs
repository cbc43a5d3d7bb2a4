/**
 * What a device's row shows, as plain values.
 */

import * as format from "./format.mjs";
import { sparkline } from "./history.mjs";

/** @import { FeedState } from "./feed.mjs" */
/** @import { Device } from "./status.mjs" */
/** @import { Strings } from "./strings.mjs" */

// Of what streamed models give up at once, their resident weights, and of torch's cache a device is full on purpose.
export const NEAR_LIMIT = 0.9;
export const SPARK = { width: 60, height: 14 };

/** The parts of a device's bar, from the left. */
export const PARTS = /** @type {const} */ (["resident", "staging", "torch", "cache", "other"]);
/** A device's figures; each has a text of its name, and a longer one. */
export const FIGURES = /** @type {const} */ ([...PARTS, "free", "peak"]);

/**
 * @typedef {typeof PARTS[number] | "free"} Part
 * @typedef {{key: Part | "peak", label: string, long: string, value: string}} Figure
 * @typedef {{key: Part, start: number, size: number}} Segment  fractions of the whole bar
 * @typedef {{now: number | null, max: number, text: string, label: string}} Meter
 * @typedef {{key: string, title: string, detail: string, amount: string, meter: Meter, segments: Segment[],
 *   peak: number | null, warning: string, copy: string, stall: string, spark: string, figures: Figure[],
 *   open: boolean}} DeviceView
 */

/**
 * @param {Device} device
 * @param {FeedState} feed
 * @param {Strings} strings
 * @param {boolean} open
 * @returns {DeviceView}
 */
export function deviceView(device, feed, strings, open) {
  const { total, free } = device;
  const used = format.isKnown(total) && format.isKnown(free) ? Math.max(0, total - free) : null;
  const detail = device.name || (device.virtual ? strings.virtual : "");
  const near = (format.fraction(keptBytes(device), total) ?? 0) >= NEAR_LIMIT;
  const figures = FIGURES.map((key) => ({
    key,
    label: strings[key],
    long: strings[`${key}Long`],
    value: format.bytes(device[key]),
  }));
  const text = [
    used === null ? strings.unknown : strings.used(format.bytes(used), format.bytes(total)),
    near ? strings.nearlyFullLong : "",
    ...figures.filter(({ key }) => key !== "free").map(({ label, value }) => `${label} ${value === format.DASH ? strings.unknown : value}`),
  ];
  return {
    key: device.device,
    title: device.device,
    detail,
    amount: format.bytesOf(used, total),
    meter: meter(used, total, text.filter(Boolean).join("; "), [device.device, detail].filter(Boolean).join(", ")),
    segments: segmentsOf(device),
    peak: format.fraction(device.peak, total),
    warning: near ? strings.nearlyFull : "",
    copy: format.rate(device.copy_rate),
    stall: format.percent(device.stalled),
    spark: sparkline(feed.history.get(device.device) ?? [], total, feed.now, SPARK),
    figures,
    open,
  };
}

/**
 * Nothing streams to it.
 * @param {Device} device
 */
export function isIdle({ resident, staging, copy_rate: rate }) {
  return resident + staging === 0 && !rate;
}

/**
 * What nobody gives up to a model that needs it: slots, activations, other models and programs.
 * @param {Device} device
 */
function keptBytes({ total, free, resident, cache }) {
  return format.isKnown(total) && format.isKnown(free) && format.isKnown(cache) ? total - free - resident - cache : null;
}

/**
 * The parts of the bar, from the left. Parts that come to more than there is, which samples of different moments do, are
 * shown in proportion.
 * @param {Device} device
 * @returns {Segment[]}
 */
function segmentsOf(device) {
  const sizes = PARTS.map((key) => Math.max(0, device[key] ?? 0));
  const sum = sizes.reduce((total, size) => total + size, 0);
  const whole = Math.max(device.total ?? 0, sum);
  if (!format.isKnown(device.total) || whole <= 0) return PARTS.map((key) => ({ key, start: 0, size: 0 }));
  let start = 0;
  return PARTS.map((key, place) => {
    const size = sizes[place] / whole;
    start += size;
    return { key, start: start - size, size };
  });
}

/**
 * @param {number | null} now
 * @param {number | null} max
 * @param {string} text
 * @param {string} label
 * @returns {Meter}
 */
export function meter(now, max, text, label) {
  const known = format.isKnown(now) && format.isKnown(max) && max > 0;
  return { now: known ? Math.min(now, max) : null, max: known ? max : 0, text, label };
}
