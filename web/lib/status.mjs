/**
 * What the server sends: its status, and the event that renews the quickly changing part of it.
 *
 * @typedef {{device: string, name: string, virtual: boolean, total: number | null, free: number | null,
 *   resident: number, staging: number, torch: number | null, cache: number | null, other: number | null,
 *   peak: number | null, copy_rate: number | null, stalled: number | null, link?: Link, card?: Link}} Device
 *   link is as it was while a model ran, card the best that the card can do
 * @typedef {{generation: number | null, width: number | null}} Link
 * @typedef {{ram_total: number | null, ram_available: number | null, pinned: number | null,
 *   pinned_limit: number | null}} Host
 * @typedef {{done: number, total: number, rate: number | null}} Loading
 * @typedef {{steps: number, reruns: number, bytes: number, rate: number | null, stall_ms_per_block: number | null,
 *   misses: number, corrupted: number, step_seconds: number | null, waiting?: number | null}} Run  rate and step_seconds are
 *   means of the run, waiting is the part of it for which compute waited
 * @typedef {"unloaded" | "resident" | "pinned" | "staged" | "synchronous"} Ladder
 * @typedef {{id: string, name: string, device: string, node_id: string | null, ladder: Ladder, reason: string,
 *   plan: string, settings?: Record<string, unknown>, running: boolean, loading: Loading | null, last_run: Run | null, pinned_bytes?: number | null,
 *   resident_bytes?: number, rest_bytes?: number, streamed_block_bytes?: number, streamed_weight_bytes?: number,
 *   limited_by?: "bus" | "compute" | "", locking?: boolean,
 *   parallel?: {devices: string[], alone: string} | null}} Model
 *   one for each model and device; the parts of one model have the same id. last_run is of the last one that ended.
 *   Those of one that works in parallel have all of it each; alone says why one works without the others.
 *   streamed_block_bytes are sent in a step; streamed_weight_bytes are those of the weights, more where some are packed
 * @typedef {{node_id: string | null, name: string, kind: "inactive" | "fallback" | "failed" | "refused", text: string}} Notice
 *   refused: the page has it from the host, and not from our server
 * @typedef {{schema: number, time: number, devices: Device[], host: Host, models: Model[], notices: Notice[],
 *   version?: string, environment?: Record<string, string>, comfyui?: {version: string, broken: string[]},
 *   why_no_devices?: string | null, causes?: import("./why.mjs").Cause[], fleet?: Fleet}} Status
 *   comfyui.broken says what of ComfyUI is not as the pack knows it; nothing streams then, and notices say so
 * @typedef {{schema: number, time: number, revision: string, devices: unknown[][], host: (number | null)[],
 *   loading: [string, number, number, number | null][], running: string[],
 *   fleet?: {waiting: number, reruns: number, workers: unknown[][]}}} Event
 * @typedef {{name: string, host: string | null, state: string, reason: string, since: number | null, done: number,
 *   changes: number, loaded: string[]}} Worker  state: starting, free, running, restarting or failed; since: when its prompt
 *   began, by the server's clock
 * @typedef {{waiting: number, reruns: number, workers: Worker[]}} Fleet  of a ComfyUI with others behind it, whose devices these
 *   are; waiting: prompts, reruns: prompts that ran again because a worker died
 */

export const SCHEMA = 1;

const DEVICE_FIELDS = /** @type {const} */ ([
  "device", "total", "free", "resident", "staging", "torch", "cache", "other", "peak", "copy_rate", "stalled",
]);
const WORKER_FIELDS = /** @type {const} */ (["name", "state", "reason", "since", "done", "changes"]);
const HOST_FIELDS = /** @type {const} */ (["ram_total", "ram_available", "pinned", "pinned_limit"]);
// An event names no more than these; of models behind them it says nothing.
const MOST_LOADING = 4;
const MOST_RUNNING = 16;
/** @type {Host} */
const NO_HOST = { ram_total: null, ram_available: null, pinned: null, pinned_limit: null };

/**
 * The status with what a newer event says; null before either has come.
 * @param {Status | null} status
 * @param {Event | null} event
 * @returns {Status | null}
 */
export function merge(status, event) {
  if (event === null || (status !== null && event.time < status.time)) return status;
  const known = new Map((status?.devices ?? []).map((device) => [device.device, device]));
  const devices = event.devices.map((row) => {
    const sample = named(DEVICE_FIELDS, row);
    return { name: "", virtual: false, ...known.get(sample.device), ...sample };
  });
  const loading = new Map(event.loading.map(([id]) => [id, loadingOf(id, event)]));
  return {
    schema: event.schema,
    time: event.time,
    devices: /** @type {Device[]} */ (devices),
    host: /** @type {Host} */ ({ ...NO_HOST, ...status?.host, ...named(HOST_FIELDS, event.host) }),
    models: (status?.models ?? []).map((model) => withEvent(model, event, loading)),
    notices: status?.notices ?? [],
    why_no_devices: status?.why_no_devices ?? null,
    causes: status?.causes ?? [],
    ...(event.fleet && { fleet: fleetOf(status?.fleet, event.fleet) }),
  };
}

/**
 * @param {Fleet | undefined} known
 * @param {NonNullable<Event["fleet"]>} event
 * @returns {Fleet}
 */
function fleetOf(known, { waiting, reruns, workers }) {
  const before = new Map((known?.workers ?? []).map((worker) => [worker.name, worker]));
  const rows = workers.map((row) => {
    const sample = named(WORKER_FIELDS, row);
    return { host: null, loaded: [], ...before.get(sample.name), ...sample };
  });
  return { waiting, reruns, workers: /** @type {Worker[]} */ (rows) };
}

/**
 * @param {Model} model
 * @param {Event} event
 * @param {ReadonlyMap<string, Loading | null>} loading  of whole models: the parts of one share it
 * @returns {Model}
 */
function withEvent(model, event, loading) {
  const unsaid = event.loading.length >= MOST_LOADING ? model.loading : null;
  return {
    ...model,
    running: event.running.includes(model.id) || (event.running.length >= MOST_RUNNING && model.running),
    loading: loading.get(model.id) ?? unsaid,
  };
}

/**
 * @param {string} id
 * @param {Event} event
 */
function loadingOf(id, event) {
  const rows = event.loading.filter((row) => row[0] === id);
  return totalLoading(rows.map(([, done, total, rate]) => ({ done, total, rate })));
}

/**
 * Several that load at once as one; null where none does.
 * @param {readonly Loading[]} rows
 * @returns {Loading | null}
 */
export function totalLoading(rows) {
  if (rows.length === 0) return null;
  const rates = rows.map((row) => row.rate).filter((rate) => rate !== null);
  return {
    done: rows.reduce((sum, row) => sum + row.done, 0),
    total: rows.reduce((sum, row) => sum + row.total, 0),
    rate: rates.length > 0 ? rates.reduce((sum, rate) => sum + rate, 0) : null,
  };
}

/**
 * @param {readonly string[]} names
 * @param {readonly unknown[]} values
 * @returns {Record<string, any>}
 */
function named(names, values) {
  return Object.fromEntries(names.map((name, place) => [name, values[place] ?? null]));
}
