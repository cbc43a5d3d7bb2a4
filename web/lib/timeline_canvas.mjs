/**
 * Draws the lanes of a step on a canvas, in the panel's colours.
 */

import { spanAt, ticks, tickTexts } from "./timeline.mjs";

/** @import { Lane, Range, Span, TimelineView } from "./timeline.mjs" */

const LANE = 18;
const LABEL = 13;
const AXIS = 16;
const GAP = 5;
const PIXELS_OF_TICK = 64;
const LEAST_WIDTH = 1;

/** The colour of each kind, as the style sheet names it. */
const COLOURS = { compute: "--ws-resident", copies: "--ws-staging", waits: "--ws-error", unpacking: "--ws-torch" };

/** @param {TimelineView} view */
export function heightOf(view) {
  return view.lanes.length * (LABEL + LANE + GAP) + AXIS;
}

/**
 * @param {HTMLCanvasElement} canvas
 * @param {TimelineView} view
 * @param {Range} range  what of the step is shown
 */
export function draw(canvas, view, range) {
  const width = canvas.clientWidth;
  const height = heightOf(view);
  const scale = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  const context = canvas.getContext("2d");
  if (!context || width === 0) return;
  const style = getComputedStyle(canvas);
  const colour = (/** @type {string} */ name) => style.getPropertyValue(name).trim();
  context.scale(scale, scale);
  context.font = `11px ${style.fontFamily}`;
  context.textBaseline = "alphabetic";
  const x = (/** @type {number} */ at) => ((at - range.from) / (range.to - range.from)) * width;
  drawAxis(context, range, x, { width, height, line: style.color, text: style.color });
  view.lanes.forEach((lane, place) => {
    const top = topOf(place);
    context.fillStyle = style.color;
    context.globalAlpha = 0.8;
    context.fillText(lane.label, 0, top - 3);
    context.globalAlpha = 0.12;
    context.fillRect(0, top, width, LANE);
    context.globalAlpha = 1;
    drawSpans(context, lane, x, top, width, colour);
  });
}

/**
 * @param {CanvasRenderingContext2D} context
 * @param {Lane} lane
 * @param {(at: number) => number} x
 * @param {number} top
 * @param {number} width
 * @param {(name: string) => string} colour
 */
function drawSpans(context, lane, x, top, width, colour) {
  lane.spans.forEach((span, number) => {
    // Whole pixels: half of one would be of no lane's colour.
    const left = Math.max(0, Math.floor(x(span.begin)));
    const right = Math.min(width, Math.round(x(span.end)));
    if (right < 0 || left > width) return;
    context.fillStyle = colour(COLOURS[span.kind]);
    // Neighbours are told apart without another colour.
    context.globalAlpha = span.kind === "compute" || span.kind === "copies" ? (number % 2 ? 0.8 : 1) : 1;
    const inset = span.kind === "unpacking" ? LANE / 2 : 0;
    context.fillRect(left, top + inset, Math.max(LEAST_WIDTH, right - left), LANE - inset);
  });
  context.globalAlpha = 1;
}

/**
 * @param {CanvasRenderingContext2D} context
 * @param {Range} range
 * @param {(at: number) => number} x
 * @param {{width: number, height: number, line: string, text: string}} look
 */
function drawAxis(context, range, x, { width, height, line, text }) {
  const times = ticks(range, Math.floor(width / PIXELS_OF_TICK));
  const labels = tickTexts(times);
  for (const [place, at] of times.entries()) {
    const left = x(at);
    context.globalAlpha = 0.25;
    context.fillStyle = line;
    context.fillRect(left, 0, 1, height - AXIS);
    context.globalAlpha = 0.8;
    context.fillStyle = text;
    const label = labels[place];
    const wide = context.measureText(label).width;
    context.fillText(label, Math.min(width - wide, Math.max(0, left - wide / 2)), height - 4);
  }
  context.globalAlpha = 1;
}

/** @param {number} place */
function topOf(place) {
  return place * (LABEL + LANE + GAP) + LABEL;
}

/**
 * What is drawn at a point of the canvas.
 * @param {TimelineView} view
 * @param {Range} range
 * @param {{x: number, y: number, width: number}} point
 * @returns {Span | null}
 */
export function spanUnder(view, range, { x, y, width }) {
  const lane = view.lanes.find((_, place) => topOf(place) <= y && y < topOf(place) + LANE);
  const pixel = (range.to - range.from) / Math.max(1, width);
  return lane ? spanAt(lane, range.from + x * pixel, 2 * pixel) : null;
}
