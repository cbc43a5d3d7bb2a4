/**
 * The inputs of our nodes on the canvas: 0 is shown as what it means, and a preset sets the others.
 */

import { stringsFor } from "./strings.mjs";

export const AUTOMATIC = ["copy_streams", "prefetch_depth", "vram_limit_gb", "reserve_vram_gb"];
export const UNLIMITED = ["pinned_limit_gb"];
const PRESET = "preset";
const CUSTOM = "custom";

/** @param {{locale: () => string}} options */
export function settingsWidgets({ locale }) {
  return {
    /** @param {any} node  one that the host has just made */
    add(node) {
      if (!String(node.comfyClass ?? node.type).startsWith("WeightStream")) return;
      for (const widget of node.widgets ?? []) {
        if (AUTOMATIC.includes(widget.name)) showZero(widget, () => stringsFor(locale()).automatic);
        if (UNLIMITED.includes(widget.name)) showZero(widget, () => stringsFor(locale()).unlimited);
      }
      followPreset(node);
    },
  };
}

/**
 * Have a number that is drawn on the canvas show a word where it is 0. Nodes 2.0 has no place for that.
 * @param {any} widget
 * @param {() => string} word
 */
function showZero(widget, word) {
  const drawn = findGetter(widget, "_displayValue");
  if (!drawn) return;
  Object.defineProperty(widget, "_displayValue", {
    configurable: true,
    get() {
      return Number(this.value) === 0 && !this.computedDisabled ? word() : drawn.call(this);
    },
  });
}

/**
 * @param {any} object
 * @param {string} name
 * @returns {(() => unknown) | undefined}
 */
function findGetter(object, name) {
  for (let one = object; one; one = Object.getPrototypeOf(one)) {
    const found = Object.getOwnPropertyDescriptor(one, name);
    if (found) return found.get;
  }
  return undefined;
}

/**
 * A preset sets the other inputs, and one of these that is set by hand makes it "custom": what is shown is in effect.
 * What each preset decides is the server's to say (nodes/settings.py, Note: presets).
 * @param {any} node
 */
function followPreset(node) {
  const widgets = node.widgets ?? [];
  const preset = widgets.find((/** @type {any} */ widget) => widget.name === PRESET);
  const presets = preset && presetsOf(node);
  if (!presets) return;
  let setting = false;
  after(preset, () => {
    const decided = presets[preset.value] ?? {};
    setting = true;
    for (const widget of widgets.filter((/** @type {any} */ each) => each.name in decided)) {
      widget.value = decided[widget.name];
    }
    setting = false;
    node.setDirtyCanvas?.(true, true);
  });
  for (const widget of widgets.filter((/** @type {any} */ each) => each.name in (presets.fastest ?? {}))) {
    after(widget, () => {
      if (!setting && preset.value !== CUSTOM) preset.value = CUSTOM;
    });
  }
}

/**
 * What each preset of Async Offload Settings decides, by its name; undefined of other nodes.
 * @param {any} node
 * @returns {Record<string, Record<string, any>> | undefined}
 */
export function presetsOf(node) {
  const { inputs, input } = node.constructor?.nodeData ?? {};
  return inputs?.[PRESET]?.weightstream_presets ?? input?.optional?.[PRESET]?.[1]?.weightstream_presets;
}

/**
 * Call `then` when somebody has set the value of a widget in the page; not when a workflow is loaded.
 * @param {any} widget
 * @param {() => void} then
 */
function after(widget, then) {
  const { callback } = widget;
  widget.callback = function (/** @type {any[]} */ ...values) {
    const result = callback?.apply(this, values);
    then();
    return result;
  };
}
