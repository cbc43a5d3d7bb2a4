/**
 * Why a step is not faster, in words: the server tells the kinds and their numbers (nodes/page/causes.py).
 */

import * as format from "./format.mjs";

/** @import { Strings } from "./strings.mjs" */

/**
 * @typedef {{model: string, device: string, kind: string, seconds: number | null, staged?: number, link?: string, card?: string,
 *   narrow?: boolean, rate?: number, usual?: number, why?: string, others?: number, gain?: number, limit?: number,
 *   streamed?: number, total?: number | null, waiting?: number, together?: number, guidance?: boolean}} Cause
 * @typedef {{key: string, kind: string, device: string, text: string, todo: string, costs: string}} CauseView
 *   costs: at most; of "room" it is all of the waiting
 */

/** @type {Record<string, (cause: Cause, strings: Strings) => [text: string, todo: string]>} */
const SENTENCES = {
  loading: (cause, strings) => [strings.causeloading(format.bytes(cause.staged)), strings.doloading],
  link: ({ link = "", card = "", narrow }, strings) => [
    strings.causelink({ now: pcie(link), best: pcie(card) }), narrow ? strings.donarrow : strings.dolink,
  ],
  slow_bus: (cause, strings) => [strings.causeslow_bus(format.rate(cause.rate), format.rate(cause.usual)), strings.doslow_bus],
  disk: (cause, strings) => [strings.causedisk(format.rate(cause.rate), format.bytes(cause.staged)), strings.dodisk],
  unpinned: (cause, strings) => [strings.causeunpinned(format.bytes(cause.staged), strings.fromServer(cause.why ?? "")), strings.dounpinned],
  synchronous: (cause, strings) => [strings.causesynchronous(strings.fromServer(cause.why ?? "")), strings.dosynchronous],
  others: (cause, strings) => [strings.causeothers(format.bytes(cause.others)), strings.doothers(format.bytes(cause.gain))],
  limit: (cause, strings) => [strings.causelimit(format.bytes(cause.limit)), strings.dolimit(format.bytes(cause.gain))],
  unpacked: (cause, strings) => [strings.causeunpacked(sentence(strings.fromServer(cause.why ?? ""))), strings.dounpacked],
  turns: ({ together, guidance }, strings) => [
    strings.causeturns, guidance ? strings.doturnsGuided(format.roughly(together)) : strings.doturns(format.roughly(together)),
  ],
  room: (cause, strings) => [strings.causeroom(format.bytes(cause.streamed), format.bytes(cause.total)), strings.doroom],
  compute: (cause, strings) => [strings.causecompute, strings.docompute],
};

/**
 * What the card of a model says, the dearest first. A kind that this page has no words for is left out.
 * @param {readonly Cause[]} causes
 * @param {string} model
 * @param {Strings} strings
 * @returns {CauseView[]}
 */
export function causeViews(causes, model, strings) {
  const ours = told(causes.filter((cause) => cause.model === model && cause.kind in SENTENCES));
  const several = new Set(ours.map((cause) => cause.device)).size > 1;
  const dearest = several ? [...ours].sort((one, other) => rank(other) - rank(one)) : ours;
  return dearest.map((cause) => {
    const [text, todo] = SENTENCES[cause.kind](cause, strings);
    return {
      key: `${cause.device}/${cause.kind}`,
      kind: cause.kind,
      device: several ? cause.device : "",
      text,
      todo,
      costs: cause.seconds ? (cause.kind === "room" ? strings.costsInAll : strings.costs)(format.estimated(cause.seconds)) : "",
    };
  });
}

/**
 * A device that only computes says nothing where another one waits; where all compute, one speaks for all.
 * @param {readonly Cause[]} causes
 */
function told(causes) {
  const others = causes.filter((cause) => cause.kind !== "compute");
  if (others.length > 0) return others;
  return [...causes].sort((one, other) => (other.waiting ?? 0) - (one.waiting ?? 0)).slice(0, 1);
}

/**
 * For the order on several devices: that no room is left, or all is computed, is the last word there too.
 * @param {Cause} cause
 */
function rank({ kind, seconds }) {
  return kind === "room" || kind === "compute" ? -1 : (seconds ?? 0);
}

/**
 * `gen 4 x8` of the server as it is written on boards.
 * @param {string} link
 */
export function pcie(link) {
  return link.replace(/^gen (\d+) x(\d+)$/, "PCIe $1.0 x$2");
}

/** @param {string} text */
function sentence(text) {
  return text.charAt(0).toUpperCase() + text.slice(1);
}
