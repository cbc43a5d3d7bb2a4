/**
 * What models of the open workflow will do before they run: asked of the server once for each, and as views.
 */

import * as format from "./format.mjs";
import { isThere } from "./model_view.mjs";
import { pcie } from "./why.mjs";

/** @import { Meter, Segment } from "./device_view.mjs" */
/** @import { FeedState, Server } from "./feed.mjs" */
/** @import { GraphModel } from "./graph_models.mjs" */
/** @import { Strings } from "./strings.mjs" */
/** @import { NodeView } from "./view.mjs" */

export const ESTIMATE_ROUTE = "/weightstream/v1/estimate";
// Sizes that differ by less are told as one.
const LIKE = 0.9;

/**
 * @typedef {{name: string, loaded: boolean, device: string, device_name: string, limit: number | null, link: string, rate: number,
 *   rate_source: "measured" | "link" | "assumed", file_bytes: number, missing_bytes: number, ram_available: number, blocks: number,
 *   model_bytes: number, vram: number, reserve: number, ram: number, fits: boolean, least_vram: number, stays: number,
 *   streamed_bytes: number, streamed_blocks: number, pinnable: number | null, from_file: number, from_disk: boolean,
 *   bus_seconds: number, packed_bus_seconds: number | null, compute_seconds: number | null, step_seconds: number | null,
 *   packed_step_seconds: number | null}} Estimate  of nodes/page/estimating.py
 * @typedef {{model: GraphModel, estimate: Estimate | null, error: string}} Known  error: why there is no estimate
 * @typedef {{of(models: readonly GraphModel[], moment: string): Known[]}} Estimates
 * @typedef {{key: string, label: string, text: string}} Fact
 * @typedef {{key: string, name: string, node: NodeView | null, tone: "" | "warning" | "error", headline: string, note: string,
 *   bar: {meter: Meter, segments: Segment[]} | null, facts: Fact[], todo: string}} EstimateView
 */

/**
 * @param {Server} server
 * @param {() => void} changed  something was answered
 * @returns {Estimates}
 */
export function watchEstimates(server, changed) {
  /** @type {Map<string, {moment: string, known: {estimate: Estimate | null, error: string} | null}>} */
  const asked = new Map();

  /** @param {string} query */
  async function ask(query) {
    const entry = asked.get(query);
    const known = await answerOf(server, query);
    // It may not be wanted any more, or be asked for anew.
    if (entry === undefined || asked.get(query) !== entry) return;
    entry.known = known;
    changed();
  }

  return {
    /** What is known of `models`. Those that are new are asked for, and all when the `moment` is another. */
    of(models, moment) {
      const queries = models.map(queryOf);
      for (const query of [...asked.keys()]) if (!queries.includes(query)) asked.delete(query);
      return models.flatMap((model, place) => {
        const query = queries[place];
        const before = asked.get(query);
        if (before?.moment !== moment) {
          asked.set(query, { moment, known: before?.known ?? null });
          void ask(query);
        }
        const known = asked.get(query)?.known;
        return known ? [{ model, ...known }] : [];
      });
    },
  };
}

/** @param {GraphModel} model */
function queryOf({ name, folder, weightDtype, limit }) {
  const query = new URLSearchParams({ name, weight_dtype: weightDtype });
  if (folder) query.set("folder", folder);
  if (limit > 0) query.set("vram_limit_gb", String(limit));
  return query.toString();
}

/**
 * @param {Server} server
 * @param {string} query
 * @returns {Promise<{estimate: Estimate | null, error: string} | null>}  null where nothing is to be said
 */
async function answerOf(server, query) {
  try {
    const answer = await server.fetchApi(`${ESTIMATE_ROUTE}?${query}`);
    const body = await answer.json();
    if (answer.ok) return { estimate: body, error: "" };
    return body.error ? { estimate: null, error: String(body.error) } : null;
  } catch {
    // No connection, which the panel says, or a server that is older than this page and has no such route.
    return null;
  }
}

/**
 * What the panel asks for: nothing of models that have a card of their own, or where nothing can stream.
 * @param {FeedState} feed
 * @param {Estimates} estimates
 * @param {() => GraphModel[]} models
 * @returns {Known[]}
 */
export function estimatesOf({ link, status, progress }, estimates, models) {
  if (link !== "live" || !status?.devices.length) return [];
  const loaded = new Set(status.models.filter(isThere).map((model) => model.name));
  // What ComfyUI loads itself is in no status: a run that begins or ends may have changed it.
  const moment = progress ? "running" : "waiting";
  return estimates.of(models().filter(({ name }) => !loaded.has(name)), moment);
}

/**
 * @param {readonly Known[]} known
 * @param {Strings} strings
 * @param {(id: string) => NodeView | null} node
 * @returns {EstimateView[]}
 */
export function estimateViews(known, strings, node) {
  return known.filter(({ estimate }) => !estimate?.loaded).map(({ model, estimate, error }) => ({
    key: `${model.folder}/${model.name}`,
    name: model.name,
    node: node(model.node),
    ...(estimate ? estimateView(estimate, model, strings) : failedView(error, strings)),
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
 */
function estimateView(estimate, model, strings) {
  const streams = estimate.fits && estimate.streamed_bytes > 0;
  const [tone, todo] = adviceOf(estimate, strings);
  return {
    tone,
    todo,
    headline: headlineOf(estimate, strings),
    note: streams && !model.streams ? strings.estimateTheirs : "",
    bar: estimate.fits ? barOf(estimate, strings) : null,
    facts: [
      { key: "file", label: strings.estimateFile, text: fileText(estimate, strings) },
      { key: "vram", label: strings.estimateVram, text: vramText(estimate, strings) },
      ...(streams ? streamFacts(estimate, strings) : []),
    ],
  };
}

/**
 * @param {Estimate} estimate
 * @param {Strings} strings
 */
function headlineOf(estimate, strings) {
  if (!estimate.fits) return strings.estimateTooLittle(format.bytes(estimate.least_vram));
  if (estimate.streamed_bytes === 0) return strings.estimateAll(format.bytes(estimate.stays));
  const streamed = format.bytes(estimate.streamed_bytes);
  if (estimate.step_seconds === null) return strings.estimateBus(streamed, format.roughly(estimate.bus_seconds));
  return strings.estimateStep(streamed, format.roughly(estimate.step_seconds));
}

/**
 * The one thing to do where something is not there, and how bad that is.
 * @param {Estimate} estimate
 * @param {Strings} strings
 * @returns {[tone: "" | "warning" | "error", todo: string]}
 */
function adviceOf(estimate, strings) {
  const { missing_bytes: missing, fits, limit, from_file: file, from_disk: disk, streamed_bytes: streamed, ram_available: ram } = estimate;
  if (missing > 0) return ["error", strings.estimateDoMissing(format.bytes(missing))];
  if (!fits) return ["error", limit === null ? strings.estimateDoVram : strings.estimateDoLimit];
  if (disk) return ["warning", strings.estimateDoDisk];
  if (file > 0) return ["warning", strings.estimateDoFile(format.bytes(file))];
  return streamed > ram ? ["warning", strings.estimateDoRam(format.bytes(ram))] : ["", ""];
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
  return fits ? strings.and(strings.estimateStays(format.bytes(stays)), room) : room;
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
function stepText({ step_seconds: step, packed_step_seconds: packed, compute_seconds: compute }, strings) {
  if (step === null) return strings.estimateUnknown;
  const text = strings.estimatePredicted(format.roughly(step), format.roughly(compute));
  return packed === null ? text : strings.estimatePacked(text, format.roughly(packed));
}
