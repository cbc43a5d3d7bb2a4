/**
 * The steps of a model's last runs in its card: a small plot of each figure, and a table of the runs side by side.
 */

import { el, setAttribute, setOptional, setShown, setText, svg, syncList } from "./dom.mjs";
import { fold } from "./fold.mjs";
import { PLOT, stepsView } from "./plots.mjs";

/** @import { Part } from "./dom.mjs" */
/** @import { Line, PlotView, RunRow } from "./plots.mjs" */
/** @import { Steps } from "./step_requests.mjs" */
/** @import { Strings } from "./strings.mjs" */

const COLUMNS = /** @type {const} */ (["steps", "seconds", "rate", "waiting"]);

/**
 * @param {string} model
 * @param {Strings} strings
 * @param {Steps} steps
 */
export function stepsCard(model, strings, steps) {
  const plots = el("div", { class: "ws-plots" });
  const body = el("tbody");
  const heads = ["", strings.runSteps, strings.secondsPerStep, strings.copyRate, strings.waitingPart];
  const head = el("tr", {}, ...heads.map((text) => (text ? el("th", { scope: "col" }, text) : el("td"))));
  const table = el("table", { class: "ws-runs" }, el("thead", {}, head), body);
  const note = el("p", { class: "ws-muted" });
  const element = fold(strings.stepsTitle, plots, table, note);
  const rows = { plots: new Map(), runs: new Map() };
  let asking = false;

  async function load() {
    if (asking || !element.open) return;
    asking = true;
    const found = await steps.runs(model);
    asking = false;
    const view = stepsView(found.ok ? found.runs : [], strings);
    setOptional(note, found.ok ? (view.rows.length === 0 ? strings.noRuns : "") : found.error);
    setShown(table, view.rows.length > 0);
    syncList(plots, rows.plots, view.plots, plotPart);
    syncList(body, rows.runs, view.rows, runRow);
  }

  element.addEventListener("toggle", () => void load());
  return { element, /** Something has run since. */ update: () => void load() };
}

/**
 * @param {PlotView} first
 * @returns {Part<PlotView>}
 */
function plotPart(first) {
  const title = el("span", { class: "ws-muted" }, first.title);
  const latest = el("span", { class: "ws-number ws-end" });
  const most = el("span", { class: "ws-number ws-muted ws-plot-most", "aria-hidden": "true" });
  const lines = svg("g");
  const box = { class: "ws-plot", viewBox: `0 -2 ${PLOT.width} ${PLOT.height + 4}`, role: "img", preserveAspectRatio: "none" };
  const picture = svg("svg", box, lines);
  /** @type {Map<string, SVGElement>} */
  const paths = new Map();

  /** @param {readonly Line[]} wanted */
  function draw(wanted) {
    for (const [key, path] of paths) {
      if (!wanted.some((line) => line.key === key)) {
        path.remove();
        paths.delete(key);
      }
    }
    for (const line of wanted) {
      const path = paths.get(line.key) ?? svg("path", { fill: "none", "vector-effect": "non-scaling-stroke" });
      paths.set(line.key, path);
      setAttribute(path, "d", line.path);
      setAttribute(path, "class", `ws-plot-line ws-age-${line.age}`);
      lines.append(path);
    }
  }

  return {
    element: el("div", { class: "ws-plot-box" }, el("div", { class: "ws-plot-head" }, title, latest), el("div", { class: "ws-plot-area" }, picture, most)),
    update(view) {
      setText(latest, view.latest);
      setText(most, view.most);
      setAttribute(picture, "aria-label", view.label);
      draw(view.lines);
    },
  };
}

/** @returns {Part<RunRow>} */
function runRow() {
  const mark = el("span", { "aria-hidden": "true" });
  const name = el("span");
  const cells = COLUMNS.map(() => el("td", { class: "ws-number" }));
  return {
    element: el("tr", {}, el("th", { scope: "row" }, mark, name), ...cells),
    update(row) {
      mark.className = `ws-run-mark ws-age-${row.age}`;
      setText(name, row.name);
      COLUMNS.forEach((column, place) => setText(cells[place], row[column]));
    },
  };
}
