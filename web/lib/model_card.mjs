/**
 * A model: what its last run took and why, how its weights reach each device, how far it is loaded, pictures of its
 * steps, and buttons that free it.
 */

import { el, setAttribute, setOptional, setShown, setText, syncList } from "./dom.mjs";
import { fold } from "./fold.mjs";
import { bytes } from "./format.mjs";
import { simpleBar } from "./meter.mjs";
import { nodeButton } from "./node_button.mjs";
import { stepsCard } from "./steps_card.mjs";
import { timelineCard } from "./timeline_card.mjs";
import { whyCard } from "./why_card.mjs";

// So long a card says what a button has done.
const SAID_MS = 20_000;

/** @import { Part } from "./dom.mjs" */
/** @import { Feed, Freed } from "./feed.mjs" */
/** @import { GraphNodes } from "./graph_nodes.mjs" */
/** @import { ModelView, PartView } from "./model_view.mjs" */
/** @import { Strings } from "./strings.mjs" */

/**
 * @param {ModelView} first
 * @param {Strings} strings
 * @param {{feed: Feed, unload: (model: string, what: "model" | "pinned") => Promise<Freed>, nodes: GraphNodes}} page
 * @returns {Part<ModelView>}
 */
export function modelCard(first, strings, { feed, unload, nodes }) {
  const name = el("span", { class: "ws-model-name ws-ellipsis" });
  const where = nodeButton(nodes);
  const headline = el("p", { class: "ws-headline ws-number" });
  const why = whyCard(strings);
  const running = el("span", { class: "ws-dot", "aria-hidden": "true" });
  const bar = simpleBar();
  const amount = el("span", { class: "ws-number" });
  const loading = el("div", { class: "ws-loading" }, bar.element, amount);
  const parts = el("ul", { class: "ws-list ws-parts" });
  const summary = el("p", { class: "ws-summary" });
  const lastRun = el("p", { class: "ws-muted" });
  const plans = el("ul", { class: "ws-list ws-parts" });
  const details = fold(strings.details, summary, plans, lastRun);
  const steps = stepsCard(first.key, strings, feed.steps);
  const timeline = timelineCard(first.key, strings, feed.steps);
  const warning = el("p", { class: "ws-note ws-tone-error" });
  // There from the start: what is put into an element that comes with it is often not read out.
  const answer = el("p", { class: "ws-note", role: "status" });
  const freeing = { busy: false };
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  let said;
  const free = freeButton("model");
  const pinned = freeButton("pinned");
  const buttons = el("div", { class: "ws-buttons" }, free, pinned);
  const head = el("div", { class: "ws-model-head" }, running, name, where.element);
  const pictures = [steps.element, timeline.element, details];
  const element = el("li", { class: "ws-model" }, head, headline, loading, parts, why.element, warning, ...pictures, buttons, answer);
  /** @type {{parts: Map<string, Part<PartView>>, plans: Map<string, Part<PartView>>}} */
  const rows = { parts: new Map(), plans: new Map() };
  let ran = "";
  let view = first;

  /** @param {"model" | "pinned"} what */
  function freeButton(what) {
    const button = el("button", { type: "button", class: "ws-button" });
    button.addEventListener("click", async () => {
      if (freeing.busy) return;
      freeing.busy = true;
      showButtons();
      say(strings.freeing, "");
      const freed = await unload(view.key, what);
      freeing.busy = false;
      showButtons();
      if (freed.ok) say(strings.freed(bytes(freed.device), bytes(freed.pinned)), "");
      else say(strings.notFreed(freed.error), "ws-tone-error");
    });
    return button;
  }

  /**
   * @param {string} text
   * @param {string} tone
   */
  function say(text, tone) {
    answer.className = `ws-note ${tone}`;
    setText(answer, text);
    clearTimeout(said);
    // What was so then need not be so any more.
    if (!freeing.busy) said = setTimeout(() => setText(answer, ""), SAID_MS);
  }

  function showButtons() {
    setText(free, view.freeText);
    setAttribute(free, "aria-label", view.freeLabel);
    setText(pinned, view.pinnedText);
    setAttribute(pinned, "aria-label", view.pinnedLabel);
    for (const [button, useful] of /** @type {const} */ ([[free, view.freeable], [pinned, view.pinned !== ""]])) {
      // A button that is taken away or disabled loses the focus of whoever has just pressed it.
      setShown(button, useful || button === document.activeElement);
      setAttribute(button, "aria-disabled", freeing.busy || !useful ? "true" : null);
    }
  }

  return {
    element,
    update(next) {
      view = next;
      setText(name, view.name);
      setAttribute(name, "title", view.name);
      where.update(view.node);
      setOptional(headline, view.headline);
      running.classList.toggle("ws-tone-active", view.running);
      setShown(loading, view.loading !== null);
      if (view.loading) {
        const { fill, text, label } = view.loading;
        bar.update({ now: fill, max: 1, text, label }, fill);
        setText(amount, text);
      }
      setOptional(summary, view.summary);
      syncList(parts, rows.parts, view.parts, partRow);
      syncList(plans, rows.plans, view.parts.filter((part) => part.plan !== ""), planRow);
      why.update(view.causes);
      setOptional(lastRun, view.lastRun);
      if (view.running || view.ran !== ran) steps.update();
      ran = view.ran;
      setOptional(warning, view.warning);
      showButtons();
    },
  };
}

/** @returns {Part<PartView>} */
function partRow() {
  const device = el("span", { class: "ws-device-name" });
  const step = el("span", { class: "ws-step" });
  return {
    element: el("li", { class: "ws-part" }, el("p", {}, device, " ", step)),
    update(view) {
      setText(device, view.device);
      setText(step, view.step);
      setAttribute(step, "data-ladder", view.ladder);
    },
  };
}

/** @returns {Part<PartView>} */
function planRow() {
  const device = el("span", { class: "ws-device-name" });
  const plan = el("span");
  return {
    element: el("li", { class: "ws-part" }, el("p", { class: "ws-plan" }, device, " ", plan)),
    update(view) {
      setText(device, view.device);
      setText(plan, view.plan);
    },
  };
}
