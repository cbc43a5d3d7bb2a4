/**
 * Numbers as people read them. Sizes have the units in which limits are set, rates those in which buses are rated, as in
 * the server's own sentences; what is not known is a dash.
 */

export const DASH = "–";

/** @type {[unit: string, size: number][]} */
const SIZES = [
  ["TiB", 2 ** 40],
  ["GiB", 2 ** 30],
  ["MiB", 2 ** 20],
  ["KiB", 2 ** 10],
];

/** @type {[unit: string, size: number][]} */
const RATES = [
  ["TB/s", 1e12],
  ["GB/s", 1e9],
  ["MB/s", 1e6],
  ["KB/s", 1e3],
];

/**
 * Whether `value` is a number that can be computed with.
 * @param {unknown} value
 * @returns {value is number}
 */
export function isKnown(value) {
  return typeof value === "number" && Number.isFinite(value);
}

/**
 * `22.2 GiB`, `512 MiB`, `0 B`.
 * @param {number | null | undefined} value
 */
export function bytes(value) {
  if (!isKnown(value)) return DASH;
  const [unit, size] = unitOf(value, SIZES, "B");
  return `${digits(value / size, unit)} ${unit}`;
}

/**
 * `20.1 / 24.0 GiB`: both in the unit of the whole, so that they compare at a glance.
 * @param {number | null | undefined} part
 * @param {number | null | undefined} whole
 */
export function bytesOf(part, whole) {
  if (!isKnown(whole)) return isKnown(part) ? bytes(part) : DASH;
  const [unit, size] = unitOf(whole, SIZES, "B");
  return `${isKnown(part) ? digits(part / size, unit) : DASH} / ${digits(whole / size, unit)} ${unit}`;
}

/**
 * `25.1 GB/s`.
 * @param {number | null | undefined} value
 */
export function rate(value) {
  if (!isKnown(value)) return DASH;
  const [unit, size] = unitOf(value, RATES, "B/s");
  return `${digits(value / size, unit)} ${unit}`;
}

/**
 * `3 %` of a fraction; never 0 % of something, nor 100 % of less than all.
 * @param {number | null | undefined} fraction
 */
export function percent(fraction) {
  if (!isKnown(fraction)) return DASH;
  if (fraction > 0 && fraction < 0.01) return "<1 %";
  if (fraction < 1 && fraction > 0.99) return ">99 %";
  return `${Math.round(fraction * 100)} %`;
}

/**
 * `0.324 s`, `12.5 s`.
 * @param {number | null | undefined} value
 */
export function seconds(value) {
  if (!isKnown(value)) return DASH;
  return `${value >= 10 ? value.toFixed(1) : value.toFixed(3)} s`;
}

/**
 * `0.32 s`, `12 s`: as much as one reads at a glance.
 * @param {number | null | undefined} value
 */
export function roughly(value) {
  if (!isKnown(value)) return DASH;
  return `${value >= 10 ? value.toFixed(0) : Number(value.toPrecision(2))} s`;
}

/**
 * `0.42 ms`.
 * @param {number | null | undefined} value
 */
export function milliseconds(value) {
  if (!isKnown(value)) return DASH;
  return `${value >= 10 ? value.toFixed(0) : value.toFixed(2)} ms`;
}

/**
 * A part of a whole between 0 and 1; null where either is not known, 0 of nothing.
 * @param {number | null | undefined} part
 * @param {number | null | undefined} whole
 * @returns {number | null}
 */
export function fraction(part, whole) {
  if (!isKnown(part) || !isKnown(whole)) return null;
  if (whole <= 0) return 0;
  return Math.min(1, Math.max(0, part / whole));
}

/**
 * @param {number} value
 * @param {[unit: string, size: number][]} units  the largest first
 * @param {string} smallest
 * @returns {[unit: string, size: number]}
 */
function unitOf(value, units, smallest) {
  // 1023.95 MiB would be shown as 1024 MiB.
  return units.find(([, size]) => Math.abs(value) >= size * 0.9995) ?? [smallest, 1];
}

/**
 * @param {number} value
 * @param {string} unit
 */
function digits(value, unit) {
  const places = unit === "B" || unit === "B/s" || Math.abs(value) >= 99.95 ? 0 : 1;
  const text = value.toFixed(places);
  return text === "-0" || text === "-0.0" ? text.slice(1) : text;
}

/**
 * A time that may be short: `5.2 ms`, `0.324 s`.
 * @param {number | null | undefined} value  seconds
 */
export function duration(value) {
  if (!isKnown(value)) return DASH;
  return value < 0.1 ? `${(value * 1000).toFixed(value < 0.01 ? 2 : 1)} ms` : seconds(value);
}

/**
 * A time that is an estimate: `5.23 ms`, `0.32 s`, `1.71 s`.
 * @param {number} value  seconds
 */
export function estimated(value) {
  const [number, unit] = value < 0.1 ? [value * 1000, "ms"] : [value, "s"];
  return `${Number(number.toPrecision(3))} ${unit}`;
}

/**
 * `4:05`, `1:02:03`, `42 s`: what is left of a run.
 * @param {number} value  seconds
 */
export function timeLeft(value) {
  const whole = Math.max(0, Math.round(value));
  const [hours, minutes, rest] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
  const two = (/** @type {number} */ number) => String(number).padStart(2, "0");
  if (hours > 0) return `${hours}:${two(minutes)}:${two(rest)}`;
  return minutes > 0 ? `${minutes}:${two(rest)}` : `${rest} s`;
}
