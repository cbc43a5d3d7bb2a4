/**
 * The menu of the picker: a line for each GPU, which is chosen when it is pressed.
 *
 * It is a popover, which the browser lays over all of the page, wherever its node is and however large that is drawn, and
 * which it closes on Escape and on a press elsewhere.
 */

import { earlier, toggled } from "./gpu_choice.mjs";
import { el, setAttribute, setOptional, setShown, setStyle, setText, syncList } from "./dom.mjs";

/** @import { Part } from "./dom.mjs" */
/** @import { Choice, Row } from "./gpu_choice.mjs" */
/** @import { Strings } from "./strings.mjs" */

// Between the button and the menu, and around it.
const GAP = 4;
// As in the style sheet.
const WIDTH = 400;
// So high is a menu of a few GPUs.
const ENOUGH = 260;

/**
 * @param {HTMLElement} opener  the button that it belongs to
 * @param {{choose: (names: string[]) => void, opening: (open: boolean) => void}} tell
 */
export function gpuMenu(opener, tell) {
  const hint = el("p", { class: "ws-muted" });
  const list = el("ul", { class: "ws-list" });
  const none = el("button", { type: "button", class: "ws-pick-none" });
  const element = el("div", { class: "ws-panel ws-pick-menu", popover: "auto", role: "dialog" }, hint, list, none);
  // So the browser knows that a press on the button while it is open closes it, and does not open it once more.
  /** @type {HTMLButtonElement} */ (opener).popoverTargetElement = element;
  element.dataset.captureWheel = "true";
  /** @type {Map<string, Part<Row>>} */
  const rows = new Map();
  /** @type {string[] | null} */
  let names = [];
  const focusFirst = () => list.querySelector("button")?.focus();
  // What it hangs on moves away when the canvas is zoomed.
  const away = (/** @type {Event} */ event) => {
    if (!element.contains(/** @type {Node} */ (event.target))) element.hidePopover();
  };
  element.addEventListener("beforetoggle", (event) => {
    const open = /** @type {ToggleEvent} */ (event).newState === "open";
    // Where the browser returns to when it closes; a press on the button has not put the focus there in all pages.
    if (open) opener.focus({ preventScroll: true });
    if (open) hang(element, opener);
    if (open) document.addEventListener("wheel", away, { capture: true, passive: true });
    else document.removeEventListener("wheel", away, { capture: true });
    tell.opening(open);
  });
  element.addEventListener("toggle", (event) => {
    if (/** @type {ToggleEvent} */ (event).newState === "open") focusFirst();
  });
  none.addEventListener("click", () => tell.choose([]));
  element.addEventListener("keydown", (event) => {
    // Keys with Ctrl and the like are the page's; all others would do something to the node behind.
    if (!event.ctrlKey && !event.metaKey && !event.altKey) event.stopPropagation();
    if (event.key === "ArrowDown" || event.key === "ArrowUp") step(list, event);
  });
  // A press would drag the node, and a turn of the wheel zoom it.
  for (const type of ["pointerdown", "mousedown", "wheel", "contextmenu", "dblclick"]) {
    element.addEventListener(type, (event) => event.stopPropagation());
  }

  return {
    element,
    close: () => element.hidePopover(),
    /**
     * @param {Choice} choice
     * @param {Strings} strings
     */
    update(choice, strings) {
      const focused = element.contains(document.activeElement);
      names = choice.names;
      setAttribute(element, "aria-label", strings.pickGpus);
      setText(hint, names === null ? strings.pickReplaces : strings.pickHint);
      setText(none, strings.pickNone);
      setShown(none, names?.length !== 0);
      syncList(list, rows, choice.rows, () =>
        menuRow({ press: (name) => tell.choose(toggled(names, name)), raise: (name) => tell.choose(earlier(names, name)) }),
      );
      // What had the focus is gone or hidden.
      const active = /** @type {HTMLElement | null} */ (document.activeElement);
      if (focused && (!element.contains(active) || active?.hidden)) focusFirst();
    },
  };
}

/**
 * @param {{press: (name: string) => void, raise: (name: string) => void}} tell
 * @returns {Part<Row>}
 */
function menuRow(tell) {
  const place = el("span", { class: "ws-pick-place", "aria-hidden": "true" });
  const title = el("span", { class: "ws-device-name" });
  const detail = el("span", { class: "ws-muted ws-ellipsis" });
  const amount = el("span", { class: "ws-number ws-end" });
  const button = el("button", { type: "button", class: "ws-pick-gpu" }, place, title, detail, amount);
  const raise = el("button", { type: "button", class: "ws-pick-raise" }, "↑");
  let name = "";
  button.addEventListener("click", () => tell.press(name));
  raise.addEventListener("click", () => {
    tell.raise(name);
    if (raise.hidden) button.focus();
  });
  return {
    element: el("li", { class: "ws-pick-row" }, button, raise),
    update(row) {
      name = row.key;
      const number = row.place > 0 ? String(row.place) : "";
      setText(place, number);
      setText(title, name);
      setOptional(detail, row.detail);
      setText(amount, row.amount);
      setAttribute(button, "aria-pressed", String(row.place > 0));
      setAttribute(button, "aria-label", [name, row.detail, row.amount, number].filter(Boolean).join(", "));
      button.classList.toggle("ws-pick-missing", row.missing);
      setAttribute(raise, "aria-label", row.raise);
      setAttribute(raise, "title", row.raise);
      setShown(raise, row.raise !== "");
    },
  };
}

/**
 * @param {HTMLElement} list
 * @param {KeyboardEvent} event
 */
function step(list, event) {
  const buttons = /** @type {HTMLElement[]} */ ([...list.querySelectorAll(".ws-pick-gpu")]);
  const row = document.activeElement?.closest("li")?.querySelector(".ws-pick-gpu");
  const at = row ? buttons.indexOf(/** @type {HTMLElement} */ (row)) : -1;
  buttons[(at + (event.key === "ArrowDown" ? 1 : -1) + buttons.length) % buttons.length]?.focus();
  event.preventDefault();
}

/**
 * Below the button, or above it where there is more room.
 * @param {HTMLElement} menu
 * @param {HTMLElement} opener
 */
function hang(menu, opener) {
  const button = opener.getBoundingClientRect();
  const below = window.innerHeight - button.bottom;
  const under = below >= ENOUGH || below >= button.top;
  setStyle(menu, "left", `${Math.max(GAP, Math.min(button.left, window.innerWidth - WIDTH - GAP))}px`);
  setStyle(menu, "top", under ? `${button.bottom + GAP}px` : "auto");
  setStyle(menu, "bottom", under ? "auto" : `${window.innerHeight - button.top + GAP}px`);
  setStyle(menu, "max-height", `${(under ? below : button.top) - 2 * GAP}px`);
}
