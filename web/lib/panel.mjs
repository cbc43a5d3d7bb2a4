/**
 * The panel, in any element of any page.
 */

import { deviceRow } from "./device_row.mjs";
import { PARTS } from "./device_view.mjs";
import { el, setAttribute, setOptional, setShown, setText, showList } from "./dom.mjs";
import { estimateCards } from "./estimate_card.mjs";
import { estimatesOf } from "./estimates.mjs";
import { fleetCard } from "./fleet_card.mjs";
import { fold } from "./fold.mjs";
import { NO_NODES } from "./graph_nodes.mjs";
import { mountLive } from "./live_element.mjs";
import { simpleBar } from "./meter.mjs";
import { modelCard } from "./model_card.mjs";
import { nodeButton } from "./node_button.mjs";
import { reportButton } from "./report_button.mjs";
import { buildView } from "./view.mjs";

/** @import { Part } from "./dom.mjs" */
/** @import { Feed, FeedState } from "./feed.mjs" */
/** @import { GraphNodes } from "./graph_nodes.mjs" */
/** @import { Strings } from "./strings.mjs" */
/** @import { HostView, NoticeView, ProgressView, View } from "./view.mjs" */

// A value that moves to and fro across a limit would be read out each time.
const SPEAK_MS = 5_000;
// So long the card of a model that was freed here says so, though nothing of it is loaded.
const FREED_MS = 20_000;

/**
 * @param {HTMLElement} container
 * @param {{feed: Feed, locale?: () => string, nodes?: GraphNodes}} options  nodes: those of the graph that is open
 * @returns {{element: HTMLElement, destroy(): void}}
 */
export function mountPanel(container, { feed, locale = () => "en", nodes = NO_NODES }) {
  return mountLive(container, { feed, locale, classes: "ws-panel", build: (root, strings) => build(root, strings, { feed, nodes }) });
}

/**
 * @param {HTMLElement} root
 * @param {Strings} strings
 * @param {{feed: Feed, nodes: GraphNodes}} page
 * @returns {(state: FeedState) => void}
 */
function build(root, strings, { feed, nodes }) {
  root.setAttribute("aria-label", strings.title);
  const state = stateLine(strings);
  const progress = progressLine();
  const banner = el("p", { class: "ws-note ws-banner" });
  const fleet = fleetCard(strings);
  const devices = el("ul", { class: "ws-list ws-devices", "aria-label": strings.devices });
  const legend = el("ul", { class: "ws-list ws-legend", "aria-label": strings.legend });
  for (const part of /** @type {const} */ ([...PARTS, "peak"])) {
    const swatch = el("span", { class: `ws-swatch ws-${part}`, "aria-hidden": "true" });
    legend.append(el("li", { title: strings[`${part}Long`] }, swatch, strings[part]));
  }
  const deviceNote = el("p", { class: "ws-muted" });
  const host = el("div", { class: "ws-host", role: "group", "aria-label": strings.host });
  const notices = el("ul", { class: "ws-list ws-notices", "aria-label": strings.notices });
  const estimates = estimateCards(strings, nodes);
  const models = el("ul", { class: "ws-list ws-models", "aria-label": strings.models });
  const modelNote = el("p", { class: "ws-muted" });
  const idle = el("ul", { class: "ws-list ws-devices", "aria-label": strings.devices });
  const idleFold = fold("", idle);
  const idleText = /** @type {HTMLElement} */ (idleFold.firstElementChild);
  root.append(
    state.element, progress.element, banner, notices, fleet.element, devices, idleFold, deviceNote, legend, host, estimates.element,
    models, modelNote, reportButton(feed, strings),
  );

  const rows = { devices: new Map(), idle: new Map(), host: new Map(), notices: new Map(), models: new Map() };
  /** When each was freed here. @type {Map<string, number>} */
  const freed = new Map();
  let now = 0;
  /** @type {Feed["unload"]} */
  const unload = async (id, what) => {
    freed.set(id, Infinity);
    try {
      return await feed.unload(id, what);
    } finally {
      freed.set(id, now);
    }
  };
  return (feedState) => {
    now = feedState.now;
    const view = buildView(feedState, strings, {
      keep: (id) => now - (freed.get(id) ?? -Infinity) < FREED_MS,
      title: nodes.title,
      held: nodes.notices,
      estimates: estimatesOf(feedState, feed.estimates, nodes.models),
    });
    root.dataset.state = view.state.key;
    root.classList.toggle("ws-old", view.old);
    state.update(view, feedState.now);
    progress.update(view.progress);
    setOptional(banner, view.banner);
    banner.className = `ws-note ws-banner ws-tone-${view.state.tone}`;
    showList(notices, rows.notices, view.notices, () => noticeRow(nodes));
    fleet.update(view.fleet);
    showList(devices, rows.devices, view.devices, (device) => deviceRow(device, strings, false));
    showList(idle, rows.idle, view.idle, (device) => deviceRow(device, strings, true));
    setText(idleText, view.idleText);
    setShown(idleFold, view.idle.length > 0);
    setShown(legend, view.legend);
    setOptional(deviceNote, view.deviceNote);
    showList(host, rows.host, view.host, hostRow);
    showList(models, rows.models, view.models, (model) => modelCard(model, strings, { feed, unload, nodes }));
    setOptional(modelNote, view.modelNote);
    estimates.update(view.estimates);
  };
}

