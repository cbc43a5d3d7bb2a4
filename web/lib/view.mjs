/**
 * What the panel shows, as plain values: a function of what the feed knows, without a document.
 */

import { deviceView, isIdle, meter } from "./device_view.mjs";
import { estimateViews } from "./estimate_view.mjs";
import { fleetView, isRunning, spokenWorkers } from "./fleet_view.mjs";
import * as format from "./format.mjs";
import { modelViews } from "./model_view.mjs";
import { merge } from "./status.mjs";

/** @import { DeviceView, Meter } from "./device_view.mjs" */
/** @import { EstimateView } from "./estimate_view.mjs" */
/** @import { Known } from "./estimates.mjs" */
/** @import { FeedState } from "./feed.mjs" */
/** @import { FleetView } from "./fleet_view.mjs" */
/** @import { ModelView } from "./model_view.mjs" */
/** @import { Device, Host, Notice, Status } from "./status.mjs" */
/** @import { Strings } from "./strings.mjs" */

// Memory is page-locked in whole pieces, so that a limit is reached when the next piece would go beyond it.
export const NEAR_PINNED_LIMIT = 0.98;
// With more devices their figures are folded away until somebody asks for them.
const MOST_OPEN = 2;

/**
 * @typedef {{key: string, label: string, amount: string, fill: number | null, warning: string, meter: Meter}} HostView
 * @typedef {{key: string, kind: Notice["kind"], title: string, text: string, tone: Tone,
 *   node: NodeView | null}} NoticeView
 * @typedef {{id: string, text: string, label: string}} NodeView  a node of the graph: what it is called
 * @typedef {{text: string, fill: number | null, meter: Meter}} ProgressView
 * @typedef {{key: string, text: string, tone: Tone}} BriefView  a line of what is loaded, or was to stream and does not
 * @typedef {"neutral" | "active" | "good" | "warning" | "error"} Tone
 * @typedef {{state: {key: string, tone: Tone, text: string, spoken: string}, banner: string, old: boolean,
 *   progress: ProgressView | null, fleet: FleetView | null, devices: DeviceView[], idle: DeviceView[], idleText: string, legend: boolean,
 *   deviceNote: string, host: HostView[], models: ModelView[], modelNote: string, briefs: BriefView[],
 *   notices: NoticeView[], estimates: EstimateView[]}} View  idle: devices that nothing is loaded on, where there are many
 */

/**
 * @param {FeedState} feed
 * @param {Strings} strings
 * @param {{keep?: (id: string) => boolean, title?: (id: string, model?: string) => string,
 *   estimates?: readonly Known[], held?: (notices: readonly Notice[]) => Notice[]}} [options]  keep: whether a model is
 *   shown though nothing of it is loaded; title: what a node is called, "" where the open workflow has
 *   no such node; estimates: of models that the open workflow names; held: the notices that hold there
 * @returns {View}
 */
export function buildView(feed, strings, { keep = () => false, title = () => "", estimates = [], held = (all) => [...all] } = {}) {
  const status = merge(feed.status, feed.event);
  const old = feed.link === "stale" || feed.link === "gone";
  const usable = feed.link === "missing" || feed.link === "newer" ? null : status;
  const all = usable?.devices ?? [];
  const rests = (/** @type {Device} */ device) => isIdle(device) && !isRunning(device.device, usable?.fleet);
  const open = (/** @type {Device} */ device) => all.length <= MOST_OPEN && (all.length === 1 || !rests(device));
  const shown = all.map((device) => ({ idle: rests(device), view: deviceView(device, feed, strings, open(device)) }));
  // Who is near its limit is not put aside.
  const aside = all.length > MOST_OPEN ? shown.filter(({ idle, view }) => idle && view.warning === "") : [];
  const idle = aside.length > 1 ? aside.map(({ view }) => view) : [];
  const devices = shown.map(({ view }) => view).filter((view) => !idle.includes(view));
  const host = usable ? hostViews(usable.host, strings) : [];
  const near = [...devices, ...host].some((each) => each.warning !== "");
  const node = (/** @type {string | null | undefined} */ id, /** @type {string | undefined} */ model) => nodeView(id, id ? title(id, model) : "", strings);
  const loader = (/** @type {string} */ id, /** @type {string} */ called) => nodeView(id, called, strings);
  const fleet = usable?.fleet ? fleetView(usable.fleet, usable.time, strings) : null;
  const models = usable ? modelViews(usable, strings, keep, node) : [];
  const noDevices = fleet ? strings.fleetNoDevices : strings.noDevices;
  const holding = usable ? held(usable.notices) : [];
  const notices = holding.map((notice, place) => noticeView(notice, place, node(notice.node_id), strings));
  return {
    state: stateView(feed, usable, { near, fleet, notices: holding }, strings),
    banner: bannerText(feed, usable, strings),
    old,
    progress: models.some((model) => model.running) && !old ? progressView(feed, strings) : null,
    fleet,
    devices,
    idle,
    idleText: strings.idleGpus(idle.length),
    // Where figures are unfolded they have the colours beside them.
    legend: devices.some((device) => !device.open),
    deviceNote: usable && all.length === 0 ? noDevices(strings.fromServer(usable.why_no_devices ?? "")) : "",
    host,
    models,
    // Without its status the server's models are not known to be none.
    modelNote: usable && feed.status && models.length === 0 ? strings.noModels : "",
    briefs: briefViews(models, notices),
    notices,
    // A card of what was just freed says so for a while.
    estimates: estimateViews(estimates, strings, loader, all.length > 1 && !fleet).filter(({ name }) => !models.some((model) => model.name === name)),
  };
}

/**
 * @param {FeedState} feed
 * @param {Status | null} status
 * @param {{near: boolean, fleet: FleetView | null, notices: readonly Notice[]}} seen  near: something is near its limit
 * @param {Strings} strings
 */
