/**
 * A model: how its weights reach each device and why, how far it is loaded, its last run, and buttons that free it.
 */

import { el, setAttribute, setOptional, setShown, setText, syncList } from "./dom.mjs";
import { bytes } from "./format.mjs";
import { simpleBar } from "./meter.mjs";

// So long a card says what a button has done.
const SAID_MS = 20_000;

/** @import { Part } from "./dom.mjs" */
/** @import { Freed } from "./feed.mjs" */
/** @import { ModelView, PartView } from "./model_view.mjs" */
/** @import { Strings } from "./strings.mjs" */

/**
 * @param {ModelView} first
 * @param {Strings} strings
 * @param {(model: string, what: "model" | "pinned") => Promise<Freed>} unload
 * @returns {Part<ModelView>}
 */
export function modelCard(first, strings, unload) {
  const name = el("span", { class: "ws-model-name ws-ellipsis" });
  const where = el("span", { class: "ws-muted" });
  const running = el("span", { class: "ws-dot", "aria-hidden": "true" });
  const bar = simpleBar();
  const amount = el("span", { class: "ws-number" });
  const loading = el("div", { class: "ws-loading" }, bar.element, amount);
  const parts = el("ul", { class: "ws-list ws-parts" });
  const summary = el("p", { class: "ws-summary" });
  const lastRun = el("p", { class: "ws-muted" });
  const warning = el("p", { class: "ws-note ws-tone-error" });
  // There from the start: what is put into an element that comes with it is often not read out.
  const answer = el("p", { class: "ws-note", role: "status" });
  const freeing = { busy: false };
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  let said;
  const free = freeButton("model");
  const pinned = freeButton("pinned");
  const buttons = el("div", { class: "ws-buttons" }, free, pinned);
  const head = el("div", { class: "ws-model-head" }, running, name, where);
  const element = el("li", { class: "ws-model" }, head, summary, loading, parts, lastRun, warning, buttons, answer);
  /** @type {Map<string, Part<PartView>>} */
  const rows = new Map();
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
      setOptional(where, view.where);
      running.classList.toggle("ws-tone-active", view.running);
      setShown(loading, view.loading !== null);
      if (view.loading) {
        const { fill, text, label } = view.loading;
        bar.update({ now: fill, max: 1, text, label }, fill);
        setText(amount, text);
      }
      setOptional(summary, view.summary);
      syncList(parts, rows, view.parts, partRow);
      setOptional(lastRun, view.lastRun);
      setOptional(warning, view.warning);
      showButtons();
    },
  };
}

/** @returns {Part<PartView>} */
function partRow() {
  const device = el("span", { class: "ws-device-name" });
  const step = el("span", { class: "ws-step" });
  const plan = el("p", { class: "ws-plan" });
  const element = el("li", { class: "ws-part" }, el("p", {}, device, " ", step), plan);
  return {
    element,
    update(view) {
      setText(device, view.device);
      setText(step, view.step);
      setAttribute(step, "data-ladder", view.ladder);
      setOptional(plan, view.plan);
    },
  };
}