/** @param {Strings} strings */
function stateLine(strings) {
  const dot = el("span", { "aria-hidden": "true" });
  const text = el("span", { class: "ws-state-text" });
  const spoken = el("span", { class: "ws-spoken", role: "status" });
  const element = el("div", { class: "ws-head" }, el("span", { class: "ws-title" }, strings.title), dot, text, spoken);
  let said = -Infinity;
  return {
    element,
    /**
     * @param {View} view
     * @param {number} now
     */
    update({ state }, now) {
      dot.className = `ws-dot ws-tone-${state.tone}`;
      setText(text, state.text);
      if (spoken.textContent === state.spoken) return;
      if (state.tone !== "error" && now - said < SPEAK_MS) return;
      setText(spoken, state.spoken);
      said = now;
    },
  };
}

/** How far the run is. */
function progressLine() {
  const bar = simpleBar();
  const text = el("span", { class: "ws-number" });
  const element = el("div", { class: "ws-loading ws-progress" }, bar.element, text);
  return {
    element,
    /** @param {ProgressView | null} view */
    update(view) {
      setShown(element, view !== null);
      if (view === null) return;
      setText(text, view.text);
      bar.update(view.meter, view.fill);
    },
  };
}

/**
 * @param {HostView} first
 * @returns {Part<HostView>}
 */
function hostRow(first) {
  const bar = simpleBar();
  const amount = el("span", { class: "ws-number" });
  const warning = el("span", { class: "ws-badge ws-tone-warning" });
  const label = el("span", { class: "ws-host-label" }, first.label, warning);
  return {
    element: el("div", { class: "ws-host-item" }, label, bar.element, amount),
    update(view) {
      setAttribute(bar.element, "title", view.meter.text);
      setText(amount, view.amount);
      setOptional(warning, view.warning);
      bar.update(view.meter, view.fill);
    },
  };
}

/**
 * @param {GraphNodes} nodes
 * @returns {Part<NoticeView>}
 */
function noticeRow(nodes) {
  const title = el("strong");
  const text = el("span");
  const node = nodeButton(nodes);
  const element = el("li", { class: "ws-note" }, title, " ", node.element, " ", text);
  return {
    element,
    update(view) {
      element.className = `ws-note ws-tone-${view.tone}`;
      setText(title, view.title);
      setText(text, view.text);
      node.update(view.node);
    },
  };
}
