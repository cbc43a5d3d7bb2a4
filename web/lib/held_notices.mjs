/**
 * Which notices still hold: not those of another workflow, nor of a node whose inputs are others now. The server knows
 * neither. And what the host refused to run at all, which the server has not heard of.
 */

import { NOTICE_EVENT } from "./toasts.mjs";

/** @import { Server } from "./feed.mjs" */
/** @import { Notice } from "./status.mjs" */
/** @import { Workflows } from "./workflows.mjs" */

/** @typedef {{workflow: object | null, inputs: string | null}} Seen  as it was when the notice was new */

// Behind the name of the input in what the host says of an input that we refuse.
const DETAILS = /^\w+ - (?=.)/s;
const OURS = "WeightStream";
const MOST_SEEN = 100;

/**
 * @param {{app: any, api: Server, workflows: Workflows, find: (id: string) => any}} options  find: a node of ours
 * @returns {(notices: readonly Notice[]) => Notice[]}
 */
export function heldNotices({ app, api, workflows, find }) {
  /** @type {Map<string, Seen>} */
  const seen = new Map();

  /** @param {Notice} notice */
  const inputsOf = ({ node_id: id }) => {
    const node = id === null ? null : find(id);
    const values = (node?.widgets ?? []).filter((/** @type {any} */ widget) => widget.serialize !== false);
    return node ? JSON.stringify(values.map((/** @type {any} */ { name, value }) => [name, value])) : null;
  };
  /**
   * @param {Notice} notice
   * @param {object | null} workflow
   */
  const look = (notice, workflow) => ({ workflow, inputs: workflow === null || workflow === workflows.open() ? inputsOf(notice) : null });

  api.addEventListener(NOTICE_EVENT, ({ detail }) => {
    seen.set(keyOf(detail), look(detail, workflows.running()));
    for (const oldest of [...seen.keys()].slice(0, -MOST_SEEN)) seen.delete(oldest);
  });
  // What is refused again is refused with what the inputs are now.
  api.addEventListener("promptQueueing", () => {
    for (const key of [...seen.keys()]) if (JSON.parse(key).at(-1) === "refused") seen.delete(key);
  });

  /** @param {Notice} notice */
  function holds(notice) {
    const { workflow, inputs } = /** @type {Seen} */ (seen.get(keyOf(notice)));
    if (workflow !== null && workflow !== workflows.open()) return false;
    const now = inputsOf(notice);
    return inputs === null || now === null || inputs === now;
  }

  return (notices) => {
    const all = [...notices, ...refused(app.lastNodeErrors)];
    for (const notice of all.filter((each) => !seen.has(keyOf(each)))) {
      seen.set(keyOf(notice), look(notice, notice.kind === "refused" ? workflows.queued() : null));
    }
    return all.filter(holds);
  };
}

/** @param {Notice} notice */
function keyOf({ node_id: id, name, kind, text }) {
  return JSON.stringify([id, name, text, kind]);
}

/**
 * What the host found wrong with our nodes when it was asked to run them.
 * @param {Record<string, {class_type: string, errors: {message: string, details?: string}[]}> | null | undefined} errors
 * @returns {Notice[]}
 */
function refused(errors) {
  return Object.entries(errors ?? {}).filter(([, { class_type: kind }]) => String(kind).startsWith(OURS)).flatMap(([id, node]) =>
    node.errors.map(({ message, details }) => ({
      node_id: id, name: node.class_type, kind: /** @type {const} */ ("refused"), text: (details ?? "").replace(DETAILS, "") || message,
    })),
  );
}
