/**
 * The models that loaders of the open workflow name: by our loader, and by ComfyUI's Load Diffusion Model.
 */

/**
 * @typedef {{node: string, title: string, name: string, folder: string, weightDtype: string, limit: number, streams: boolean, placed: boolean}} GraphModel
 *   node, title: its loader, with the subgraphs around it; folder: "" where its loader looks in several; limit: GiB of VRAM, 0
 *   where the loader sets none; streams: whether something of ours can have it stream as the workflow is; placed: whether
 *   that may be on several GPUs
 */

/** @type {Record<string, {folder: string, ours: boolean}>} */
const LOADERS = {
  WeightStreamModelLoader: { folder: "", ours: true },
  UNETLoader: { folder: "diffusion_models", ours: false },
};
// Behind another loader they have its model stream.
const SETTINGS = "WeightStreamOffloadSettings";
const PLACEMENT = "WeightStreamGPUPlacement";
// Nodes that are muted or bypassed load nothing.
const ALWAYS = 0;
// The link of an input inside of a subgraph that comes from around it. Pages have it as a number or as text.
const FROM_OUTSIDE = -10;

/**
 * @param {any} app  the host's
 * @returns {GraphModel[]}  each file once
 */
export function graphModels(app) {
  const places = [...nodesOf(app.rootGraph ?? app.graph, [])];
  const kinds = new Set(places.map(({ node }) => kindOf(node)));
  const placed = kinds.has(PLACEMENT);
  /** @type {Map<string, GraphModel>} */
  const found = new Map();
  for (const place of places) {
    const loader = LOADERS[kindOf(place.node)];
    const name = loader && valueOf(place, "unet_name");
    if (!name || typeof name !== "string") continue;
    const key = `${loader.folder}/${name}`;
    if (found.has(key)) continue;
    found.set(key, {
      node: [...place.outer, place.node].map(({ id }) => id).join(":"),
      title: String(place.node.title ?? ""),
      name,
      folder: loader.folder,
      weightDtype: String(valueOf(place, "weight_dtype") ?? "default"),
      limit: Number(valueOf(place, "vram_limit_gb") ?? 0) || 0,
      streams: loader.ours || placed || kinds.has(SETTINGS),
      placed,
    });
  }
  return [...found.values()];
}

/** @typedef {{node: any, outer: any[]}} Place  a node, and the nodes of the subgraphs around it, the outermost first */

/**
 * @param {any} graph
 * @param {any[]} outer
 * @returns {Generator<Place>}
 */
function* nodesOf(graph, outer) {
  for (const node of graph?.nodes ?? []) {
    if ((node.mode ?? ALWAYS) !== ALWAYS) continue;
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
