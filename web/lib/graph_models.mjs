/**
 * The models that loaders of the open workflow name: by our loader, and by ComfyUI's Load Diffusion Model.
 */

import { behind, isActive } from "./model_links.mjs";
import { presetsOf } from "./settings_widgets.mjs";

/** @import { Place } from "./model_links.mjs" */

/**
 * @typedef {{limit: number, reserve: number, pinnedLimit: number, mode: string, pinMemory: string, packing: string}} Wanted
 *   limit: GiB of VRAM for weights, reserve: GiB of it that stay free, pinnedLimit: GiB that may be page-locked; 0 where no node
 *   sets it. mode, pinMemory, packing: as chosen, "auto" where no node does
 * @typedef {{node: string, title: string, name: string, folder: string, weightDtype: string, limitBySettings: boolean,
 *   streams: boolean, placed: boolean} & Wanted} GraphModel
 *   node, title: its loader, with the subgraphs around it; folder: "" where its loader looks in several; limitBySettings: whether
 *   Async Offload Settings sets the limit, and not the loader; streams: whether something of ours has it stream as the workflow
 *   is; placed: whether that may be on several GPUs
 */

/** @type {Record<string, {folder: string, ours: boolean}>} */
const LOADERS = {
  WeightStreamModelLoader: { folder: "", ours: true },
  UNETLoader: { folder: "diffusion_models", ours: false },
};
// Behind another loader they have its model stream.
const SETTINGS = "WeightStreamOffloadSettings";
const PLACEMENT = "WeightStreamGPUPlacement";
export const AUTO = "auto";
export const OFF = "off";
// The link of an input inside of a subgraph that comes from around it. Pages have it as a number or as text.
const FROM_OUTSIDE = -10;

/**
 * @param {any} app  the host's
 * @returns {GraphModel[]}  each file once, and again where other nodes decide otherwise
 */
export function graphModels(app) {
  const root = app.rootGraph ?? app.graph;
  /** @type {Map<string, GraphModel>} */
  const found = new Map();
  for (const place of nodesOf(root, [])) {
    const loader = LOADERS[kindOf(place.node)];
    const name = loader && valueOf(place, "unet_name");
    if (!name || typeof name !== "string") continue;
    const model = {
      name,
      folder: loader.folder,
      weightDtype: String(valueOf(place, "weight_dtype") ?? "default"),
      ...decided(root, place, loader.ours),
    };
    const key = JSON.stringify(model);
    if (found.has(key)) continue;
    const node = [...place.outer, place.node].map(({ id }) => id).join(":");
    found.set(key, { node, title: String(place.node.title ?? ""), ...model });
  }
  return [...found.values()];
}

/**
 * What the loader and the nodes behind it decide. Where ways part, it is those on the way with most of Async Offload Settings.
 * @param {any} root
 * @param {Place} loader
 * @param {boolean} ours
 */
function decided(root, loader, ours) {
  /** @type {Place[]} */
  let settings = [];
  let placed = false;
  for (const { place, before } of behind(root, loader)) {
    placed ||= kindOf(place.node) === PLACEMENT;
    const onWay = [...before, place].filter(({ node }) => kindOf(node) === SETTINGS);
    if (onWay.length > settings.length) settings = onWay;
  }
  const own = gib(valueOf(loader, "vram_limit_gb"));
  const last = settings.length > 0 ? wantedOf(settings[settings.length - 1]) : NOTHING;
  // The last one decides; where it sets no limit of VRAM, that of a node before holds (OffloadSettings.over).
  const limits = settings.map((place) => wantedOf(place).limit);
  const limit = limits.findLast((each) => each > 0) ?? own;
  const streams = last.mode !== OFF && (ours || placed || settings.length > 0);
  return { ...last, limit, limitBySettings: limits.some((each) => each > 0), streams, placed };
}

/** @type {Wanted} */
const NOTHING = { limit: 0, reserve: 0, pinnedLimit: 0, mode: AUTO, pinMemory: AUTO, packing: AUTO };

/**
 * What Async Offload Settings decide: a preset all of it, whatever the inputs say (nodes/settings.py, Note: presets).
 * @param {Place} place
 * @returns {Wanted}
 */
function wantedOf(place) {
  const preset = presetsOf(place.node)?.[String(valueOf(place, "preset"))] ?? {};
  const value = (/** @type {string} */ name) => preset[name] ?? valueOf(place, name);
  return {
    limit: gib(value("vram_limit_gb")),
    reserve: gib(value("reserve_vram_gb")),
    pinnedLimit: gib(value("pinned_limit_gb")),
    mode: String(value("mode") ?? AUTO),
    pinMemory: String(value("pin_memory") ?? AUTO),
    packing: String(value("packing") ?? AUTO),
  };
}

/** @param {unknown} value */
function gib(value) {
  return Number(value ?? 0) || 0;
}

/**
 * @param {any} graph
 * @param {any[]} outer
 * @returns {Generator<Place>}
 */
function* nodesOf(graph, outer) {
  for (const node of graph?.nodes ?? []) {
    // What is muted or bypassed loads nothing.
    if (!isActive(node)) continue;
    yield { node, outer };
    if (node.subgraph && !outer.includes(node)) yield* nodesOf(node.subgraph, [...outer, node]);
  }
}

/** @param {any} node */
function kindOf(node) {
  return String(node.comfyClass ?? node.type);
}

/**
 * What an input has: its own value, or that of the subgraph around it; undefined where another node gives it.
 * @param {Place} place
 * @param {string} name
 * @returns {unknown}
 */
function valueOf({ node, outer }, name) {
  const input = node.inputs?.find((/** @type {any} */ each) => (each.widget?.name ?? each.name) === name);
  if (input?.link === null || input?.link === undefined) {
    return node.widgets?.find((/** @type {any} */ widget) => widget.name === name)?.value;
  }
  const around = outer.at(-1);
  const link = around?.subgraph.getLink?.(input.link);
  const promoted = Number(link?.origin_id) === FROM_OUTSIDE ? around.inputs?.[link.origin_slot] : undefined;
  return promoted ? valueOf({ node: around, outer: outer.slice(0, -1) }, promoted.widget?.name ?? promoted.name) : undefined;
}
