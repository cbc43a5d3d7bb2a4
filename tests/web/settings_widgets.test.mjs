import assert from "node:assert/strict";
import { test } from "node:test";

import { settingsWidgets } from "../../web/lib/settings_widgets.mjs";

const PRESETS = { custom: {}, fastest: { mode: "auto", reserve_vram_gb: 0 }, "leave 2 GiB for others": { mode: "auto", reserve_vram_gb: 2 } };

/** A widget that tells of every new value, whoever sets it, as some pages do. */
class Widget {
  /** @type {any} */
  #value;
  /** @type {((value: any) => void) | undefined} */
  callback;
  computedDisabled = false;

  /**
   * @param {string} name
   * @param {any} value
   */
  constructor(name, value) {
    this.name = name;
    this.#value = value;
  }

  get value() {
    return this.#value;
  }

  set value(/** @type {any} */ value) {
    this.#value = value;
    this.callback?.(value);
  }

  get _displayValue() {
    return `${this.value}`;
  }
}

/** Async Offload Settings as the page has made it. */
function node() {
  const widgets = [new Widget("mode", "auto"), new Widget("reserve_vram_gb", 0), new Widget("pinned_limit_gb", 0), new Widget("preset", "custom"), new Widget("width", 0)];
  class Settings {
    static nodeData = { input: { optional: { preset: [[], { weightstream_presets: PRESETS }] } } };
    type = "WeightStreamOffloadSettings";
    widgets = widgets;
  }
  settingsWidgets({ locale: () => "en" }).add(new Settings());
  return Object.fromEntries(widgets.map((widget) => [widget.name, widget]));
}

test("a preset sets the other inputs and stays, until one of them is set by hand", () => {
  const { mode, preset, reserve_vram_gb: reserve } = node();
  preset.value = "leave 2 GiB for others";
  assert.deepEqual([preset.value, mode.value, reserve.value], ["leave 2 GiB for others", "auto", 2]);
  reserve.value = 3;
  assert.deepEqual([preset.value, reserve.value], ["custom", 3]);
});

test("0 is shown as what it means, but where another node gives the value", () => {
  const { width, reserve_vram_gb: reserve, pinned_limit_gb: limit } = node();
  assert.deepEqual([reserve, limit, width].map((widget) => widget._displayValue), ["auto", "no limit", "0"]);
  reserve.value = 2;
  assert.equal(reserve._displayValue, "2");
  limit.computedDisabled = true;
  assert.equal(limit._displayValue, "0");
});
