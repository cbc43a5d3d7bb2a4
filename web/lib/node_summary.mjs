/**
 * What GPU Placement shows of its server: a line for each GPU, with its bar, one for each model, and the way to the rest.
 */

import { el, setOptional, setText, setAttribute, showList } from "./dom.mjs";
import { mountLive } from "./live_element.mjs";
import { stackedBar } from "./meter.mjs";
import { buildView } from "./view.mjs";

/** @import { DeviceView } from "./device_view.mjs" */
/** @import { Part } from "./dom.mjs" */
/** @import { Feed, FeedState } from "./feed.mjs" */
/** @import { GraphNodes } from "./graph_nodes.mjs" */
/** @import { Strings } from "./strings.mjs" */
/** @import { BriefView } from "./view.mjs" */

/**
 * @param {HTMLElement} container
 * @param {{feed: Feed, locale: () => string, nodes: GraphNodes, open: () => void}} options  open: shows the panel
 */
export function mountSummary(container, { feed, locale, nodes, open }) {
  const build = (/** @type {HTMLElement} */ root, /** @type {Strings} */ strings) => fill(root, strings, nodes, open);
  const mounted = mountLive(container, { feed, locale, classes: "ws-panel ws-embedded", build });
  // Nodes 2.0 zooms with the wheel wherever it is turned, but for what says this and has the focus.
  mounted.element.dataset.captureWheel = "true";
  return mounted;
}

/**
 * @param {HTMLElement} root
 * @param {Strings} strings
 * @param {GraphNodes} nodes
 * @param {() => void} open
 * @returns {(state: FeedState) => void}
 */
function fill(root, strings, nodes, open) {
  root.setAttribute("aria-label", strings.title);
  const banner = el("p", { class: "ws-note ws-banner" });
  const devices = el("ul", { class: "ws-list ws-devices", "aria-label": strings.devices });
  const idle = el("p", { class: "ws-muted ws-idle" });
  const note = el("p", { class: "ws-muted" });
  const models = el("ul", { class: "ws-list ws-briefs", "aria-label": strings.models });
  const button = el("button", { type: "button", class: "ws-button" }, strings.openPanel);
  button.addEventListener("click", open);
  root.append(banner, devices, idle, note, models, el("div", { class: "ws-buttons" }, button));
  const rows = { devices: new Map(), models: new Map() };
  return (state) => {
    const view = buildView(state, strings, { title: nodes.title, held: nodes.notices });
    root.dataset.state = view.state.key;
    root.classList.toggle("ws-old", view.old);
    setOptional(banner, view.banner);
    banner.className = `ws-note ws-banner ws-tone-${view.state.tone}`;
    showList(devices, rows.devices, view.devices, () => deviceLine(strings));
    setOptional(idle, view.idle.length > 0 ? view.idleText : "");
    setOptional(note, view.deviceNote);
    showList(models, rows.models, view.briefs, briefRow);
  };
}

/**
 * @param {Strings} strings
 * @returns {Part<DeviceView>}
 */
function deviceLine(strings) {
  const name = el("span", { class: "ws-device-name" });
  const bar = stackedBar();
  const warning = el("span", { class: "ws-badge ws-tone-warning", title: strings.nearlyFullLong }, "!");
  const amount = el("span", { class: "ws-number" });
  const element = el("li", { class: "ws-device ws-device-line" }, name, bar.element, warning, amount);
  return {
    element,
    update(view) {
      setText(name, view.title);
      setAttribute(element, "title", [view.title, view.detail, view.meter.text].filter(Boolean).join(", "));
      bar.update(view.meter, view.segments, view.peak);
      setOptional(warning, view.warning && "!");
      setText(amount, view.amount);
    },
  };
}

/** @returns {Part<BriefView>} */
function briefRow() {
  const dot = el("span", { "aria-hidden": "true" });
  const text = el("span", { class: "ws-brief-text" });
  const element = el("li", { class: "ws-brief" }, dot, text);
  return {
    element,
    update(view) {
      dot.className = `ws-dot ws-tone-${view.tone}`;
      setText(text, view.text);
      setAttribute(element, "title", view.text);
    },
  };
}
