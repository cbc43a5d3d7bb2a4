/**
 * What the cards of "Before a run" show, as plain values.
 */

import * as format from "./format.mjs";
import { OFF } from "./graph_models.mjs";
import { pcie } from "./why.mjs";

/** @import { Meter, Segment } from "./device_view.mjs" */
/** @import { Estimate, Known } from "./estimates.mjs" */
/** @import { GraphModel } from "./graph_models.mjs" */
/** @import { Strings } from "./strings.mjs" */
/** @import { NodeView } from "./view.mjs" */

// Sizes that differ by less are told as one.
const LIKE = 0.9;

/**
 * @typedef {{key: string, label: string, text: string}} Fact
 * @typedef {{key: string, name: string, node: NodeView | null, tone: "" | "warning" | "error", headline: string, note: string,
 *   bar: {meter: Meter, segments: Segment[]} | null, facts: Fact[], todo: string}} EstimateView
 */

/**
 * @param {readonly Known[]} known
 * @param {Strings} strings
 * @param {(id: string, title: string) => NodeView | null} node
 * @param {boolean} [several]  whether the server has several GPUs
 * @returns {EstimateView[]}
 */
export function estimateViews(known, strings, node, several = false) {
  return known.filter(({ estimate }) => !estimate?.loaded).map(({ model, estimate, error }) => ({
    // Two loaders may name one file.
    key: `${model.node}/${model.folder}/${model.name}`,
    name: model.name,
    node: node(model.node, model.title),
    ...(estimate ? estimateView(estimate, model, strings, several) : failedView(error, strings)),
  }));
}

/**
 * @param {string} error
 * @param {Strings} strings
 */
function failedView(error, strings) {
  return { tone: /** @type {const} */ ("error"), headline: strings.fromServer(error), note: "", bar: null, facts: [], todo: "" };
}

/**
 * @param {Estimate} estimate
 * @param {GraphModel} model
 * @param {Strings} strings
 * @param {boolean} several
 */
function estimateView(estimate, model, strings, several) {
  const streams = estimate.fits && estimate.streamed_bytes > 0;
  const [tone, todo] = adviceOf(estimate, model, strings);
  return {
    tone,
    todo,
    headline: headlineOf(estimate, strings),
    note: noteOf(estimate, model, strings, several),
    bar: estimate.fits ? barOf(estimate, strings) : null,
    facts: [
      { key: "file", label: strings.estimateFile, text: fileText(estimate, strings) },
      { key: "vram", label: strings.estimateVram, text: vramText(estimate, strings) },
      ...(streams ? streamFacts(estimate, strings) : []),
    ],
  };
}

/**
 * Where the workflow does something else than what is estimated.
 * @param {Estimate} estimate
 * @param {GraphModel} model
 * @param {Strings} strings
 * @param {boolean} several
 */
function noteOf({ fits, streamed_bytes: streamed, device }, model, strings, several) {
  if (fits && streamed === 0) return "";
  if (model.mode === OFF) return strings.estimateOff;
  if (model.placed && several) return strings.estimateAlone(device);
  return model.streams ? "" : strings.estimateTheirs;
}

/**
 * @param {Estimate} estimate
 * @param {Strings} strings
 */
function headlineOf(estimate, strings) {
  if (estimate.least_limit !== null) return strings.estimateLowLimit(format.bytes(estimate.least_limit));
  if (!estimate.fits) return strings.estimateTooLittle(format.bytes(estimate.least_vram));
  if (estimate.streamed_bytes === 0) return strings.estimateAll(format.bytes(estimate.stays));
  const streamed = format.bytes(estimate.streamed_bytes);
  if (estimate.step_seconds === null) return strings.estimateBus(streamed, format.roughly(estimate.bus_seconds));
  return strings.estimateStep(streamed, format.roughly(estimate.step_seconds));
}

/**
 * The one thing to do where something is not there, and how bad that is.
 * @param {Estimate} estimate
 * @param {GraphModel} model
 * @param {Strings} strings
 * @returns {[tone: "" | "warning" | "error", todo: string]}
 */
