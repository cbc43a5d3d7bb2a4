import assert from "node:assert/strict";
import { test } from "node:test";

import { EVENT, FLEET_MS, RENEW_MS, ROUTES, STALE_MS, createFeed } from "../../web/lib/feed.mjs";
import { device, event, model, status, worker } from "./states.mjs";

/** Time that passes only when a test says so. */
class FakeClock {
  time = 1_000_000;
  /** @type {Map<number, {at: number, callback: () => void}>} */
  timers = new Map();
  #made = 0;

  now = () => this.time;

  setTimeout = (/** @type {() => void} */ callback, /** @type {number} */ delay) => {
    this.timers.set(++this.#made, { at: this.time + delay, callback });
    return this.#made;
  };

  clearTimeout = (/** @type {number} */ timer) => void this.timers.delete(timer);

  /** @param {number} duration */
  async pass(duration) {
    const end = this.time + duration;
    await settled();
    for (;;) {
      const [next] = [...this.timers].filter(([, { at }]) => at <= end).sort(([, a], [, b]) => a.at - b.at);
      if (!next) break;
      this.timers.delete(next[0]);
      this.time = next[1].at;
      next[1].callback();
      await settled();
    }
    this.time = end;
  }
}

/** A server with our routes, as the host's api object gives it to the page. */
class FakeServer {
  /** @type {string | null} */
  clientId = "page";
  /** @type {"up" | "down" | "old" | "broken"} */
  mode = "up";
  status = status();
  /** @type {{route: string, body: any}[]} */
  asked = [];
  /** @type {any} */
  unloaded = { code: 200, body: { freed_device: 5, freed_pinned: 7 } };
  /** @type {((event: any) => void)[]} */
  listeners = [];
  /** Answers wait for this. @type {Promise<void>} */
  gate = Promise.resolve();

  fetchApi = async (/** @type {string} */ route, /** @type {any} */ options = {}) => {
    this.asked.push({ route, body: options.body === undefined ? undefined : JSON.parse(options.body) });
    const answer = this.answer(route);
    await this.gate;
    return answer;
  };

  /** @param {string} route */
  answer(route) {
    if (this.mode === "down") throw new TypeError("Failed to fetch");
    if (this.mode === "old") return new Response("404: Not Found", { status: 404 });
    if (this.mode === "broken") return new Response("500", { status: 500 });
    if (route === ROUTES.watch) return Response.json({ seconds: 10 });
    if (route === ROUTES.unload) return Response.json(this.unloaded.body, { status: this.unloaded.code });
    return Response.json(structuredClone(this.status));
  }

  addEventListener = (/** @type {string} */ type, /** @type {(event: any) => void} */ listener) => {
    if (type === EVENT) this.listeners.push(listener);
  };

  /** @param {Partial<import("../../web/lib/status.mjs").Event>} [changes] */
  send(changes = {}) {
    for (const listener of this.listeners) listener({ detail: event(this.status, changes) });
  }

