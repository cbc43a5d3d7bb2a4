/**
 * "Stream this workflow's models": the server converts the open workflow (streaming/workflows), the page shows the
 * result in its place, as one step that undo takes back, and says what was changed and what was not.
 *
 * [Note: one step of undo]
 * The page keeps states of the workflow before and behind the one that is shown, and redo shows the next one. So the
 * converted workflow is put there as what comes next. To load it as a new workflow would make a tab of its own or lose
 * the steps before. What the page then makes of it (sizes of nodes, inputs that were added since) is no step either.
 */

import { NOTES_IN_CHINESE, takeoverStrings } from "./takeover_strings.mjs";

export const COMMAND = "WeightStream.StreamModels";
const ROUTE = "/weightstream/v1/convert";
const ICON = "pi pi-bolt";
const SHOWN_MS = 8000;
// What the page itself changes: where one looks at the graph from, and room for what a run shows on a node.
const LOOKS = ["ds", "size"];
const MOST_LINES = 8;
// Their English text goes on with what the node is or does now.
const PREDICATES = ["loader", "host", "settings-clip", "placement-used", "selector-gone"];

/**
 * @typedef {{code: string, weight: "changed" | "differs" | "left", node: string, kind: string, graph: string,
 *   values: Record<string, any>, text: string}} Note
 * @typedef {{workflow: any, changed: boolean, notes: Note[]}} Conversion
 */

/** @param {{app: any, api: any, locale: () => string}} host */
export function takeover({ app, api, locale }) {
  let running = false;

  async function run() {
    // A second click while the first is under way has nothing to do.
    if (running) return;
    running = true;
    try {
      await convertOpenWorkflow();
    } catch (error) {
      const { failed } = takeoverStrings(locale());
      app.extensionManager.toast.add({ severity: "error", summary: failed, detail: String(error), life: SHOWN_MS });
    } finally {
      running = false;
    }
  }

  async function convertOpenWorkflow() {
    const strings = takeoverStrings(locale());
    const toast = app.extensionManager.toast;
    const refuse = (/** @type {string} */ detail) =>
      toast.add({ severity: "error", summary: strings.failed, detail, life: SHOWN_MS });
    const asked = shownIn(app);
    const answer = await ask(api, asked.workflow);
    if ("failure" in answer) {
      refuse(strings.because(answer.failure));
      return;
    }
    // Another tab, or another state of this one, is not what was converted.
    const now = shownIn(app);
    if (now.tab !== asked.tab || now.text !== asked.text) {
      refuse(strings.meanwhile);
      return;
    }
    if (answer.changed) await replaceWorkflow(app, answer.workflow);
    toast.add(message(answer, locale(), nameOf));
  }

  const entry = () => ({ content: takeoverStrings(locale()).command, callback: run });
  return {
    command: { id: COMMAND, label: takeoverStrings(locale()).command, icon: ICON, function: run },
    menu: { path: ["Extensions", "WeightStream"], commands: [COMMAND] },
    canvasItems: () => [null, entry()],
    /** @param {any} node */
    nodeItems: (node) => (isLoader(node) ? [entry()] : []),
  };
}

/**
 * The workflow that is open: in which tab, and what is in it.
 * @param {any} app
 */
function shownIn(app) {
  const workflow = (app.rootGraph ?? app.graph).serialize();
  const text = JSON.stringify(workflow, (key, value) => (LOOKS.includes(key) ? undefined : value));
  return { tab: app.extensionManager.workflow?.activeWorkflow, workflow, text };
}

/**
 * @param {any} api
 * @param {any} workflow
 * @returns {Promise<Conversion | {failure: string | number}>} why not: in words, or as an HTTP status
 */
async function ask(api, workflow) {
  try {
    const response = await api.fetchApi(ROUTE, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(workflow),
    });
    if (response.ok) return await response.json();
    if (response.status !== 400) return { failure: response.status };
    const { error } = await response.json();
    return { failure: String(error) };
  } catch (error) {
    return { failure: String(error) };
  }
}

