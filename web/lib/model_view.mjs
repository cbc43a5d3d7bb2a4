/**
 * What a model's card shows, as plain values. The parts of a model that is split over devices share one card.
 */

import * as format from "./format.mjs";
import { totalLoading } from "./status.mjs";
import { causeViews } from "./why.mjs";

/** @import { Ladder, Model, Run, Status } from "./status.mjs" */
/** @import { Strings } from "./strings.mjs" */
/** @import { NodeView } from "./view.mjs" */
/** @import { CauseView } from "./why.mjs" */

/**
 * @typedef {{key: string, device: string, step: string, ladder: Ladder, plan: string}} PartView
 * @typedef {{fill: number | null, amount: string, text: string, label: string}} LoadingView
 * @typedef {{key: string, name: string, node: NodeView | null, running: boolean, headline: string, causes: CauseView[],
 *   ran: string, parts: PartView[], loading: LoadingView | null, summary: string, brief: string, lastRun: string, warning: string, freeable: boolean, pinned: string, freeText: string, freeLabel: string,
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

// The steps, the worst first.
const WORST = /** @type {const} */ (["synchronous", "staged", "pinned", "resident", "unloaded"]);
const EXTENSION = /\.(safetensors|sft|gguf|ckpt|pth|pt|bin)$/i;

/**
 * @param {Pick<Status, "models" | "causes">} status
 * @param {Strings} strings
 * @param {(id: string) => boolean} [keep]  whether a model is shown though nothing of it is loaded
 * @param {(id: string | null | undefined, model: string) => NodeView | null} [node]
 * @returns {ModelView[]}
 */
export function modelViews({ models, causes }, strings, keep = () => false, node = () => null) {
  const ids = [...new Set(models.filter((model) => isThere(model) || keep(model.id)).map((model) => model.id))];
  return ids.map((id) => {
    const parts = models.filter((model) => model.id === id);
    return { ...modelView(parts, strings), node: node(parts[0].node_id, parts[0].name), causes: causeViews(causes ?? [], id, strings) };
  });
}

/**
 * Whether there is something of it to free, or is coming. A model that was given to other GPUs lives on without either.
 * @param {Model} model
 */
export function isThere(model) {
  return isLoaded(model) || (model.pinned_bytes ?? 0) > 0;
}

/** @param {Model} model */
function isLoaded({ ladder, loading }) {
  return ladder !== "unloaded" || (loading !== null && loading !== undefined);
}

/**
 * @param {Model[]} parts
 * @param {Strings} strings
 * @returns {Omit<ModelView, "node" | "causes">}
 */
