/**
 * What models of the open workflow will do before they run: asked of the server when they are new there.
 */

import { AUTO } from "./graph_models.mjs";
import { isThere } from "./model_view.mjs";

/** @import { FeedState, Server } from "./feed.mjs" */
/** @import { GraphModel } from "./graph_models.mjs" */

export const ESTIMATE_ROUTE = "/weightstream/v1/estimate";

/**
 * @typedef {{name: string, loaded: boolean, device: string, device_name: string, limit: number | null, link: string, rate: number,
 *   rate_source: "measured" | "link" | "assumed", file_bytes: number, missing_bytes: number, ram_available: number, blocks: number,
 *   model_bytes: number, vram: number, reserve: number, ram: number, fits: boolean, least_vram: number,
 *   least_limit: number | null, stays: number, streamed_bytes: number, streamed_blocks: number, pinned_limit: number | null, pinnable: number | null,
 *   from_file: number, from_disk: boolean, bus_seconds: number, packed_bus_seconds: number | null, compute_seconds: number | null, step_seconds: number | null,
 *   packed_step_seconds: number | null, overlaps: boolean}} Estimate  of nodes/page/estimating.py
 * @typedef {{model: GraphModel, estimate: Estimate | null, error: string}} Known  error: why there is no estimate
 * @typedef {{of(models: readonly GraphModel[], moment: string): Known[]}} Estimates
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
function queryOf({ name, folder, weightDtype, limit, reserve, pinnedLimit, mode, pinMemory, packing }) {
  const query = new URLSearchParams({ name, weight_dtype: weightDtype });
  if (folder) query.set("folder", folder);
  for (const [input, gib] of Object.entries({ vram_limit_gb: limit, reserve_vram_gb: reserve, pinned_limit_gb: pinnedLimit })) {
    if (gib > 0) query.set(input, String(gib));
  }
  for (const [input, choice] of Object.entries({ mode, pin_memory: pinMemory, packing })) {
    if (choice !== AUTO) query.set(input, choice);
  }
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
