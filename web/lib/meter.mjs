/**
 * Bars that a screen reader reads as meters.
 */

import { el, percentOf, setAttribute, setShown, setStyle } from "./dom.mjs";

/** @import { Meter, Segment } from "./device_view.mjs" */

/**
 * @param {HTMLElement} element
 * @param {Meter} meter
 */
export function updateMeter(element, meter) {
  const known = meter.now !== null;
  // A meter must have a value. A picture with a description need not.
  setAttribute(element, "role", known ? "meter" : "img");
  setAttribute(element, "aria-label", known ? meter.label : `${meter.label}: ${meter.text}`);
  setAttribute(element, "aria-valuemin", known ? "0" : null);
  setAttribute(element, "aria-valuemax", known ? String(meter.max) : null);
  setAttribute(element, "aria-valuenow", known ? String(meter.now) : null);
  setAttribute(element, "aria-valuetext", known ? meter.text : null);
}

/** A bar with one filled part. */
export function simpleBar() {
  const fill = el("div", { class: "ws-segment ws-fill" });
  const element = el("div", { class: "ws-bar ws-bar-thin" }, fill);
  return {
    element,
    /**
     * @param {Meter} meter
     * @param {number | null} fraction
     */
    update(meter, fraction) {
      updateMeter(element, meter);
      element.classList.toggle("ws-unknown", fraction === null);
      setStyle(fill, "width", percentOf(fraction ?? 0));
    },
  };
}

/** A bar of several parts with a mark for the peak. */
export function stackedBar() {
  const peak = el("div", { class: "ws-peak" });
  const element = el("div", { class: "ws-bar" }, peak);
  /** @type {Map<string, HTMLElement>} */
  const parts = new Map();
  return {
    element,
    /**
     * @param {Meter} meter
     * @param {readonly Segment[]} segments
     * @param {number | null} mark
     */
    update(meter, segments, mark) {
      updateMeter(element, meter);
      element.classList.toggle("ws-unknown", meter.now === null);
      for (const { key, start, size } of segments) {
        let part = parts.get(key);
        if (!part) {
          part = el("div", { class: `ws-segment ws-${key}` });
          parts.set(key, part);
          element.insertBefore(part, peak);
        }
        setStyle(part, "left", percentOf(start));
        setStyle(part, "width", percentOf(size));
      }
      setShown(peak, mark !== null);
      setStyle(peak, "left", percentOf(mark ?? 0));
    },
  };
}
