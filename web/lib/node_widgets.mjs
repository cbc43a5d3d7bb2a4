/**
 * VRAM in short on nodes, while the setting says so.
 */

import { mountSummary } from "./node_summary.mjs";
import { takePlace } from "./take_place.mjs";

const NODE_TYPES = ["WeightStreamGPUPlacement"];
const NAME = "weightstream_vram";
const HOLDER = ".ws-holder:not(.ws-line-holder)";
// As in the style sheet, which Nodes 2.0 goes by.
const MIN_HEIGHT = 110;

/**
 * @param {{app: any, feed: import("./feed.mjs").Feed, locale: () => string, nodes: import("./graph_nodes.mjs").GraphNodes,
 *   openPanel: () => void}} options
 */
export function nodeWidgets({ app, feed, locale, nodes, openPanel }) {
  /** Nodes that are in a graph: of others the host does not say when they are gone. @type {Set<any>} */
  const present = new Set();
  /** @type {WeakMap<any, {widget: any, holder: HTMLElement, panel: {destroy(): void} | null}>} */
  const attached = new WeakMap();
  let shown = true;

  /** @param {any} node */
  function attach(node) {
    if (attached.has(node)) return;
    const holder = document.createElement("div");
    holder.className = "ws-holder";
    const widget = node.addDOMWidget(NAME, NAME, holder, {
      serialize: false,
      // Always the same, so that what the panel shows never changes the size of a node, which is saved.
      getMinHeight: () => MIN_HEIGHT,
    });
    // The option keeps it out of prompts, and this out of saved workflows.
    widget.serialize = false;
    holder.addEventListener("wheel", (event) => zoom(event, holder), { passive: false });
    holder.addEventListener("keydown", keep);
    attached.set(node, { widget, holder, panel: null });
  }

  /**
   * Make room at once. The host does so too, but only while it draws, and what it has drawn then is the old size.
   * @param {any} node
   */
  function grow(node) {
    const height = node.computeSize?.()[1] ?? 0;
    if (node.size[1] < height) node.setSize([node.size[0], height]);
    app.canvas?.setDirty?.(true, true);
  }

  /** @param {any} node */
  function open(node) {
    attach(node);
    grow(node);
    const place = attached.get(node);
    if (place && !place.panel) place.panel = mountSummary(place.holder, { feed, locale, nodes, open: openPanel });
  }

  /** @param {any} node */
  function close(node) {
    const place = attached.get(node);
    place?.panel?.destroy();
    if (place) place.panel = null;
  }

  /** @param {any} node */
  function detach(node) {
    const place = attached.get(node);
    if (!place) return;
    close(node);
    attached.delete(node);
    node.removeWidget(place.widget);
  }

  /**
   * What the panel cannot scroll is meant for the canvas.
   * @param {WheelEvent} event
   * @param {HTMLElement} holder
   */
  function zoom(event, holder) {
    const panel = holder.firstElementChild;
    const scrolls = panel !== null && panel.scrollHeight > panel.clientHeight && !event.ctrlKey;
    if (scrolls) event.stopPropagation();
    else if (holder.closest(".dom-widget")) app.canvas?.processMouseWheel?.(event);
  }

  return {
    /** @param {any} node  one that the host has just made */
    add(node) {
      if (!NODE_TYPES.includes(node.comfyClass ?? node.type)) return;
      const { onAdded, onConfigure, onRemoved } = node;
      node.onAdded = function (/** @type {any[]} */ ...values) {
        onAdded?.apply(this, values);
        present.add(node);
        if (shown) open(node);
        else detach(node);
      };
      node.onConfigure = function (/** @type {any[]} */ ...values) {
        onConfigure?.apply(this, values);
        const place = attached.get(node);
        if (place) takePlace(app, node, place.holder, HOLDER);
      };
      node.onRemoved = function (/** @type {any[]} */ ...values) {
        close(node);
        present.delete(node);
        onRemoved?.apply(this, values);
      };
      if (shown) attach(node);
    },
    /** @param {boolean} wanted */
    show(wanted) {
      shown = wanted;
      for (const node of present) {
        if (wanted) open(node);
        else detach(node);
      }
      app.canvas?.setDirty?.(true, true);
    },
  };
}

/**
 * Keys that press a button must not reach the canvas, which has its own use for them.
 * @param {KeyboardEvent} event
 */
function keep(event) {
  if (event.key === " " || event.key === "Enter") event.stopPropagation();
}
