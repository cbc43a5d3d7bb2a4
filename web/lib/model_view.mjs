/**
 * What a model's card shows, as plain values. The parts of a model that is split over devices share one card.
 */

import * as format from "./format.mjs";
import { totalLoading } from "./status.mjs";

/** @import { Ladder, Model, Run } from "./status.mjs" */
/** @import { Strings } from "./strings.mjs" */

/**
 * @typedef {{key: string, device: string, step: string, ladder: Ladder, plan: string}} PartView
 * @typedef {{fill: number | null, amount: string, text: string, label: string}} LoadingView
 * @typedef {{key: string, name: string, where: string, running: boolean, parts: PartView[], loading: LoadingView | null,
 *   lastRun: string, warning: string, freeable: boolean, pinned: string, freeText: string, freeLabel: string,
 *   pinnedText: string, pinnedLabel: string}} ModelView
 */

/** @type {Record<Ladder, "unloaded" | "ladderResident" | "ladderPinned" | "ladderStaged" | "ladderSynchronous">} */
const STEPS = {
  unloaded: "unloaded",
  resident: "ladderResident",
  pinned: "ladderPinned",
  staged: "ladderStaged",
  synchronous: "ladderSynchronous",
};

/**
 * @param {readonly Model[]} models
 * @param {Strings} strings
 * @returns {ModelView[]}
 */
export function modelViews(models, strings) {
  const ids = [...new Set(models.map((model) => model.id))];
  return ids.map((id) => modelView(models.filter((model) => model.id === id), strings));
}

/**
 * @param {Model[]} parts
 * @param {Strings} strings
 * @returns {ModelView}
 */
function modelView(parts, strings) {
  const [{ id, name, node_id: node }] = parts;
  const pinned = parts.reduce((sum, part) => sum + (part.pinned_bytes ?? 0), 0);
  const size = pinned > 0 ? format.bytes(pinned) : "";
  const corrupted = parts.reduce((sum, part) => sum + (part.last_run?.corrupted ?? 0), 0);
  return {
    key: id,
    name,
    where: node === null || node === undefined ? "" : strings.node(node),
    running: parts.some((part) => part.running),
    parts: parts.map((part) => partView(part, strings)),
    loading: loadingView(parts, strings),
    lastRun: lastRun(parts.map((part) => part.last_run).filter((run) => run !== null && run !== undefined), strings),
    warning: corrupted > 0 ? strings.corrupted(corrupted) : "",
    freeable: parts.some((part) => part.ladder !== "unloaded"),
    pinned: size,
    freeText: strings.freeModel,
    freeLabel: strings.freeModelOf(name),
    pinnedText: strings.freePinned(size),
    pinnedLabel: strings.freePinnedOf(name, format.bytes(pinned)),
  };
}

/**
 * @param {Model} part
 * @param {Strings} strings
 * @returns {PartView}
 */
function partView(part, strings) {
  const step = strings[STEPS[part.ladder]] ?? part.ladder;
  return {
    key: part.device,
    device: part.device,
    step: part.reason ? strings.because(step, part.reason) : step,
    ladder: part.ladder,
    // Nothing is in effect then, as the step has said.
    plan: part.ladder === "unloaded" ? "" : part.plan,
  };
}

/**
 * @param {Model[]} parts
 * @param {Strings} strings
 * @returns {LoadingView | null}
 */
function loadingView(parts, strings) {
  const rows = parts.map((part) => part.loading).filter((loading) => loading !== null && loading !== undefined);
  // An event's row is of the whole model, and stands with each of its parts.
  const same = rows.length > 1 && rows.every((row) => row === rows[0]);
  const loading = totalLoading(same ? rows.slice(0, 1) : rows);
  if (loading === null) return null;
  const amount = format.bytesOf(loading.done, loading.total);
  return {
    fill: format.fraction(loading.done, loading.total),
    amount,
    text: strings.modelLoading(amount, format.rate(loading.rate)),
    label: `${strings.loading}: ${parts[0].name}`,
  };
}

/**
 * The parts of a split model run in the same steps: what they copied adds up, and the slowest tells how long.
 * @param {readonly Run[]} runs
 * @param {Strings} strings
 */
function lastRun(runs, strings) {
  if (runs.length === 0) return "";
  const sum = (/** @type {(run: Run) => number | null} */ field) => {
    const values = runs.map(field).filter(format.isKnown);
    return values.length > 0 ? values.reduce((total, value) => total + value, 0) : null;
  };
  const most = (/** @type {(run: Run) => number | null} */ field) => {
    const values = runs.map(field).filter(format.isKnown);
    return values.length > 0 ? Math.max(...values) : null;
  };
  const copied = sum((run) => run.bytes);
  const steps = most((run) => run.steps) ?? 0;
  const step = format.seconds(most((run) => run.step_seconds));
  if (copied === 0) return strings.lastRunUncopied({ steps, step });
  return strings.lastRun({
    steps,
    step,
    copied: format.bytes(copied),
    rate: format.rate(sum((run) => run.rate)),
    stall: format.milliseconds(most((run) => run.stall_ms_per_block)),
    misses: sum((run) => run.misses) ?? 0,
  });
}