  /** @param {string} route */
  count(route) {
    return this.asked.filter((each) => each.route === route).length;
  }
}

/** Let everything that waits for an answer go on. */
async function settled() {
  for (let turn = 0; turn < 30; turn += 1) await Promise.resolve();
  await new Promise((resolve) => setImmediate(resolve));
}

function started() {
  const server = new FakeServer();
  const clock = new FakeClock();
  const feed = createFeed(/** @type {any} */ (server), clock);
  /** @type {import("../../web/lib/feed.mjs").FeedState[]} */
  const seen = [];
  const viewer = feed.watch((state) => seen.push(state));
  return { server, clock, feed, seen, viewer, link: () => feed.state().link };
}

/** @param {FakeServer} server @param {FakeClock} clock @param {number} duration */
async function passWithEvents(server, clock, duration) {
  for (let passed = 0; passed < duration; passed += 1000) {
    await clock.pass(1000);
    server.send();
  }
}

test("nothing is asked, and no timer runs, while nobody looks", async () => {
  const { server, clock, seen } = started();
  await clock.pass(60_000);
  assert.deepEqual(server.asked, []);
  assert.equal(clock.timers.size, 0);
  assert.deepEqual(seen, []);
});

test("a panel that is seen asks for the status and renews the lease every four seconds", async () => {
  const { server, clock, viewer, link } = started();
  viewer.show(true);
  await settled();
  assert.equal(link(), "live");
  assert.equal(server.count(ROUTES.watch), 1);
  assert.deepEqual(server.asked.find(({ route }) => route === ROUTES.watch)?.body, { client_id: "page" });
  await passWithEvents(server, clock, 5 * RENEW_MS);
  assert.equal(server.count(ROUTES.watch), 6);
});

test("what is hidden, or destroyed, ends it all", async () => {
  for (const end of [(/** @type {any} */ viewer) => viewer.show(false), (/** @type {any} */ viewer) => viewer.close()]) {
    const { server, clock, viewer } = started();
    viewer.show(true);
    await clock.pass(1000);
    end(viewer);
    const asked = server.asked.length;
    await clock.pass(60_000);
    assert.equal(server.asked.length, asked);
    assert.equal(clock.timers.size, 0);
  }
});

test("an answer or an event that comes when the panel is hidden starts nothing", async () => {
  const { server, clock, viewer } = started();
  let open = () => {};
  server.gate = new Promise((resolve) => (open = resolve));
  viewer.show(true);
  viewer.show(false);
  open();
  await clock.pass(60_000);
  server.send();
  await clock.pass(60_000);
  assert.equal(clock.timers.size, 0);
  assert.deepEqual(server.asked.map(({ route }) => route), [ROUTES.status, ROUTES.watch]);
});

test("a renewal that is answered when the panel is hidden asks for no status", async () => {
  const { server, clock, viewer } = started();
  viewer.show(true);
  await settled();
  let open = () => {};
  server.gate = new Promise((resolve) => (open = resolve));
  await clock.pass(RENEW_MS);
  viewer.show(false);
  const fetched = server.count(ROUTES.status);
  open();
  await settled();
  assert.equal(server.count(ROUTES.watch), 2);
  assert.equal(server.count(ROUTES.status), fetched);
});

test("several panels share one lease, and only those that are seen are told", async () => {
  const { server, clock, feed, seen, viewer } = started();
  /** @type {unknown[]} */
  const others = [];
  const other = feed.watch((state) => others.push(state));
  viewer.show(true);
  other.show(true);
  other.show(true);
  await settled();
  assert.equal(server.count(ROUTES.watch), 1);
  other.show(false);
  const told = others.length;
  const before = seen.length;
  await clock.pass(1000);
  server.send();
  assert.equal(others.length, told);
  assert.equal(seen.length, before + 1);
  viewer.close();
  viewer.close();
  assert.equal(clock.timers.size, 0);
});

test("an event before the first status is shown", async () => {
  const { server, seen, viewer, link } = started();
  server.gate = new Promise(() => {});
  viewer.show(true);
  server.send();
  assert.equal(link(), "live");
  assert.equal(seen.at(-1)?.status, null);
  assert.equal(seen.at(-1)?.event?.devices.length, 1);
});

test("another revision fetches the status once, the same one never", async () => {
  const { server, clock, seen, viewer } = started();
  viewer.show(true);
  await settled();
  server.send({ revision: "a" });
  await settled();
  const fetched = server.count(ROUTES.status);
  await clock.pass(1000);
  server.send({ revision: "a" });
  await settled();
  assert.equal(server.count(ROUTES.status), fetched);
  server.status = status({ models: [model()] });
  server.send({ revision: "b" });
  await settled();
  assert.equal(server.count(ROUTES.status), fetched + 1);
  assert.equal(seen.at(-1)?.status?.models.length, 1);
});

test("a revision that changes while the status is on its way is fetched again", async () => {
  const { server, viewer } = started();
  viewer.show(true);
  await settled();
  server.send({ revision: "a" });
  await settled();
  let open = () => {};
  server.gate = new Promise((resolve) => (open = resolve));
  server.send({ revision: "b" });
  server.send({ revision: "c" });
  const waiting = server.count(ROUTES.status);
  open();
  await settled();
  server.send({ revision: "c" });
  await settled();
  assert.equal(server.count(ROUTES.status), waiting + 1);
  server.send({ revision: "c" });
  await settled();
  assert.equal(server.count(ROUTES.status), waiting + 1);
});

test("a fleet is asked for its status every few seconds, though prompts end all the time", async () => {
  const { server, clock, seen, viewer } = started();
  server.status = status({ fleet: { waiting: 0, reruns: 0, workers: [worker()] } });
  viewer.show(true);
  await settled();
  server.send({ revision: "0" });
  await settled();
  const before = server.count(ROUTES.status);
  for (let second = 1; second <= 20; second += 1) {
    await clock.pass(1000);
    server.status.fleet = { waiting: second, reruns: 0, workers: [worker({ done: second, loaded: [`model ${second}`] })] };
    server.send({ revision: String(second) });
    await settled();
    assert.equal(seen.at(-1)?.event?.fleet?.waiting, second, "what the event says is shown at once");
  }
  assert.equal(server.count(ROUTES.status) - before, 20_000 / FLEET_MS);
  await clock.pass(FLEET_MS);
  server.send({ revision: "20" });
  await settled();
  assert.deepEqual(seen.at(-1)?.status?.fleet?.workers[0].loaded, ["model 20"], "the last change is not forgotten");
});

test("a fleet's status is fetched at once when a worker came or went, or something was freed there", async () => {
  const { server, clock, feed, viewer } = started();
  server.status = status({ fleet: { waiting: 0, reruns: 0, workers: [worker()] } });
  viewer.show(true);
  await settled();
  server.send({ revision: "a" });
  await settled();
  const before = server.count(ROUTES.status);
  await clock.pass(1000);
  await feed.unload("gpu-0.1", "model");
  await settled();
  assert.equal(server.count(ROUTES.status), before + 1);
  await clock.pass(1000);
  server.send({ revision: "b" });
  await settled();
  assert.equal(server.count(ROUTES.status), before + 1);
  server.status.devices = [];
  server.send({ revision: "c" });
  await settled();
  assert.equal(server.count(ROUTES.status), before + 2);
});

test("five seconds without an event are stale, and an event ends that", async () => {
  const { server, clock, seen, viewer, link } = started();
  viewer.show(true);
  await settled();
  server.send();
  await clock.pass(STALE_MS - 1);
  assert.equal(link(), "live");
  await clock.pass(1);
  assert.equal(link(), "stale");
  assert.equal(seen.at(-1)?.link, "stale");
  assert.notEqual(seen.at(-1)?.status, null, "what was known is kept");
  server.send();
  assert.equal(link(), "live");
});

test("a server that answers and sends no events stays stale", async () => {
  const { server, clock, viewer, link } = started();
  viewer.show(true);
  await clock.pass(STALE_MS + 5 * RENEW_MS);
  assert.equal(link(), "stale");
  assert.ok(server.count(ROUTES.status) > 3, "and is asked for its status instead");
});

test("time in which nobody looked is not stale", async () => {
  const { server, clock, viewer, link } = started();
  viewer.show(true);
  await settled();
  await clock.pass(STALE_MS);
  assert.equal(link(), "stale");
  viewer.show(false);
  await clock.pass(600_000);
  viewer.show(true);
  assert.equal(link(), "starting");
  await settled();
  assert.equal(link(), "live");
  await clock.pass(1000);
  server.send();
  assert.equal(link(), "live");
});

test("a route that is missing is said, and revives when the server has it", async () => {
  const { server, clock, seen, viewer, link } = started();
  server.mode = "old";
  viewer.show(true);
  await clock.pass(20_000);
  assert.equal(link(), "missing");
  assert.equal(seen.filter((state) => state.link === "missing").length, 1, "and said once");
  server.mode = "up";
  await clock.pass(RENEW_MS);
  assert.equal(link(), "live");
  assert.notEqual(seen.at(-1)?.status, null);
});

test("a host that has pages for any address refuses to be posted to where there is no route", async () => {
  const { server, viewer, link } = started();
  server.answer = (route) => new Response("", { status: route === ROUTES.watch ? 405 : 404 });
  viewer.show(true);
  await settled();
  assert.equal(link(), "missing");
});

test("a status of the format before the first numbered one is a missing route", async () => {
  const { server, viewer, link } = started();
  server.status = /** @type {any} */ ({ models: [], virtual_devices: [] });
  viewer.show(true);
  await settled();
  assert.equal(link(), "missing");
});

test("a status of a later format is not read", async () => {
  const { server, viewer, seen, link } = started();
  server.status = { ...status(), schema: 2 };
  viewer.show(true);
  await settled();
  assert.equal(link(), "newer");
  assert.equal(seen.at(-1)?.status, null);
});

test("a server that is gone, or broken, is said while its figures stay, and is asked again", async () => {
  for (const mode of /** @type {const} */ (["down", "broken"])) {
    const { server, clock, viewer, seen, link } = started();
    viewer.show(true);
    await settled();
    server.send({ revision: "a" });
    await settled();
    server.mode = mode;
    await clock.pass(2 * STALE_MS);
    assert.equal(link(), "gone");
    assert.notEqual(seen.at(-1)?.status, null);
    server.mode = "up";
    server.status = status({ devices: [device({ resident: 9e9 })], time: status().time + 60 });
    await clock.pass(RENEW_MS);
    assert.equal(link(), "live", mode);
    assert.equal(seen.at(-1)?.status?.devices[0].resident, 9e9);
  }
});

test("a server whose status fails does not seem well with each event", async () => {
  const { server, clock, viewer, seen, link } = started();
  server.answer = (route) => (route === ROUTES.watch ? Response.json({ seconds: 10 }) : new Response("", { status: 500 }));
  viewer.show(true);
  await settled();
  assert.equal(link(), "gone");
  await passWithEvents(server, clock, 10_000);
  assert.ok(seen.slice(1).every((state) => state.link === "gone"));
});

test("without a client id nothing is leased until the host has one", async () => {
  const { server, clock, viewer } = started();
  server.clientId = null;
  viewer.show(true);
  await settled();
  assert.equal(server.count(ROUTES.watch), 0);
  server.clientId = "late";
  await clock.pass(RENEW_MS);
  assert.deepEqual(server.asked.filter(({ route }) => route === ROUTES.watch).map(({ body }) => body), [{ client_id: "late" }]);
});

test("each event is a sample of the history, and one of another format is none", async () => {
  const { server, clock, feed, viewer } = started();
  viewer.show(true);
  await settled();
  await passWithEvents(server, clock, 3000);
  server.send({ schema: 2 });
  assert.equal(feed.state().history.get("gpu:0")?.length, 3);
});

test("freeing asks for it, gives what was freed, and fetches the status again", async () => {
  const { server, feed, viewer } = started();
  viewer.show(true);
  await settled();
  const fetched = server.count(ROUTES.status);
  assert.deepEqual(await feed.unload("1", "pinned"), { ok: true, device: 5, pinned: 7 });
  assert.deepEqual(server.asked.find(({ route }) => route === ROUTES.unload)?.body, { model: "1", what: "pinned" });
  await settled();
  assert.equal(server.count(ROUTES.status), fetched + 1);
});

test("what cannot be freed is an error with the server's words, or its code, or the browser's", async () => {
  const { server, feed } = started();
  server.unloaded = { code: 409, body: { error: "a prompt is running" } };
  assert.deepEqual(await feed.unload("1", "model"), { ok: false, error: "a prompt is running" });
  server.mode = "broken";
  assert.deepEqual(await feed.unload("1", "model"), { ok: false, error: "HTTP 500" });
  server.mode = "down";
  assert.deepEqual(await feed.unload("1", "model"), { ok: false, error: "Failed to fetch" });
});
