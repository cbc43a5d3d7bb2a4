/**
 * The nodes of the graph that is open: what they are called, how to get there, and which models they load.
 */

import { graphModels } from "./graph_models.mjs";

/** @import { GraphModel } from "./graph_models.mjs" */

/**
 * @typedef {object} GraphNodes
 * @property {(id: string) => string} title  "" where the graph has no such node
 * @property {(id: string) => void} show
 * @property {() => GraphModel[]} models  those that its loaders name
 */

/** Where there is no graph. @type {GraphNodes} */
export const NO_NODES = { title: () => "", show: () => {}, models: () => [] };

/**
 * @param {any} app  the host's
 * @returns {GraphNodes}
 */
export function graphNodes(app) {
  return {
    models: () => graphModels(app),
    title: (id) => String(find(app, id)?.title ?? ""),
    show(id) {
      const node = find(app, id);
      if (!node) return;
      const canvas = app.canvas;
      // A node in a subgraph is shown inside of it.
      if (node.graph && canvas.graph !== node.graph) canvas.setGraph?.(node.graph);
      canvas.centerOnNode(node);
      canvas.selectNode?.(node);
      canvas.setDirty?.(true, true);
    },
  };
}

/**
 * @param {any} app
 * @param {string} id  of nodes in subgraphs with those around it: `12:7`
 */
function find(app, id) {
  let graph = app.rootGraph ?? app.graph;
  let node = null;
  for (const part of id.split(":")) {
    node = graph?.getNodeById?.(Number.isNaN(Number(part)) ? part : Number(part)) ?? null;
    graph = node?.subgraph;
  }
  return node;
}
