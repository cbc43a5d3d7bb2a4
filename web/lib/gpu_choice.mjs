/**
 * The text of `devices`: which GPUs it names, what a choice makes of it, and what the picker shows. Without elements.
 *
 * The server reads the text (streaming/machine/device_names.py); what is read here alike is held to it by tests.
 */

import { deviceView } from "./device_view.mjs";
import * as format from "./format.mjs";
import { merge } from "./status.mjs";

/** @import { FeedState } from "./feed.mjs" */
/** @import { Strings } from "./strings.mjs" */

// What may stand around the parts of a name: white space as browsers have it, and as Python does, which is not the same.
const SPACE = /[\s\x1c-\x1f\x85]/;
const GPU = new RegExp(`^(?:(?:gpu|cuda)${SPACE.source}*:${SPACE.source}*)?([0-9]{1,4})$`, "i");

/**
 * @typedef {{key: string, place: number, detail: string, amount: string, missing: boolean, raise: string}} Row  place
 *   is 0 of what is not chosen; raise names the button that puts it one place forward, "" where there is none
 * @typedef {{names: string[] | null, rows: Row[], choosable: boolean, text: string, warning: boolean}} Choice  names is
 *   null where the text cannot be read; text stands on the node, and is all there is where nothing can be chosen
 */

/**
 * The GPUs that a text names, in its order; none stands for the default.
 * @param {unknown} text
 * @returns {string[] | null} null for a text that the server refuses
 */
export function readGpus(text) {
  const whole = trimmed(String(text ?? ""));
  if (whole === "" || whole.toLowerCase() === "default") return [];
  const names = whole.split(",").map((part) => {
    const match = GPU.exec(trimmed(part));
    return match && `gpu:${Number(match[1])}`;
  });
  if (names.includes(null) || new Set(names).size < names.length) return null;
  return /** @type {string[]} */ (names);
}

/** @param {string} text */
function trimmed(text) {
  let [start, end] = [0, text.length];
  while (start < end && SPACE.test(text[start])) start += 1;
  while (end > start && SPACE.test(text[end - 1])) end -= 1;
  return text.slice(start, end);
}

/** @param {readonly string[]} names */
export const writeGpus = (names) => names.join(",");

/**
 * A GPU that is not chosen becomes the last one, and one that is chosen is no more.
 * @param {readonly string[] | null} names
 * @param {string} name
 */
export function toggled(names, name) {
  const others = (names ?? []).filter((each) => each !== name);
  return names?.includes(name) ? others : [...others, name];
}

/**
 * @param {readonly string[] | null} names
 * @param {string} name  one of them
 */
export function earlier(names, name) {
  const result = [...(names ?? [])];
  const place = result.indexOf(name);
  if (place > 0) result.splice(place - 1, 2, name, result[place - 1]);
  return result;
}

/**
 * @param {unknown} text  of `devices`
 * @param {boolean} linked  whether another node gives it
 * @param {FeedState} feed
 * @param {Strings} strings
 * @returns {Choice}
 */
export function gpuChoice(text, linked, feed, strings) {
  const names = readGpus(text);
  const status = merge(feed.status, feed.event);
  const row = (/** @type {string} */ key, /** @type {Pick<Row, "detail" | "amount" | "missing">} */ rest) => {
    const place = (names?.indexOf(key) ?? -1) + 1;
    return { key, place, ...rest, raise: place > 1 ? strings.pickEarlier(key) : "" };
  };
  const here = (status?.devices ?? []).map((device) => {
    const { key, detail, amount } = deviceView(device, feed, strings, false);
    return row(key, { detail, amount, missing: false });
  });
  const missing = (names ?? []).filter((name) => !here.some((each) => each.key === name));
  const rows = [...here, ...missing.map((key) => row(key, { detail: strings.pickNotHere, amount: "", missing: true }))];
  const said = (/** @type {string} */ line, choosable = false, warning = false) => ({ names, rows, choosable, text: line, warning });
  if (linked) return said(strings.pickLinked);
  if (status === null || feed.status === null) return said(whyUnknown(feed, strings));
  if (here.length === 0) return said(strings.noDevices(strings.fromServer(status.why_no_devices ?? "")));
  if (names === null) return said(strings.pickUnreadable, true, true);
  if (missing.length > 0) return said(strings.pickMissing(missing.join(", ")), true, true);
  if (here.length > 1) return said(names.join(", ") || strings.pickDefault, true);
  const [{ key, detail }] = here;
  return said(strings.pickOnly(inOne([key, detail, format.bytes(status.devices[0].total)], strings)));
}

/**
 * @param {string[]} parts
 * @param {Strings} strings
 */
const inOne = (parts, strings) => parts.filter(Boolean).reduce((one, other) => strings.and(one, other));

/**
 * @param {FeedState} feed
 * @param {Strings} strings
 */
function whyUnknown({ link }, strings) {
  if (link === "missing") return strings.missingText;
  if (link === "newer") return strings.newerText;
  return link === "gone" ? strings.goneText : strings.startingText;
}
