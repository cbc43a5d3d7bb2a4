/**
 * A picker for `devices` on GPU Placement. What it writes is the text of that input, and nothing else is saved.
 */

import { el, setAttribute, setShown, setText } from "./dom.mjs";
import { gpuChoice, writeGpus } from "./gpu_choice.mjs";
import { gpuMenu } from "./gpu_menu.mjs";
import { stringsFor } from "./strings.mjs";
import { takePlace } from "./take_place.mjs";
import { watchVisibility } from "./visibility.mjs";

/** @import { Choice } from "./gpu_choice.mjs" */
/** @import { Strings } from "./strings.mjs" */

const NODE_TYPE = "WeightStreamGPUPlacement";
const INPUT = "devices";
const NAME = "weightstream_gpus";
const HOLDER = "ws-pick-holder";
const STYLES = new URL("../weightstream.css", import.meta.url).href;
// As in the style sheet, which Nodes 2.0 goes by, with the margins that the host leaves on the canvas.
const HEIGHT = 46;

/** @param {{app: any, feed: import("./feed.mjs").Feed, locale: () => string}} options */
export function gpuPicker({ app, feed, locale }) {
  return {
    /** @param {any} node  one that the host has just made */
    add(node) {
      if ((node.comfyClass ?? node.type) !== NODE_TYPE) return;
      const input = node.widgets?.find((/** @type {any} */ widget) => widget.name === INPUT);
      if (input) attach({ app, feed, locale }, node, input);
    },
  };
}

/**
 * @param {{app: any, feed: import("./feed.mjs").Feed, locale: () => string}} page
 * @param {any} node
 * @param {any} input  the widget of the text
 */
function attach({ app, feed, locale }, node, input) {
  const line = pickerLine();
  const menu = gpuMenu(line.button, { choose: (names) => write(app, node, input, writeGpus(names)), opening });
  const holder = el("div", { class: HOLDER }, ...line.elements, menu.element, el("link", { rel: "stylesheet", href: STYLES }));
  // Behind all inputs: the values of a saved workflow are told apart by their places.
  const widget = node.addDOMWidget(NAME, NAME, holder, { serialize: false, getMinHeight: () => HEIGHT, getMaxHeight: () => HEIGHT });
  widget.serialize = false;
  holder.addEventListener("keydown", keep);
  let stop = () => {};

  function show() {
    const strings = stringsFor(locale());
    const choice = gpuChoice(input.value, isLinked(node), feed.state(), strings);
    line.update(choice, strings);
    menu.update(choice, strings);
    if (!choice.choosable) menu.close();
  }

  /** @param {boolean} open */
  function opening(open) {
    setAttribute(line.button, "aria-expanded", String(open));
    if (open) show();
  }

  after(input, "callback", show);
  after(node, "onConnectionsChange", show);
  after(node, "onConfigure", () => {
    show();
    takePlace(app, node, holder, `.${HOLDER}`);
  });
  after(node, "onAdded", () => {
    const viewer = feed.watch(show);
    const unwatch = watchVisibility(holder, (visible) => {
      viewer.show(visible);
      // What is taken away with the menu open has closed it without a word.
      if (!visible) menu.close();
      if (!visible) opening(false);
    });
    stop = () => {
      unwatch();
      viewer.close();
    };
    const height = node.computeSize?.()[1] ?? 0;
    if (node.size[1] < height) node.setSize([node.size[0], height]);
    show();
  });
  after(node, "onRemoved", () => {
    menu.close();
    stop();
  });
}

/** What stands on the node: the button of the menu, or why there is none. */
function pickerLine() {
  const label = el("span", { class: "ws-pick-label" });
  const chosen = el("span", { class: "ws-pick-chosen ws-ellipsis" });
  const chevron = el("span", { class: "ws-chevron", "aria-hidden": "true" });
  const attributes = { type: "button", class: "ws-pick-open", "aria-haspopup": "dialog", "aria-expanded": "false" };
  const button = el("button", attributes, label, chosen, chevron);
  const line = el("p", { class: "ws-pick-line ws-ellipsis" });
  return {
    button,
    elements: [button, line],
    /**
     * @param {Choice} choice
     * @param {Strings} strings
     */
    update(choice, strings) {
      setText(label, strings.pickGpus);
      for (const place of [chosen, line]) {
        setText(place, choice.text);
        setAttribute(place, "title", choice.text);
      }
      chosen.classList.toggle("ws-pick-warning", choice.warning);
      setShown(button, choice.choosable);
      setShown(line, !choice.choosable);
    },
  };
}

/**
 * As if it was typed.
 * @param {any} app
 * @param {any} node
 * @param {any} input
 * @param {string} text
 */
function write(app, node, input, text) {
  const before = input.value;
  input.value = text;
  input.callback?.(text, app.canvas, node);
  node.onWidgetChanged?.(INPUT, text, before, input);
  app.canvas?.setDirty?.(true, true);
  // A step of undo. The host looks for changes when a mouse button goes up, and what that presses is pressed later.
  const tracker = app.extensionManager?.workflow?.activeWorkflow?.changeTracker;
  (tracker?.captureCanvasState ?? tracker?.checkState)?.call(tracker);
}

/** @param {any} node */
function isLinked(node) {
  const slot = (node.inputs ?? []).find((/** @type {any} */ each) => each.name === INPUT);
  return slot?.link !== undefined && slot.link !== null;
}

/**
 * Call `then` behind a method of an object that may have none.
 * @param {any} object
 * @param {string} name
 * @param {() => void} then
 */
function after(object, name, then) {
  const method = object[name];
  object[name] = function (/** @type {any[]} */ ...values) {
    const result = method?.apply(this, values);
    then();
    return result;
  };
}

/**
 * Keys that press the button must not reach the canvas, which has its own use for them.
 * @param {KeyboardEvent} event
 */
function keep(event) {
  if (event.key === " " || event.key === "Enter") event.stopPropagation();
}
