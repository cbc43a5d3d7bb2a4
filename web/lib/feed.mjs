/**
 * The one connection to the server that all panels share.
 *
 * The server sends its status only to a page that has asked for it in the last seconds. So the feed asks while at least
 * one panel can be seen (the lease), and does nothing at all when none can: no request, no timer.
 */

import { watchEstimates } from "./estimates.mjs";
import { remember } from "./history.mjs";
import { watchProgress } from "./progress.mjs";
import { SCHEMA } from "./status.mjs";
import { stepRequests } from "./step_requests.mjs";

/** @import { Estimates } from "./estimates.mjs" */
/** @import { RunProgress } from "./progress.mjs" */
/** @import { Event, Status } from "./status.mjs" */
/** @import { Steps } from "./step_requests.mjs" */
/** @import { History } from "./history.mjs" */

export const EVENT = "weightstream.status";
export const ROUTES = {
  status: "/weightstream/v1/status",
  watch: "/weightstream/v1/watch",
  unload: "/weightstream/v1/unload",
};
export const RENEW_MS = 4_000;
export const STALE_MS = 5_000;
// Each prompt that ends on any worker changes the revision, and a fleet asks all workers for its status.
export const FLEET_MS = 4_000;

/**
 * starting: nothing has come yet; live; stale: the server has said nothing for a while; missing: it has no such route;
 * gone: it does not answer; newer: it speaks a later version of the format than this page.
 * @typedef {"starting" | "live" | "stale" | "missing" | "gone" | "newer"} Link
 *
 * @typedef {{link: Link, status: Status | null, event: Event | null, history: History, now: number,
 *   progress?: RunProgress | null}} FeedState
 *
 * @typedef {{show(visible: boolean): void, close(): void}} Viewer
 *
 * @typedef {{ok: true, device: number, pinned: number} | {ok: false, error: string}} Freed
 *
 * @typedef {object} Feed
 * @property {(listener: (state: FeedState) => void) => Viewer} watch  a panel that cannot be seen yet
 * @property {() => FeedState} state
 * @property {(model: string, what: "model" | "pinned") => Promise<Freed>} unload
 * @property {Steps} steps
 * @property {Estimates} estimates
 *
 * @typedef {object} Server  the host's api object, as far as it is used here
 * @property {string | null | undefined} clientId
 * @property {(route: string, options?: RequestInit) => Promise<Response>} fetchApi
 * @property {(type: string, listener: (event: CustomEvent) => void) => void} addEventListener
 *
 * @typedef {object} Clock
 * @property {() => number} now
 * @property {(callback: () => void, delay: number) => any} setTimeout
 * @property {(timer: any) => void} clearTimeout
 */

/** @type {Clock} */
const PAGE_CLOCK = {
  now: () => Date.now(),
  setTimeout: (callback, delay) => setTimeout(callback, delay),
  clearTimeout: (timer) => clearTimeout(timer),
};

/**
 * @param {Server} server
 * @param {Clock} [clock]
 * @returns {Feed}
 */
export function createFeed(server, clock = PAGE_CLOCK) {
  return new SharedFeed(server, clock);
}

class SharedFeed {
  /** @type {Map<object, {listener: (state: FeedState) => void, visible: boolean}>} */
  #viewers = new Map();
  /** @type {Link} */
  #link = "starting";
  /** @type {Status | null} */
  #status = null;
  /** @type {Event | null} */
  #event = null;
  /** @type {History} */
  #history = new Map();
  /** The revision that the status belongs to; null where that is not known. @type {string | null} */
  #revision = null;
  #fetching = false;
  #fetched = -Infinity;
  /** @type {any} */
  #renewal = null;
  /** @type {any} */
  #silence = null;
  #server;
  #clock;
  #progress;

