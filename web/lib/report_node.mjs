/**
 * What Streaming Report tells, on its node: as the card of a model does, in the page's language, with the first cause.
 */

import { el, setOptional, syncList } from "./dom.mjs";
import { ROUTES } from "./feed.mjs";
import { fold } from "./fold.mjs";
import { withoutHostText } from "./host_text.mjs";
import { modelViews } from "./model_view.mjs";
import { stringsFor } from "./strings.mjs";
import { takePlace } from "./take_place.mjs";
import { whyCard } from "./why_card.mjs";

/** @import { Server } from "./feed.mjs" */
/** @import { Model, Notice } from "./status.mjs" */
/** @import { Strings } from "./strings.mjs" */
/** @import { Cause } from "./why.mjs" */

const NODE_TYPE = "WeightStreamReport";
const NAME = "weightstream_report";
const HOLDER = "ws-report-holder";
const STYLES = new URL("../weightstream.css", import.meta.url).href;
// As in the style sheet, which Nodes 2.0 goes by.
const MIN_HEIGHT = 170;

/**
 * @typedef {{streams: boolean, model: string, models: Model[], notices: Notice[]}} Report  as nodes/report.py makes it
 * @typedef {{title: string, headline: string, parts: string[], causes: import("./why.mjs").CauseView[], details: string[],
 *   notices: string[]}} ReportView
 */

/**
 * What the node says, as plain values.
 * @param {Report} report
 * @param {readonly Cause[]} causes  of the status: the report tells of the same models
 * @param {Strings} strings
 * @returns {ReportView}
 */
export function reportView({ streams, model, models, notices }, causes, strings) {
  const [view] = streams ? modelViews({ models, causes: [...causes] }, strings, () => true) : [];
  const said = (/** @type {string} */ name, /** @type {string} */ text) => strings.because(name, text);
  return {
    title: view?.name ?? model,
    headline: view ? view.headline || view.summary : strings.streamsNot,
    parts: (view?.parts ?? []).map(({ device, step }) => said(device, step)),
    causes: (view?.causes ?? []).slice(0, 1),
    details: [...(view?.parts ?? []).filter(({ plan }) => plan !== "").map(({ device, plan }) => said(device, plan)), view?.lastRun ?? ""].filter(Boolean),
    notices: notices.map(({ name, text }) => said(name, strings.fromServer(text))),
  };
}

/** @param {{app: any, api: Server, locale: () => string}} options */
export function reportNodes({ app, api, locale }) {
  /** @param {any} node */
  function attach(node) {
    const holder = el("div", { class: `ws-holder ${HOLDER}` });
    const widget = node.addDOMWidget(NAME, NAME, holder, { serialize: false, getMinHeight: () => MIN_HEIGHT });
    widget.serialize = false;
    const least = node.computeSize?.() ?? node.size;
    node.setSize([Math.max(node.size[0], 300), Math.max(node.size[1], least[1])]);
    holder.addEventListener("keydown", keep);
    holder.addEventListener("wheel", (event) => event.stopPropagation());
    takePlace(app, node, holder, `.${HOLDER}`);
    app.canvas?.setDirty?.(true, true);
    return holder;
  }

  return {
    /** @param {any} node  one that the host has just made */
    add(node) {
      if ((node.comfyClass ?? node.type) !== NODE_TYPE) return;
      const { onExecuted } = node;
      /** @type {HTMLElement | undefined} */
      let holder;
      node.onExecuted = async function (/** @type {any} */ output, /** @type {any[]} */ ...more) {
        onExecuted?.call(this, output, ...more);
        const report = /** @type {Report | undefined} */ (output?.weightstream?.[0]);
        if (!report) return;
        withoutHostText(node);
        holder ??= attach(node);
        fill(holder, reportView(report, await causesOf(api), stringsFor(locale())), stringsFor(locale()));
      };
    },
  };
}

/**
 * @param {Server} api
 * @returns {Promise<Cause[]>}
 */
async function causesOf(api) {
  try {
    const answer = await api.fetchApi(ROUTES.status);
    return answer.ok ? ((await answer.json()).causes ?? []) : [];
  } catch {
    // No connection: the report itself has come, and is shown without why.
    return [];
  }
}

/**
 * @param {HTMLElement} holder
 * @param {ReportView} view
 * @param {Strings} strings
 */
function fill(holder, view, strings) {
  const title = el("p", { class: "ws-model-name" }, view.title);
  const headline = el("p", { class: "ws-headline" }, view.headline);
  const why = whyCard(strings);
  why.update(view.causes);
  const details = fold(strings.details, list(view.details));
  details.hidden = view.details.length === 0;
  const element = el("div", { class: "ws-panel ws-embedded", role: "group", tabindex: "0", "aria-label": view.title });
  // As in the lines of GPU Placement (Nodes 2.0).
  element.dataset.captureWheel = "true";
  element.append(title, headline, list(view.parts), why.element, details, list(view.notices));
  holder.replaceChildren(element, el("link", { rel: "stylesheet", href: STYLES }));
}

/** @param {readonly string[]} texts */
function list(texts) {
  const element = el("ul", { class: "ws-list ws-parts" });
  syncList(element, new Map(), texts.map((text, place) => ({ key: String(place), text })), () => {
    const item = el("li", { class: "ws-part" });
    return { element: item, update: ({ text }) => setOptional(item, text) };
  });
  element.hidden = texts.length === 0;
  return element;
}

/**
 * Keys that fold must not reach the canvas, which has its own use for them.
 * @param {KeyboardEvent} event
 */
function keep(event) {
  if (event.key === " " || event.key === "Enter") event.stopPropagation();
}
