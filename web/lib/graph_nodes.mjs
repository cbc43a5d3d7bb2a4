/**
 * The nodes of the graph that is open: what they are called, how to get there, and which models they load.
 */

import { graphModels } from "./graph_models.mjs";
import { heldNotices } from "./held_notices.mjs";

/** @import { GraphModel } from "./graph_models.mjs" */
/** @import { Notice } from "./status.mjs" */
/** @import { Workflows } from "./workflows.mjs" */

const OURS = "WeightStream";
const FOLDERS = /^.*[\\/]/;

/**
 * @typedef {object} GraphNodes
 * @property {(id: string, model?: string) => string} title  of one of our nodes that a prompt had; "" where the graph has none
 *   with this id, or it loads another model: what the server tells may be of another workflow
 * @property {(id: string) => void} show
 * @property {() => GraphModel[]} models  those that its loaders name
 * @property {(notices: readonly Notice[]) => Notice[]} notices  those of the server that still hold here, and what the host refused
 */

/** Where there is no graph. @type {GraphNodes} */
export const NO_NODES = { title: () => "", show: () => {}, models: () => [], notices: (notices) => [...notices] };

/**
 * @param {any} app  the host's
 * @param {Workflows} workflows
 * @param {import("./feed.mjs").Server} api
 * @returns {GraphNodes}
 */
export function graphNodes(app, workflows, api) {
  return {
    models: () => graphModels(app),
    title(id, model) {
      const node = findOurs(app, id).at(-1);
      if (!node) return "";
      const loads = model && graphModels(app).find((each) => each.node === id);
      return loads && fileOf(loads.name) !== fileOf(model) ? "" : String(node.title ?? "");
    },
    show(id) {
      const node = findPath(app, id).at(-1);
      if (!node) return;
      const canvas = app.canvas;
      // A node in a subgraph is shown inside of it.
      if (node.graph && canvas.graph !== node.graph) canvas.setGraph?.(node.graph);
      canvas.centerOnNode(node);
      canvas.selectNode?.(node);
      canvas.setDirty?.(true, true);
    },
    notices: heldNotices({ app, api, workflows, find: (id) => findOurs(app, id).at(-1) }),
  };
}

/** @param {any} node */
export function isOurs(node) {
  return String(node.comfyClass ?? node.type).startsWith(OURS);
}

/**
 * As `findPath`; empty where the node is none of ours.
 * @param {any} app
 * @param {string} id
 */
export function findOurs(app, id) {
  const path = findPath(app, id);
  return path.length > 0 && isOurs(path[path.length - 1]) ? path : [];
}

/**
 * The node with an id of a prompt, `4`, or `7:4` for a node of a subgraph; the subgraphs' nodes that it is in before it.
 * @param {any} app
 * @param {string} id
 * @returns {any[]}  empty where the graph has no such node
 */
function findPath(app, id) {
  let graph = app.rootGraph ?? app.graph;
  const path = [];
  for (const part of String(id).split(":")) {
    // Pages have ids as numbers or as text.
    const node = graph?.getNodeById?.(part) ?? graph?.getNodeById?.(Number(part)) ?? null;
    if (!node) return [];
    path.push(node);
    graph = node.subgraph;
  }
  return path;
}

/** @param {string} name */
function fileOf(name) {
  return name.replace(FOLDERS, "");
}