function modelView(parts, strings) {
  const [{ id, name }] = parts;
  const runs = parts.map((part) => part.last_run).filter((run) => run !== null && run !== undefined);
  const pinned = pinnedBytes(parts);
  const size = pinned > 0 ? format.bytes(pinned) : "";
  const corrupted = parts.reduce((sum, part) => sum + (part.last_run?.corrupted ?? 0), 0);
  return {
    key: id,
    name,
    headline: [headline(runs, strings), together(parts, strings)].filter(Boolean).join(" · "),
    // Changes with each run that ends.
    ran: JSON.stringify(runs),
    running: parts.some((part) => part.running),
    parts: parts.map((part) => partView(part, strings)),
    loading: loadingView(parts, strings),
    summary: [alone(parts, strings), summary(parts, strings)].filter(Boolean).join(" "),
    brief: brief(parts, strings),
    lastRun: lastRun(runs, strings),
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
 * Page-locked memory. Parts that work in parallel have one copy together.
 * @param {readonly Model[]} parts
 */
function pinnedBytes(parts) {
  const sizes = parts.map((part) => part.pinned_bytes ?? 0);
  return parts.some((part) => part.parallel) ? Math.max(...sizes) : sizes.reduce((sum, size) => sum + size, 0);
}

/**
 * That several devices compute at the same time; "" where they do not.
 * @param {readonly Model[]} parts
 * @param {Strings} strings
 */
function together([{ parallel }], strings) {
  return parallel && !parallel.alone ? strings.parallel(parallel.devices) : "";
}

/**
 * Why they do not, where that was asked for.
 * @param {readonly Model[]} parts
 * @param {Strings} strings
 */
function alone([{ device, parallel }], strings) {
  return parallel?.alone ? strings.parallelAlone(device, strings.fromServer(parallel.alone)) : "";
}

/**
 * What is copied in a step, and what limits it, in a sentence; "" where that is not known.
 * @param {readonly Model[]} parts
 * @param {Strings} strings
 */
function summary(parts, strings) {
  const loaded = parts.filter((part) => part.ladder !== "unloaded");
  if (loaded.length === 0) return "";
  if (loaded.every((part) => part.ladder === "resident")) return strings.summaryResident;
  const copied = copiedText(loaded, strings);
  if (copied === "") return "";
  if (loaded.some((part) => part.ladder === "synchronous")) return strings.summarySynchronous(copied);
  if (loaded.some((part) => part.limited_by === "bus")) return strings.summaryBus(copied);
  return loaded.every((part) => part.limited_by) ? strings.summaryCompute(copied) : strings.summaryUnmeasured(copied);
}

/**
 * What is copied in a step, as it is sent, and the weights that this is, where they are packed; "" where it is not known.
 * @param {readonly Model[]} parts
 * @param {Strings} strings
 */
function copiedText(parts, strings) {
  const sent = sumOf(parts, (part) => part.streamed_block_bytes);
  const weights = sumOf(parts, weightBytes);
  if (sent === null || weights === null) return "";
  return weights > sent ? strings.packed(format.bytes(sent), format.bytes(weights)) : format.bytes(sent);
}

/**
 * Bytes of the weights that stream. An older server does not tell them apart from what is sent.
 * @param {Model} part
 */
function weightBytes(part) {
  return part.streamed_weight_bytes ?? part.streamed_block_bytes;
}

/**
 * The model in a line, for where there is little room: what a step of its last run took, and how weights come at worst;
 * before that also why; "" where none is loaded.
 * @param {readonly Model[]} parts
 * @param {Strings} strings
 */
function brief(parts, strings) {
  const loaded = parts.filter(isLoaded);
  if (loaded.length === 0) return "";
  const worst = WORST.find((ladder) => loaded.some((part) => part.ladder === ladder)) ?? loaded[0].ladder;
  const name = parts[0].name.replace(EXTENSION, "");
  const loading = loadingView([...parts], strings);
  if (loading) return strings.because(name, strings.and(strings.loading, loading.amount));
  if (worst === "unloaded") return strings.because(name, strings.loading);
  const step = strings[STEPS[worst]] ?? worst;
  const ran = runInShort(parts.map((part) => part.last_run).filter((run) => run !== null && run !== undefined), strings);
  if (ran) return strings.because(name, `${ran} · ${step}`);
  const reason = briefReason(loaded.filter((part) => part.ladder === worst), worst, strings);
  return strings.because(name, reason ? strings.and(step, reason) : step);
}

/**
 * @param {readonly Model[]} parts  with the same step
 * @param {Ladder} ladder
 * @param {Strings} strings
 */
function briefReason(parts, ladder, strings) {
  const reasons = new Set(parts.map((part) => part.reason));
  if (reasons.size === 1) return strings.fromServer(parts[0].reason);
  const kept = sumOf(parts, (part) => (part.resident_bytes ?? NaN) + (part.rest_bytes ?? 0));
  const streamed = sumOf(parts, weightBytes);
  if (ladder !== "pinned" || kept === null || streamed === null) return "";
  return strings.stay(format.bytes(kept), format.bytes(kept + streamed));
}

/**
 * The sum of what is known; null where nothing is.
 * @template Item
 * @param {readonly Item[]} items
 * @param {(item: Item) => number | null | undefined} field
 */
function sumOf(items, field) {
  const values = items.map(field).filter(format.isKnown);
  return values.length > 0 ? values.reduce((total, value) => total + value, 0) : null;
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
    step: part.reason ? strings.because(step, strings.fromServer(part.reason)) : step,
    ladder: part.ladder,
    // Nothing is in effect then, as the step has said.
    plan: part.ladder === "unloaded" ? "" : strings.fromServer(part.plan),
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
 * The last run in a line: what a step took, how much of that was waiting, and copies per second; "" before there is one.
 * @param {readonly Run[]} runs
 * @param {Strings} strings
 */
function headline(runs, strings) {
  const step = largest(runs, (run) => run.step_seconds);
  if (step === null) return "";
  if (sumOf(runs, (run) => run.bytes) === 0) return strings.headlineResident(format.seconds(step));
  const waiting = format.percent(largest(runs, (run) => run.waiting));
  return strings.headline(format.seconds(step), waiting, format.rate(sumOf(runs, (run) => run.rate)));
}

/**
 * @param {readonly Run[]} runs
 * @param {Strings} strings
 */
function runInShort(runs, strings) {
  const step = largest(runs, (run) => run.step_seconds);
  if (step === null) return "";
  const waiting = sumOf(runs, (run) => run.bytes) === 0 ? null : largest(runs, (run) => run.waiting);
  return strings.headlineShort(format.seconds(step), waiting === null ? "" : format.percent(waiting));
}

/**
 * @param {readonly Run[]} runs
 * @param {(run: Run) => number | null | undefined} field
 */
function largest(runs, field) {
  const values = runs.map(field).filter(format.isKnown);
  return values.length > 0 ? Math.max(...values) : null;
}

/**
 * The parts of a split model run in the same steps: what they copied adds up, and the slowest tells how long.
 * @param {readonly Run[]} runs
 * @param {Strings} strings
 */
function lastRun(runs, strings) {
  if (runs.length === 0) return "";
  const most = (/** @type {(run: Run) => number | null} */ field) => largest(runs, field);
  const copied = sumOf(runs, (run) => run.bytes);
  const steps = most((run) => run.steps) ?? 0;
  const step = format.seconds(most((run) => run.step_seconds));
  if (copied === 0) return strings.lastRunUncopied({ steps, step });
  return strings.lastRun({
    steps,
    step,
    copied: format.bytes(copied),
    rate: format.rate(sumOf(runs, (run) => run.rate)),
    stall: format.milliseconds(most((run) => run.stall_ms_per_block)),
    misses: sumOf(runs, (run) => run.misses) ?? 0,
  });
}
