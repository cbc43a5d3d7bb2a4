/**
 * A device: its bar, its last two minutes, and its figures, which can be folded away.
 */

import { el, setAttribute, setOptional, setShown, setText, svg, syncList } from "./dom.mjs";
import { stackedBar } from "./meter.mjs";
import { SPARK } from "./device_view.mjs";

/** @import { Part } from "./dom.mjs" */
/** @import { Strings } from "./strings.mjs" */
/** @import { DeviceView, Figure } from "./device_view.mjs" */

let made = 0;

/**
 * @param {DeviceView} first
 * @param {Strings} strings
 * @param {boolean} compact  one line, with all but name, bar and amount folded away
 * @returns {Part<DeviceView>}
 */
export function deviceRow(first, strings, compact) {
  const id = `ws-device-${++made}`;
  const title = el("span", { class: "ws-device-name" });
  const detail = el("span", { class: "ws-muted ws-ellipsis" });
  const amount = el("span", { class: "ws-number ws-end" });
  const button = el(
    "button",
    { type: "button", class: "ws-fold", "aria-controls": id },
    el("span", { class: "ws-chevron", "aria-hidden": "true" }),
    title,
    ...(compact ? [] : [detail, amount]),
  );
  const bar = stackedBar();
  const line = svg("path", { fill: "none", "vector-effect": "non-scaling-stroke" });
  const box = { class: "ws-spark", viewBox: `0 0 ${SPARK.width} ${SPARK.height}`, role: "img", "aria-label": strings.history };
  const spark = svg("svg", { ...box, preserveAspectRatio: "none" }, line);
  const span = el("span", { class: "ws-muted ws-spark-label", title: strings.history }, strings.historySpan);
  const copy = el("span", { class: "ws-number" });
  const stall = el("span", { class: "ws-number" });
  const warning = el("span", { class: "ws-badge ws-tone-warning ws-end", title: strings.nearlyFullLong });
  const rates = el(
    "div",
    { class: "ws-rates" },
    ...(compact ? [detail] : []),
    spark,
    span,
    labelled(strings.copy, strings.copyLong, copy),
    labelled(strings.stall, strings.stallLong, stall),
    ...(compact ? [] : [warning]),
  );
  const figures = el("dl", { class: "ws-figures", id });
  const top = compact ? [el("div", { class: "ws-device-line" }, button, bar.element, warning, amount)] : [button, bar.element];
  const element = el("li", { class: "ws-device" }, ...top, rates, figures);

  /** What the user has chosen; until then the view says. @type {boolean | null} */
  let chosen = null;
  let open = first.open;
  const fold = () => {
    setAttribute(button, "aria-expanded", String(open));
    setShown(figures, open);
    setShown(rates, open || !compact);
  };
  button.addEventListener("click", () => {
    chosen = open = !open;
    fold();
  });
  /** @type {Map<string, Part<Figure>>} */
  const rows = new Map();
  return {
    element,
    update(view) {
      open = chosen ?? view.open;
      fold();
      setText(title, view.title);
      setOptional(detail, view.detail);
      setAttribute(button, "title", [view.title, view.detail].filter(Boolean).join(", "));
      setText(amount, view.amount);
      bar.update(view.meter, view.segments, view.peak);
      setAttribute(line, "d", view.spark);
      setAttribute(spark, "data-empty", view.spark === "" ? "" : null);
      setShown(span, view.spark !== "");
      setText(copy, view.copy);
      setText(stall, view.stall);
      setOptional(warning, compact && view.warning ? "!" : view.warning);
      element.classList.toggle("ws-near", view.warning !== "");
      if (open) syncList(figures, rows, view.figures, figureRow);
    },
  };
}

/**
 * @param {string} label
 * @param {string} long
 * @param {HTMLElement} value
 */
function labelled(label, long, value) {
  return el("span", { class: "ws-rate", title: long }, el("span", { class: "ws-muted" }, `${label} `), value);
}

/**
 * A figure with the colour and the pattern that its part of the bar has.
 * @param {Figure} first
 * @returns {Part<Figure>}
 */
function figureRow(first) {
  const value = el("dd", { class: "ws-number" });
  const swatch = el("span", { class: `ws-swatch ws-${first.key}`, "aria-hidden": "true" });
  const element = el("div", { class: "ws-figure", title: first.long }, el("dt", {}, swatch, first.label), value);
  return { element, update: (figure) => setText(value, figure.value) };
}
