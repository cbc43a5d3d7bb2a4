/**
 * What the page remembers of each device, and the line that it draws of it.
 */

import { fraction, isKnown } from "./format.mjs";

export const SPAN_MS = 120_000;
// Samples come once a second. A longer gap is time in which nobody looked, and no line is drawn across it.
const GAP_MS = 5_000;

/**
 * @typedef {[at: number, used: number]} Sample
 * @typedef {ReadonlyMap<string, readonly Sample[]>} History  by device, the oldest first
 */

/**
 * `history` with one more sample of each device, and without those that are too old.
 * @param {History} history
 * @param {Iterable<{device: string, total: number | null, free: number | null}>} devices
 * @param {number} now
 * @returns {History}
 */
export function remember(history, devices, now) {
  const result = new Map();
  for (const { device, total, free } of devices) {
    const kept = (history.get(device) ?? []).filter(([at]) => at <= now && now - at <= SPAN_MS);
    result.set(device, isKnown(total) && isKnown(free) ? [...kept, [now, total - free]] : kept);
  }
  return result;
}

/**
 * An SVG path of the samples, newest at the right; "" where there is nothing to draw.
 * @param {readonly Sample[]} samples
 * @param {number | null} total  what the full height stands for
 * @param {number} now
 * @param {{width: number, height: number}} box
 */
export function sparkline(samples, total, now, box) {
  if (!isKnown(total) || total <= 0) return "";
  /** @type {string[]} */
  const parts = [];
  let last = -Infinity;
  for (const [at, used] of samples) {
    if (now - at > SPAN_MS) continue;
    const x = round(box.width * (1 - (now - at) / SPAN_MS));
    const y = round(box.height * (1 - (fraction(used, total) ?? 0)));
    parts.push(`${at - last > GAP_MS ? "M" : "L"}${x} ${y}`);
    last = at;
  }
  return parts.length > 1 ? parts.join("") : "";
}

/** @param {number} value */
function round(value) {
  return Math.round(value * 10) / 10;
}