  /**
   * @param {Server} server
   * @param {Clock} clock
   */
  constructor(server, clock) {
    this.#server = server;
    this.#clock = clock;
    // For good: the host complains of an event that nobody listens to, and the last lease outlives the last look.
    server.addEventListener(EVENT, (event) => this.#receive(event.detail));
    this.steps = stepRequests(server);
    this.estimates = watchEstimates(server, () => this.#watched && this.#notify());
    this.#progress = watchProgress(server, clock.now, () => this.#watched && this.#notify());
  }

  state() {
    return {
      link: this.#link,
      status: this.#status,
      event: this.#event,
      history: this.#history,
      now: this.#clock.now(),
      progress: this.#progress(),
    };
  }

  /** @param {(state: FeedState) => void} listener */
  watch(listener) {
    const key = {};
    this.#viewers.set(key, { listener, visible: false });
    return {
      show: (/** @type {boolean} */ visible) => this.#show(key, visible),
      close: () => {
        this.#show(key, false);
        this.#viewers.delete(key);
      },
    };
  }

  /**
   * @param {string} model
   * @param {"model" | "pinned"} what
   * @returns {Promise<Freed>}
   */
  async unload(model, what) {
    try {
      const answer = await this.#post(ROUTES.unload, { model, what });
      const body = await answer.json().catch(() => ({}));
      if (!answer.ok) return { ok: false, error: String(body.error || `HTTP ${answer.status}`) };
      this.#revision = null;
      void this.#refetch();
      return { ok: true, device: body.freed_device, pinned: body.freed_pinned };
    } catch (error) {
      return { ok: false, error: String(error instanceof Error ? error.message : error) };
    }
  }

  get #watched() {
    return [...this.#viewers.values()].some((viewer) => viewer.visible);
  }

  /**
   * @param {object} key
   * @param {boolean} visible
   */
  #show(key, visible) {
    const viewer = this.#viewers.get(key);
    if (!viewer || viewer.visible === visible) return;
    const before = this.#watched;
    viewer.visible = visible;
    if (visible) viewer.listener(this.state());
    if (!before && this.#watched) this.#start();
    if (before && !this.#watched) this.#stop();
  }

  #start() {
    // What was last heard is old by now; a server that answers has a moment to say something new.
    if (this.#link === "stale") this.#link = "starting";
    this.#awaitNews();
    void this.#refetch();
    void this.#renew();
  }

  #stop() {
    this.#clock.clearTimeout(this.#renewal);
    this.#clock.clearTimeout(this.#silence);
    this.#renewal = this.#silence = null;
  }

  async #renew() {
    this.#clock.clearTimeout(this.#renewal);
    this.#renewal = this.#clock.setTimeout(() => void this.#renew(), RENEW_MS);
    // Until the host's socket is open there is no id, and nobody to send to.
    const client = this.#server.clientId;
    if (!client) return;
    const before = this.#link;
    const answer = await this.#post(ROUTES.watch, { client_id: client }).catch(() => null);
    if (!this.#watched) return;
    if (!answer?.ok) return this.#setLink(linkOf(answer));
    if (before === "missing" || before === "gone") {
      this.#revision = null;
      this.#awaitNews();
    }
    if (this.#revision === null || this.#status === null) await this.#refetch();
  }

  async #refetch() {
    if (this.#fetching) return;
    this.#fetching = true;
    this.#fetched = this.#clock.now();
    // What changes while the answer is on its way may be in it or not: the revision of before is the safe one.
    const revision = this.#event?.revision ?? null;
    try {
      const answer = await this.#server.fetchApi(ROUTES.status);
      if (!answer.ok) return this.#setLink(linkOf(answer));
      const status = await answer.json();
      // Before it was numbered the format was another one.
      if (!(status.schema >= SCHEMA)) return this.#setLink("missing");
      if (status.schema > SCHEMA) return this.#setLink("newer");
      this.#status = status;
      this.#revision = revision;
      if (this.#link !== "stale") this.#link = "live";
      this.#notify();
    } catch {
      this.#setLink("gone");
    } finally {
      this.#fetching = false;
    }
  }

  /** @param {Event} event */
  #receive(event) {
    if (event?.schema !== SCHEMA) return;
    const now = this.#clock.now();
    this.#event = event;
    const rows = event.devices.map(([device, total, free]) => ({ device, total, free }));
    this.#history = remember(this.#history, /** @type {any} */ (rows), now);
    if (!this.#watched) return;
    this.#awaitNews();
    // Other links end when the routes answer: a server whose status fails would else seem well once a second.
    if (this.#link === "stale" || this.#link === "starting") this.#link = "live";
    this.#notify();
    if (event.revision !== this.#revision && !this.#mayWait(event, now)) void this.#refetch();
  }

  /**
   * Whether another revision need not be fetched yet: it is a fleet's, and no worker came or went.
   * @param {Event} event
   * @param {number} now
   */
  #mayWait(event, now) {
    const same = event.devices.length === this.#status?.devices.length;
    return event.fleet !== undefined && same && this.#revision !== null && now - this.#fetched < FLEET_MS;
  }

  #awaitNews() {
    this.#clock.clearTimeout(this.#silence);
    this.#silence = this.#clock.setTimeout(() => this.#fallSilent(), STALE_MS);
  }

  #fallSilent() {
    this.#silence = null;
    // Where the reason for the silence is known it is the better thing to say.
    if (this.#link === "live" || this.#link === "starting") this.#setLink("stale");
  }

  /** @param {Link} link */
  #setLink(link) {
    if (this.#link === link) return;
    this.#link = link;
    this.#notify();
  }

  #notify() {
    const state = this.state();
    for (const viewer of this.#viewers.values()) if (viewer.visible) viewer.listener(state);
  }

  /**
   * @param {string} route
   * @param {object} body
   */
  #post(route, body) {
    const headers = { "Content-Type": "application/json" };
    return this.#server.fetchApi(route, { method: "POST", headers, body: JSON.stringify(body) });
  }
}

/**
 * What an answer that is no success says, or that there was none. The host has pages for any address, which can be read
 * but not posted to: 405 is its word for a route that nobody has made.
 * @param {Response | null} answer
 * @returns {Link}
 */
function linkOf(answer) {
  return answer?.status === 404 || answer?.status === 405 ? "missing" : "gone";
}
