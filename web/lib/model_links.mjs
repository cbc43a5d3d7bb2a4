/**
 * Where the MODEL of a loader goes: the nodes behind it, in and out of subgraphs.
 */

/**
 * @typedef {{node: any, outer: any[]}} Place  a node, and the nodes of the subgraphs around it, the outermost first
 * @typedef {{place: Place, before: Place[]}} Behind  before: the nodes between it and the loader, the nearest to that first
 */

const MODEL = "MODEL";
// A reroute gives whatever it takes.
const ANY = "*";
// Modes of nodes. What is bypassed gives what it takes, what is muted gives nothing.
const ALWAYS = 0;
const MUTED = 2;
// The ends of links in a subgraph that lead out of it. Pages have them as numbers or as text.
const OUT = -20;

// Nodes of other packs that give on by a name, in the graph that they are in (streaming/workflows/kinds.py).
const SETTERS = new Set(["SetNode", "easy setNode"]);
const GETTERS = new Set(["GetNode", "easy getNode"]);

/** @param {any} node */
export function isActive(node) {
  return (node.mode ?? ALWAYS) === ALWAYS;
}

/**
 * Each node behind the MODEL of `first`, once, the nearer ones first. Those that are bypassed only lead on.
 * @param {any} root  the outermost graph
 * @param {Place} first
 * @returns {Generator<Behind>}
 */
export function* behind(root, first) {
  /** @type {Map<any, Set<string>>} */
  const seen = new Map();
  /** @type {Behind[]} */
  const found = [{ place: first, before: [] }];
  for (const { place, before } of found) {
    const way = place === first ? [] : [...before, ...(isActive(place.node) ? [place] : [])];
    for (const next of nextOf(root, place)) {
      const around = next.outer.map(({ id }) => id).join(":");
      const known = seen.get(next.node) ?? new Set();
      seen.set(next.node, known);
      if (known.has(around) || next.node.mode === MUTED) continue;
      known.add(around);
      const there = { place: next, before: way };
      found.push(there);
      if (isActive(next.node)) yield there;
    }
  }
}

/**
 * @param {any} root
 * @param {Place} place
 * @returns {Generator<Place>}
 */
function* nextOf(root, { node, outer }) {
  for (const { type, links } of node.outputs ?? []) {
    if (type === MODEL || type === ANY) for (const id of links ?? []) yield* endsOf(root, outer, id);
  }
  if (SETTERS.has(node.type)) yield* gettersOf(outer.at(-1)?.subgraph ?? root, node).map((getter) => ({ node: getter, outer }));
}

/**
 * The nodes that give what a setter takes.
 * @param {any} graph
 * @param {any} setter
 * @returns {any[]}
 */
function gettersOf(graph, setter) {
  const name = nameOf(setter);
  return graph.nodes.filter((/** @type {any} */ node) => GETTERS.has(node.type) && name && nameOf(node) === name);
}

/** @param {any} node */
function nameOf(node) {
  return node.widgets?.[0]?.value;
}

/**
 * The nodes to which a link leads, through the frames of subgraphs.
 * @param {any} root
 * @param {any[]} outer  the nodes of the subgraphs around it
 * @param {unknown} id
 * @returns {Generator<Place>}
 */
function* endsOf(root, outer, id) {
  const graph = outer.at(-1)?.subgraph ?? root;
  const link = graph.getLink?.(id);
  if (!link) return;
  if (Number(link.target_id) === OUT) {
    const out = outer.at(-1)?.outputs?.[link.target_slot];
    for (const next of out?.links ?? []) yield* endsOf(root, outer.slice(0, -1), next);
    return;
  }
  const node = graph.nodes.find((/** @type {any} */ each) => String(each.id) === String(link.target_id));
  if (!node) return;
  if (!node.subgraph || !isActive(node) || outer.includes(node)) {
    yield { node, outer };
    return;
  }
  for (const next of node.subgraph.inputs?.[link.target_slot]?.linkIds ?? []) yield* endsOf(root, [...outer, node], next);
}