/**
 * Show a workflow in the place of the one that is open (Note: one step of undo).
 * @param {any} app
 * @param {any} workflow
 */
export async function replaceWorkflow(app, workflow) {
  const tracker = app.extensionManager.workflow?.activeWorkflow?.changeTracker;
  if (!tracker?.redoQueue) {
    await app.loadGraphData(workflow, true, false);
    return;
  }
  // What was typed and not noted yet belongs to the state that undo returns to.
  (tracker.captureCanvasState ?? tracker.checkState).call(tracker);
  const before = tracker.activeState;
  tracker.redoQueue.splice(0, Infinity, workflow);
  await tracker.redo();
  tracker.activeState = JSON.parse(JSON.stringify((app.rootGraph ?? app.graph).serialize()));
  tracker.updateModified(before);
}

/**
 * What the user is told.
 * @param {Conversion} conversion
 * @param {string} locale
 * @param {(kind: string) => string} [named]  what the page calls nodes of a kind
 */
export function message({ changed, notes }, locale, named = (kind) => kind) {
  const strings = takeoverStrings(locale);
  /** The nodes that a name may mean. @type {Map<string, Set<string>>} */
  const meant = new Map();
  for (const note of notes) {
    const name = strings.where(named(note.kind), note.graph);
    meant.set(name, (meant.get(name) ?? new Set()).add(note.node));
  }
  const called = (/** @type {Note} */ note) => {
    const several = (meant.get(strings.where(named(note.kind), note.graph))?.size ?? 0) > 1;
    return strings.where(several ? strings.numbered(named(note.kind), note.node) : named(note.kind), note.graph);
  };
  const left = notes.filter((note) => note.weight !== "changed");
  const lines = [...notes].sort((one, other) => rank(one) - rank(other)).map((note) => line(note, locale, called(note)));
  const more = lines.length - MOST_LINES;
  const models = countModels(notes);
  return {
    severity: left.length > 0 ? "warn" : changed ? "success" : "info",
    summary: changed ? strings.changed(models) : strings.unchanged,
    detail: [...lines.slice(0, MOST_LINES), ...(more > 0 ? [strings.more(more)] : []), ...(changed ? [...(models > 0 ? [strings.next] : []), strings.undo] : [])].join("\n"),
    // What is left to the user stays until it was read.
    ...(left.length > 0 ? {} : { life: SHOWN_MS }),
  };
}

/** @param {Note} note  what is left to the user comes first: there may be more than is shown */
const rank = (note) => ["left", "differs", "changed"].indexOf(note.weight);

/** @param {Note[]} notes */
const countModels = (notes) => notes.filter((note) => note.code === "loader" || note.code === "settings").length;

/**
 * @param {Note} note
 * @param {string} locale
 * @param {string} node  what it is called
 */
function line(note, locale, node) {
  const strings = takeoverStrings(locale);
  const text = strings.chinese ? (NOTES_IN_CHINESE[note.code]?.(note.values) ?? note.text) : note.text;
  return PREDICATES.includes(note.code) ? strings.becomes(node, text) : strings.note(node, text);
}

/** @param {string} kind  of nodes; an archived one has no name in the page */
function nameOf(kind) {
  return String(/** @type {any} */ (globalThis).LiteGraph?.registered_node_types?.[kind]?.title ?? kind);
}

/** @param {any} node  whether its entry makes sense on this node's menu: it gives a MODEL and takes none, or is archived */
export function isLoader(node) {
  const type = String(node.comfyClass ?? node.type);
  if (type.endsWith("MultiGPU")) return true;
  if (type.startsWith("WeightStream")) return false;
  const has = (/** @type {{type: unknown}[] | undefined} */ slots) => (slots ?? []).some((slot) => slot.type === "MODEL");
  return has(node.outputs) && !has(node.inputs);
}
