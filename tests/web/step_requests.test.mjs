import assert from "node:assert/strict";
import { test } from "node:test";

import { STEP_ROUTES, stepRequests } from "../../web/lib/step_requests.mjs";

/** @param {() => Response} answer */
function page(answer) {
  /** @type {any[]} */
  const asked = [];
  /** @type {any[]} */
  const saved = [];
  const link = { click: () => saved.push(/** @type {any} */ (link).download) };
  Object.assign(globalThis, { document: { createElement: () => link } });
  const server = { clientId: "page", addEventListener: () => {}, fetchApi: async (/** @type {string} */ route) => (asked.push(route), answer()) };
  return { steps: stepRequests(server), asked, saved };
}

test("a timeline is saved as a file", async () => {
  const { steps, asked, saved } = page(() => Response.json({ traceEvents: [] }));
  await steps.download("gpu-0.1&x");
  assert.deepEqual(asked, [`${STEP_ROUTES.timeline}?model=gpu-0.1%26x&format=chrome`]);
  assert.deepEqual(saved, ["weightstream-step.json"]);
});

test("an error is no file", async () => {
  const { steps, saved } = page(() => Response.json({ error: "no step was recorded" }, { status: 404 }));
  await steps.download("1");
  assert.deepEqual(saved, []);
  assert.deepEqual(await steps.runs("1"), { ok: false, error: "no step was recorded" });
});

test("an answer that is none has its status as the error", async () => {
  const { steps } = page(() => new Response("<html>", { status: 502 }));
  assert.deepEqual(await steps.askTimeline("1"), { ok: false, error: "HTTP 502" });
});