function adviceOf(estimate, model, strings) {
  const { missing_bytes: missing, fits, least_limit: least, from_file: file, from_disk: disk, streamed_bytes: streamed, ram_available: ram } = estimate;
  if (missing > 0) return ["error", strings.estimateDoMissing(format.bytes(missing))];
  if (!fits) return ["error", least === null ? strings.estimateDoVram : strings.estimateDoLimit(model.limitBySettings)];
  if (disk) return ["warning", strings.estimateDoDisk];
  if (file > 0 && estimate.pinnable === estimate.pinned_limit) return ["warning", pinningAdvice(estimate, model, strings)];
  if (file > 0) return ["warning", strings.estimateDoFile(format.bytes(file))];
  return streamed > ram ? ["warning", strings.estimateDoRam(format.bytes(ram))] : ["", ""];
}

/**
 * What to do where somebody has set how much may be page-locked.
 * @param {Estimate} estimate
 * @param {GraphModel} model
 * @param {Strings} strings
 */
function pinningAdvice({ from_file: file, pinned_limit: limit }, { pinMemory }, strings) {
  if (pinMemory === OFF) return strings.estimateDoPin(format.bytes(file));
  return limit === 0 ? strings.estimateDoPinHost(format.bytes(file)) : strings.estimateDoPinMore(format.bytes(file));
}

/**
 * The model as what stays and what streams, in the colours of all bars.
 * @param {Estimate} estimate
 * @param {Strings} strings
 */
function barOf({ stays, streamed_bytes: streamed, model_bytes: all }, strings) {
  const part = format.fraction(stays, all) ?? 0;
  const text = strings.stay(format.bytes(stays), format.bytes(all));
  return {
    meter: { now: stays, max: all, text, label: strings.estimateBar },
    segments: [
      { key: /** @type {const} */ ("resident"), start: 0, size: part },
      { key: /** @type {const} */ ("staging"), start: part, size: format.fraction(streamed, all) ?? 0 },
    ],
  };
}

/**
 * @param {Estimate} estimate
 * @param {Strings} strings
 */
function fileText({ file_bytes: file, model_bytes: loaded }, strings) {
  return loaded < LIKE * file ? strings.estimateSmaller(format.bytes(file), format.bytes(loaded)) : format.bytes(file);
}

/**
 * @param {Estimate} estimate
 * @param {Strings} strings
 */
function vramText({ fits, stays, device, vram, reserve, limit }, strings) {
  const room = limit === null
    ? strings.estimateRoom({ device, vram: format.bytes(vram), reserve: format.bytes(reserve) })
    : strings.estimateLimit({ device, vram: format.bytes(vram), limit: format.bytes(limit) });
  return fits ? strings.estimateStays(format.bytes(stays), room) : room;
}

/**
 * @param {Estimate} estimate
 * @param {Strings} strings
 * @returns {Fact[]}
 */
function streamFacts(estimate, strings) {
  const { streamed_blocks: streamed, blocks, pinnable, ram, from_file: file } = estimate;
  const bytes = format.bytes(estimate.streamed_bytes);
  const packed = estimate.packed_bus_seconds;
  const rate = format.rate(estimate.rate);
  const source = { measured: strings.estimateMeasured, link: pcie(estimate.link), assumed: strings.estimateAssumed }[estimate.rate_source];
  const bus = strings.estimateOnBus({ seconds: format.roughly(estimate.bus_seconds), rate, source });
  return [
    { key: "streams", label: strings.estimateStreams, text: strings.estimateEach({ bytes, streamed, blocks }) },
    { key: "bus", label: strings.estimateBusLabel, text: packed === null ? bus : strings.estimatePacked(bus, format.roughly(packed)) },
    { key: "step", label: strings.secondsPerStep, text: stepText(estimate, strings) },
    {
      key: "ram",
      label: strings.ram,
      text: strings.estimateRam({ bytes, ram: format.bytes(ram), most: format.bytes(pinnable), file: file > 0 ? format.bytes(file) : "" }),
    },
  ];
}

/**
 * @param {Estimate} estimate
 * @param {Strings} strings
 */
function stepText({ step_seconds: step, packed_step_seconds: packed, compute_seconds: compute, bus_seconds: bus, overlaps }, strings) {
  if (step === null) return (overlaps ? strings.estimateUnknown : strings.estimateWaits)(format.roughly(bus));
  const text = strings.estimatePredicted(format.roughly(step), format.roughly(compute));
  return packed === null ? text : strings.estimatePacked(text, format.roughly(packed));
}
