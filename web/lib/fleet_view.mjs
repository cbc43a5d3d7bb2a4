/**
 * What the card of a fleet shows, as plain values.
 */

import * as format from "./format.mjs";

/** @import { Fleet, Worker } from "./status.mjs" */
/** @import { Strings } from "./strings.mjs" */
/** @import { Tone } from "./view.mjs" */

// With more workers those that are free are folded away until somebody asks for them.
const MOST_OPEN = 4;

/**
 * @typedef {{key: string, name: string, host: string, tone: Tone, state: string, reason: string,
 *   detail: string}} WorkerView
 * @typedef {{summary: string, workers: WorkerView[], idle: WorkerView[], idleText: string}} FleetView
 */

/** @type {Record<string, Tone>} */
const TONES = { running: "active", free: "neutral", starting: "neutral", restarting: "warning", failed: "error" };

/**
 * @param {Fleet} fleet
 * @param {number} time  of the server, when it said this
 * @param {Strings} strings
 * @returns {FleetView}
 */
export function fleetView({ waiting, reruns, workers }, time, strings) {
  const several = new Set(workers.flatMap(({ host }) => host ?? [])).size > 1;
  const aside = workers.length > MOST_OPEN ? workers.filter(({ state }) => state === "free") : [];
  const idle = aside.length > 1 ? aside : [];
  const view = (/** @type {Worker} */ worker) => workerView(worker, time, several, strings);
  return {
    summary: [strings.fleetWaiting(waiting), reruns > 0 ? strings.fleetReruns(reruns) : ""].filter(Boolean).join(" · "),
    workers: workers.filter((worker) => !idle.includes(worker)).map(view),
    idle: idle.map(view),
    idleText: strings.fleetIdle(idle.length),
  };
}

/**
 * Whether a worker runs a prompt on this device, which is called after it.
 * @param {string} device
 * @param {Fleet | undefined} fleet
 */
export function isRunning(device, fleet) {
  return (fleet?.workers ?? []).some(({ name, state }) => state === "running" && device.split(".")[0] === name);
}

/**
 * What is to be read out of a fleet: the workers that do not work.
 * @param {FleetView | null} fleet
 */
export function spokenWorkers(fleet) {
  const broken = (fleet?.workers ?? []).filter(({ tone }) => tone === "warning" || tone === "error");
  return broken.map(({ name, state }) => `${name}: ${state}`);
}

/**
 * @param {Worker} worker
 * @param {number} time
 * @param {boolean} several
 * @param {Strings} strings
 * @returns {WorkerView}
 */
function workerView({ name, host, state, reason, since, done, changes, loaded }, time, several, strings) {
  return {
    key: name,
    name,
    host: several ? host ?? "" : "",
    tone: TONES[state] ?? "neutral",
    state: stateText(state, since, time, strings),
    reason: reason && strings.fromServer(reason),
    detail: [strings.fleetDone(done), strings.fleetChanges(changes), loaded.join(", ") || strings.fleetNothingLoaded].join(" · "),
  };
}

/**
 * @param {string} state
 * @param {number | null} since
 * @param {number} time
 * @param {Strings} strings
 */
function stateText(state, since, time, strings) {
  // Times of the server alone: the clock of the page may be another one.
  if (state === "running") return strings.workerRunning(format.isKnown(since) ? format.timeLeft(time - since) : "");
  if (state === "free") return strings.workerFree;
  if (state === "starting") return strings.workerStarting;
  if (state === "restarting") return strings.workerRestarting;
  return state === "failed" ? strings.workerFailed : state;
}
