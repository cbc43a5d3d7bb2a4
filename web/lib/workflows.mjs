/**
 * Of which open workflow the prompt is that runs. The server knows prompts alone, and ids of nodes are the same in many
 * workflows. The page runs its prompts in the order in which it queues them.
 */

/** @import { Server } from "./feed.mjs" */

const ENDS = ["execution_success", "execution_error", "execution_interrupted"];

/**
 * @typedef {object} Workflows
 * @property {() => object | null} open  the one that is shown; null where the page does not tell
 * @property {() => object | null} queued  the one that was queued last
 * @property {() => object | null} running  null while nothing runs that this page has queued
 */

/**
 * @param {any} app  the host's
 * @param {Server} api
 * @returns {Workflows}
 */
export function watchWorkflows(app, api) {
  /** For each prompt, in their order. @type {(object | null)[]} */
  let queued = [];
  let started = 0;
  let runs = false;
  let waiting = 0;
  const open = () => app.extensionManager?.workflow?.activeWorkflow ?? null;

  api.addEventListener("status", ({ detail }) => {
    waiting = detail?.exec_info?.queue_remaining ?? waiting;
  });
  // Before it is sent: a short prompt starts, or has ended, before the page hears that it was taken.
  api.addEventListener("promptQueueing", ({ detail }) => {
    // Prompts that were refused never start. None is counted beyond the next that finds nothing before it.
    if (waiting === 0 && !runs) {
      queued = [];
      started = 0;
    }
    queued.push(...Array.from({ length: Math.max(1, detail?.batchCount ?? 1) }, open));
  });
  api.addEventListener("execution_start", () => {
    started += 1;
    runs = true;
  });
  for (const name of ENDS) api.addEventListener(name, () => void (runs = false));

  return {
    open,
    queued: () => queued.at(-1) ?? null,
    running: () => (runs ? (queued[started - 1] ?? null) : null),
  };
}
