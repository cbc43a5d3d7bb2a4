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
const MOST_LINES = 8;

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
    } finally {
      running = false;
    }
  }

  async function convertOpenWorkflow() {
    const strings = takeoverStrings(locale());
    const toast = app.extensionManager.toast;
    const answer = await ask(api, (app.rootGraph ?? app.graph).serialize());
    if ("error" in answer) {
      toast.add({ severity: "error", summary: strings.failed, detail: strings.because(answer.error), life: SHOWN_MS });
      return;
    }
    if (answer.changed) await replaceWorkflow(app, answer.workflow);
    toast.add(message(answer, locale()));
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
 * @param {any} api
 * @param {any} workflow
 * @returns {Promise<Conversion | {error: string | null}>} an error of null is a server without this route
 */
async function ask(api, workflow) {
  try {
    const response = await api.fetchApi(ROUTE, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(workflow),
    });
    if (response.ok) return await response.json();
    return { error: response.status === 400 ? (await response.json()).error : null };
  } catch (error) {
    return { error: String(error) };
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
 */
export function message({ changed, notes }, locale) {
  const strings = takeoverStrings(locale);
  const left = notes.filter((note) => note.weight !== "changed");
  const lines = [...notes].sort((one, other) => rank(one) - rank(other)).map((note) => line(note, locale));
  const more = lines.length - MOST_LINES;
  return {
    severity: left.length > 0 ? "warn" : changed ? "success" : "info",
    summary: changed ? strings.changed(countModels(notes)) : strings.unchanged,
    detail: [...lines.slice(0, MOST_LINES), ...(more > 0 ? [strings.more(more)] : []), ...(changed ? [strings.undo] : [])].join("\n"),
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
 */
function line(note, locale) {
  const strings = takeoverStrings(locale);
  const text = strings.chinese ? (NOTES_IN_CHINESE[note.code]?.(note.values) ?? note.text) : note.text;
  return strings.note(note.graph, note.node, note.kind, text);
}

/** @param {any} node  whether its entry makes sense on this node's menu: it gives a MODEL and takes none, or is archived */
export function isLoader(node) {
  const type = String(node.comfyClass ?? node.type);
  if (type.endsWith("MultiGPU")) return true;
  if (type.startsWith("WeightStream")) return false;
  const has = (/** @type {{type: unknown}[] | undefined} */ slots) => (slots ?? []).some((slot) => slot.type === "MODEL");
  return has(node.outputs) && !has(node.inputs);
}
