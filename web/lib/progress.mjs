/**
 * How far the host's sampler is, from what the host tells every page anyway.
 */

/** @import { Server } from "./feed.mjs" */

/** @typedef {{done: number, total: number, left: number | null}} RunProgress  left: seconds; null before two steps ended */

// Bars of bytes and of files are no steps; no sampler takes so many.
const MOST_STEPS = 20_000;
const ENDS = ["execution_success", "execution_error", "execution_interrupted"];

/**
 * @param {Server} server
 * @param {() => number} now
 * @param {() => void} changed
 * @returns {() => RunProgress | null}
 */
export function watchProgress(server, now, changed) {
  /**
   * Of prompts that have not ended, the first to begin first: a fleet runs several of a page at once.
   * @type {Map<string, {key: string, done: number, total: number, at: number, first: number, began: number}>}
   */
  const runs = new Map();
  server.addEventListener("progress", ({ detail }) => {
    const { value, max, prompt_id: prompt, node } = detail ?? {};
    if (!(max > 1 && max <= MOST_STEPS) || !(value >= 0)) return;
    const key = `${prompt}/${node}/${max}`;
    const at = now();
    const run = runs.get(prompt);
    const goesOn = run !== undefined && run.key === key && value >= run.done;
    runs.set(prompt, goesOn ? { ...run, done: value, at } : { key, done: value, total: max, at, first: value, began: at });
    changed();
  });
  for (const name of ENDS) server.addEventListener(name, ({ detail }) => void (runs.delete(detail?.prompt_id) && changed()));
  // Ends that the page has missed.
  server.addEventListener("reconnected", () => {
    if (runs.size === 0) return;
    runs.clear();
    changed();
  });
  return () => {
    const [run] = runs.values();
    if (run === undefined) return null;
    const { done, total, at, first, began } = run;
    const each = done > first ? (at - began) / (done - first) / 1000 : null;
    // Since the last step ended a part of the next one is over.
    const left = each === null ? null : Math.max(0, each * (total - done) - Math.min(each, (now() - at) / 1000));
    return { done, total, left };
  };
}
