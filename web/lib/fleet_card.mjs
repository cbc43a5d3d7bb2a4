/**
 * A fleet: what waits, and a line for each worker.
 */

import { el, setAttribute, setOptional, setShown, setText, syncList } from "./dom.mjs";
import { fold } from "./fold.mjs";

/** @import { Part } from "./dom.mjs" */
/** @import { FleetView, WorkerView } from "./fleet_view.mjs" */
/** @import { Strings } from "./strings.mjs" */

/** @param {Strings} strings */
export function fleetCard(strings) {
  const summary = el("p", { class: "ws-number ws-muted ws-fleet-summary" });
  const workers = el("ul", { class: "ws-list ws-workers", "aria-label": strings.fleetWorkers });
  const idle = el("ul", { class: "ws-list ws-workers", "aria-label": strings.fleetWorkers });
  const idleFold = fold("", idle);
  const idleText = /** @type {HTMLElement} */ (idleFold.firstElementChild);
  const title = el("p", { class: "ws-fleet-title", "aria-hidden": "true" }, strings.fleetTitle);
  const head = el("div", { class: "ws-fleet-head" }, title, summary);
  const element = el("section", { class: "ws-fleet", "aria-label": strings.fleetTitle }, head, workers, idleFold);
  const rows = { workers: new Map(), idle: new Map() };
  return {
    element,
    /** @param {FleetView | null} view */
    update(view) {
      setShown(element, view !== null);
      if (view === null) return;
      setText(summary, view.summary);
      syncList(workers, rows.workers, view.workers, workerRow);
      setShown(workers, view.workers.length > 0);
      syncList(idle, rows.idle, view.idle, workerRow);
      setText(idleText, view.idleText);
      setShown(idleFold, view.idle.length > 0);
    },
  };
}

/** @returns {Part<WorkerView>} */
function workerRow() {
  const dot = el("span", { "aria-hidden": "true" });
  const name = el("span", { class: "ws-device-name" });
  const host = el("span", { class: "ws-muted ws-ellipsis" });
  const state = el("span", { class: "ws-number ws-end" });
  const reason = el("p");
  const detail = el("p", { class: "ws-muted" });
  const line = el("div", { class: "ws-worker-line" }, dot, name, host, state);
  return {
    element: el("li", { class: "ws-worker" }, line, reason, detail),
    update(view) {
      dot.className = `ws-dot ws-tone-${view.tone}`;
      setText(name, view.name);
      setOptional(host, view.host);
      setAttribute(host, "title", view.host);
      setText(state, view.state);
      setOptional(reason, view.reason);
      reason.className = `ws-note ws-tone-${view.tone}`;
      setText(detail, view.detail);
    },
  };
}
