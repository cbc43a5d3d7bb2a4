/**
 * What is in effect for a node's model, in one line. The server sends values; the sentence is made here.
 */

import * as format from "./format.mjs";

/** @import { Strings } from "./strings.mjs" */

/**
 * @typedef {{node: string, devices: string[], seconds: number | null, waiting: number | null, more_bytes: number,
 *   more_seconds: number, more_device: string, kept_bytes: number, total_bytes: number, staged_bytes: number,
 *   synchronous: boolean, text: string, details: string[], parallel?: boolean}} Line  as streaming/line.py makes it
 */

/**
 * @param {Line} line
 * @param {Strings} strings
 */
export function lineText(line, strings) {
  if (line.devices.length === 0) return strings.unloaded;
  const step = format.isKnown(line.seconds) ? strings.lineStep(format.roughly(line.seconds)) : "";
  const where = line.devices.length > 1 ? devices(line, strings) : "";
  return [step, ...bus(line, strings), where].filter(Boolean).join(" · ");
}

/**
 * @param {Line} line
 * @param {Strings} strings
 */
function devices(line, strings) {
  return line.parallel ? strings.parallel(line.devices) : line.devices.join(", ");
}

/**
 * What streams, and what that costs.
 * @param {Line} line
 * @param {Strings} strings
 */
function bus(line, strings) {
  if (line.kept_bytes === line.total_bytes) return [strings.lineAll(format.bytes(line.total_bytes))];
  const more = [
    line.staged_bytes ? strings.lineStaged(format.bytes(line.staged_bytes)) : "",
    line.synchronous ? strings.ladderSynchronous : "",
  ];
  if (!format.isKnown(line.seconds)) return [strings.stay(format.bytes(line.kept_bytes), format.bytes(line.total_bytes)), ...more];
  if (!format.isKnown(line.waiting)) return [strings.lineNoWaiting, ...more];
  return [strings.lineWaiting(format.percent(line.waiting)), gain(line, strings), ...more];
}

/**
 * @param {Line} line
 * @param {Strings} strings
 */
function gain(line, strings) {
  if (!line.more_bytes) return "";
  const where = line.devices.length > 1 ? line.more_device : "";
  return strings.lineMore(format.bytes(line.more_bytes), where, format.roughly(line.more_seconds));
}