function stateView(feed, status, { near, fleet, notices }, strings) {
  const [key, tone] = stateOf(feed, status);
  const warned = near && feed.link === "live";
  const text = warned ? `${strings[key]} · ${strings.nearLimit}` : strings[key];
  return {
    key,
    tone: warned && tone !== "error" ? /** @type {Tone} */ ("warning") : tone,
    text,
    spoken: [text, ...spokenWorkers(fleet), ...notices.map((notice) => spokenNotice(notice, strings))].join(". "),
  };
}

/**
 * @param {FeedState} feed
 * @param {Status | null} status
 * @param {Strings} strings
 */
function bannerText({ link }, status, strings) {
  if (link === "live" || (link === "starting" && status)) return "";
  const old = status !== null && (link === "stale" || link === "gone");
  return old ? `${strings[`${link}Text`]} ${strings.oldText}` : strings[`${link}Text`];
}

/**
 * @param {FeedState} feed
 * @param {Status | null} status
 * @returns {[("starting" | "stale" | "missing" | "gone" | "newer" | "idle" | "allResident" | "loading" | "streaming"
 *   | "running" | "locking"), Tone]}
 */
function stateOf(feed, status) {
  if (feed.link === "missing" || feed.link === "gone" || feed.link === "newer") return [feed.link, "error"];
  if (feed.link === "stale") return ["stale", "warning"];
  if (status === null) return ["starting", "neutral"];
  const models = status.models.filter((model) => model.ladder !== "unloaded" || model.loading);
  if (models.some((model) => model.loading)) return ["loading", "active"];
  const running = models.filter((model) => model.running);
  if (running.some((model) => model.ladder !== "resident")) return ["streaming", "active"];
  if (running.length > 0) return ["running", "active"];
  if (models.some((model) => model.locking)) return ["locking", "active"];
  const resident = models.length > 0 && models.every((model) => model.ladder === "resident");
  return resident ? ["allResident", "good"] : ["idle", "neutral"];
}

/**
 * @param {Notice} notice
 * @param {Strings} strings
 */
function spokenNotice(notice, strings) {
  return `${strings[notice.kind] ?? ""} ${notice.name}: ${strings.fromServer(notice.text)}`.trim();
}

/**
 * @param {FeedState} feed
 * @param {Strings} strings
 * @returns {ProgressView | null}
 */
function progressView({ progress }, strings) {
  if (!progress) return null;
  const { done, total, left } = progress;
  const text = strings.progress({ done, total, left: left === null ? "" : format.timeLeft(left) });
  return { text, fill: format.fraction(done, total), meter: meter(done, total, text, strings.progressLabel) };
}

/**
 * @param {string | null | undefined} id
 * @param {string} title  "" where the open workflow has no such node: then nothing leads there
 * @param {Strings} strings
 * @returns {NodeView | null}
 */
function nodeView(id, title, strings) {
  if (!id || !title) return null;
  return { id, text: title, label: strings.goToNode(title) };
}

/**
 * @param {readonly ModelView[]} models
 * @param {readonly NoticeView[]} notices
 * @returns {BriefView[]}
 */
function briefViews(models, notices) {
  const loaded = models.filter((model) => model.brief !== "");
  const inactive = notices.filter((notice) => notice.kind === "inactive");
  return [
    ...loaded.map(({ key, brief, running }) => ({ key: `model/${key}`, text: brief, tone: /** @type {Tone} */ (running ? "active" : "neutral") })),
    ...inactive.map(({ key, title, node }) => ({ key: `notice/${key}`, text: [title, node?.text].filter(Boolean).join(" "), tone: /** @type {Tone} */ ("warning") })),
  ];
}

/**
 * @param {Host} host
 * @param {Strings} strings
 * @returns {HostView[]}
 */
function hostViews(host, strings) {
  const { ram_total: total, ram_available: available, pinned, pinned_limit: limit } = host;
  const used = format.isKnown(total) && format.isKnown(available) ? Math.max(0, total - available) : null;
  const full = (format.fraction(pinned, limit) ?? 0) >= NEAR_PINNED_LIMIT;
  return [
    hostView("ram", strings.ram, used, total, "", strings),
    hostView("pinned", strings.pinned, pinned, limit, full ? strings.atLimit : "", strings),
  ];
}

/**
 * @param {string} key
 * @param {string} label
 * @param {number | null} used
 * @param {number | null} total
 * @param {string} warning
 * @param {Strings} strings
 * @returns {HostView}
 */
function hostView(key, label, used, total, warning, strings) {
  const fill = format.fraction(used, total);
  const unknown = format.isKnown(used) ? `${format.bytes(used)}; ${strings.noLimit}` : strings.unknown;
  const spoken = fill === null ? unknown : strings.used(format.bytes(used), format.bytes(total));
  const text = [spoken, warning].filter(Boolean).join("; ");
  return { key, label, amount: format.bytesOf(used, total), fill, warning, meter: meter(used, total, text, label) };
}

/**
 * @param {Notice} notice
 * @param {number} place
 * @param {NodeView | null} node
 * @param {Strings} strings
 * @returns {NoticeView}
 */
function noticeView(notice, place, node, strings) {
  // The link to the node says its name; a class of ours, which a refused node has for one, says less.
  const named = node && (node.text === notice.name || notice.kind === "refused");
  return {
    node,
    key: `${notice.node_id}/${notice.name}/${place}`,
    kind: notice.kind,
    tone: notice.kind === "failed" || notice.kind === "refused" ? "error" : "warning",
    title: strings.because(strings[notice.kind] ?? "", named ? "" : notice.name).trim(),
    text: strings.fromServer(notice.text),
  };
}
