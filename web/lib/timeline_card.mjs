/**
 * The timeline of a step in a model's card: the picture with what steers it, the same as text, and the file.
 */

import { el, setAttribute, setOptional, setShown, setText, syncList } from "./dom.mjs";
import { fold } from "./fold.mjs";
import { draw, heightOf, spanUnder } from "./timeline_canvas.mjs";
import { moved, timelineView, zoomed } from "./timeline.mjs";

/** @import { Part } from "./dom.mjs" */
/** @import { Steps } from "./step_requests.mjs" */
/** @import { Strings } from "./strings.mjs" */
/** @import { Range, TimelineView } from "./timeline.mjs" */

// A step that was asked for is looked for so often; it may take a minute, or nothing runs.
const LOOK_MS = 1_000;
const LOOKS = 300;

/**
 * @param {string} model
 * @param {Strings} strings
 * @param {Steps} steps
 */
export function timelineCard(model, strings, steps) {
  const canvas = /** @type {HTMLCanvasElement} */ (el("canvas", { class: "ws-timeline", role: "img" }));
  const under = el("p", { class: "ws-muted ws-under", "aria-hidden": "true" });
  const when = el("p", { class: "ws-muted" });
  const lines = el("ul", { class: "ws-list ws-lines" });
  const waits = el("ul", { class: "ws-list ws-lines" });
  const legend = el("ul", { class: "ws-list ws-legend", "aria-hidden": "true" });
  for (const [kind, part] of /** @type {const} */ ([["compute", "resident"], ["copies", "staging"], ["waits", "wait"], ["unpacking", "torch"]])) {
    legend.append(el("li", {}, el("span", { class: `ws-swatch ws-${part}` }), strings[`lane${kind}`]));
  }
  const text = fold(strings.asText, lines, waits);
  const answer = el("p", { class: "ws-note", role: "status" });
  const record = button(strings.recordStep, () => void ask());
  const download = button(strings.downloadTrace, () => void steps.download(model));
  const steer = [
    button("+", () => show(zoomed(range, 0.5, whole)), strings.zoomIn),
    button("−", () => show(zoomed(range, 2, whole)), strings.zoomOut),
    button("‹", () => show(moved(range, -0.5, whole)), strings.earlier),
    button("›", () => show(moved(range, 0.5, whole)), strings.later),
  ];
  const picture = el("div", { class: "ws-picture" }, canvas, under, el("div", { class: "ws-buttons" }, ...steer), legend, when, text);
  const element = fold(strings.timelineTitle, picture, answer, el("div", { class: "ws-buttons" }, record, download));

  /** @type {TimelineView | null} */
  let view = null;
  /** @type {Range} */
  let range = { from: 0, to: 1 };
  let whole = 1;
  let shownTime = 0;
  let waiting = false;
  const parts = { lines: new Map(), waits: new Map() };
  const observer = new ResizeObserver(() => redraw());
  observer.observe(canvas);

  function redraw() {
    if (view && element.open) draw(canvas, view, range);
  }

  /** @param {Range} wanted */
  function show(wanted) {
    range = wanted;
    setText(under, " ");
    redraw();
  }

  /** @returns {Promise<number>} when the step that is shown began, 0 without one */
  async function load() {
    const found = await steps.timeline(model);
    if (!found.ok) {
      say(strings.notRecorded(found.error), "ws-tone-error");
      return shownTime;
    }
    const time = found.devices[0]?.time ?? 0;
    if (time === shownTime && view !== null) return time;
    view = timelineView(found.devices, strings);
    shownTime = time;
    setShown(picture, view !== null);
    setShown(download, view !== null);
    if (view === null) {
      if (!waiting) say(strings.noTimeline, "");
      return time;
    }
    if (!waiting) say("", "");
    whole = view.seconds;
    canvas.style.height = `${heightOf(view)}px`;
    setAttribute(canvas, "aria-label", view.label);
    setText(when, view.when);
    for (const [list, rows, texts] of /** @type {const} */ ([[lines, parts.lines, view.lines], [waits, parts.waits, view.waits]])) {
      syncList(list, rows, texts.map((each, place) => ({ key: String(place), text: each })), textRow);
      setShown(list, texts.length > 0);
    }
    show({ from: 0, to: whole });
    return time;
  }

  async function ask() {
    if (waiting) return;
    waiting = true;
    setAttribute(record, "aria-disabled", "true");
    try {
      const before = shownTime;
      const asked = await steps.askTimeline(model);
      if (!asked.ok) return say(strings.notRecorded(asked.error), "ws-tone-error");
      say(strings.recording, "");
      for (let look = 0; look < LOOKS && element.open && element.isConnected; look++) {
        if ((await load()) !== before) break;
        await new Promise((resolve) => setTimeout(resolve, LOOK_MS));
      }
      say("", "");
    } finally {
      waiting = false;
      setAttribute(record, "aria-disabled", null);
    }
  }

  /**
   * @param {string} what
   * @param {string} tone
   */
  function say(what, tone) {
    answer.className = `ws-note ${tone}`;
    setText(answer, what);
  }

  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect();
    // The host scales what is on its canvas.
    const zoom = box.width / Math.max(1, canvas.clientWidth);
    const point = { x: (event.clientX - box.left) / zoom, y: (event.clientY - box.top) / zoom, width: canvas.clientWidth };
    setText(under, (view && spanUnder(view, range, point)?.text) || " ");
  });
  element.addEventListener("toggle", () => {
    if (element.open) void load().then(redraw);
  });
  setShown(picture, false);
  setShown(download, false);
  return { element, destroy: () => observer.disconnect() };
}

/**
 * @param {string} text
 * @param {() => void} press
 * @param {string} [label]
 */
function button(text, press, label) {
  const element = el("button", { type: "button", class: "ws-button", ...(label ? { "aria-label": label, title: label } : {}) }, text);
  element.addEventListener("click", () => {
    if (element.getAttribute("aria-disabled") !== "true") press();
  });
  return element;
}

/** @returns {Part<{key: string, text: string}>} */
function textRow() {
  const element = el("li", { class: "ws-muted" });
  return { element, update: (item) => setOptional(element, item.text) };
}
