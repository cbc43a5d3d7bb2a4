/**
 * What the page asks the server of single steps, when somebody looks at them.
 */

/** @import { Server } from "./feed.mjs" */
/** @import { RunSteps } from "./plots.mjs" */
/** @import { DeviceTrace } from "./timeline.mjs" */

export const STEP_ROUTES = { timeline: "/weightstream/v1/timeline", steps: "/weightstream/v1/steps" };
const FILE = "weightstream-step.json";

/**
 * @typedef {{ok: false, error: string}} Failed
 *
 * @typedef {object} Steps
 * @property {(model: string) => Promise<{ok: true, devices: DeviceTrace[]} | Failed>} timeline
 * @property {(model: string) => Promise<{ok: true} | Failed>} askTimeline
 * @property {(model: string) => Promise<{ok: true, runs: RunSteps[]} | Failed>} runs
 * @property {(model: string) => Promise<void>} download  the timeline as a file
 */

/**
 * @param {Server} server
 * @returns {Steps}
 */
export function stepRequests(server) {
  /**
   * @param {string} route
   * @param {RequestInit} [options]
   * @returns {Promise<any>}
   */
  async function ask(route, options) {
    try {
      const answer = await server.fetchApi(route, options);
      const body = await answer.json().catch(() => ({}));
      return answer.ok ? { ...body, ok: true } : { ok: false, error: String(body.error || `HTTP ${answer.status}`) };
    } catch (error) {
      return { ok: false, error: String(error instanceof Error ? error.message : error) };
    }
  }
  const query = (/** @type {string} */ model) => `?model=${encodeURIComponent(model)}`;
  return {
    timeline: (model) => ask(STEP_ROUTES.timeline + query(model)),
    runs: (model) => ask(STEP_ROUTES.steps + query(model)),
    askTimeline(model) {
      const headers = { "Content-Type": "application/json" };
      return ask(STEP_ROUTES.timeline, { method: "POST", headers, body: JSON.stringify({ model }) });
    },
    async download(model) {
      const { ok, ...file } = await ask(`${STEP_ROUTES.timeline + query(model)}&format=chrome`);
      if (ok) saveFile(FILE, JSON.stringify(file));
    },
  };
}

/**
 * @param {string} name
 * @param {string} text
 */
function saveFile(name, text) {
  const url = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  const link = Object.assign(document.createElement("a"), { href: url, download: name });
  link.click();
  // The browser has taken it by the time that the click is over.
  setTimeout(() => URL.revokeObjectURL(url), 0);
}
