/**
 * What the panel shows, as plain values: a function of what the feed knows, without a document.
 */

import * as format from "./format.mjs";
import { sparkline } from "./history.mjs";
import { modelViews } from "./model_view.mjs";
import { merge } from "./status.mjs";

/** @import { FeedState } from "./feed.mjs" */
/** @import { ModelView } from "./model_view.mjs" */
/** @import { Device, Host, Notice, Status } from "./status.mjs" */
/** @import { Strings } from "./strings.mjs" */

// Of what streamed models give up at once, their resident weights, and of torch's cache a device is full on purpose.
export const NEAR_LIMIT = 0.9;
// Memory is page-locked in whole pieces, so that a limit is reached when the next piece would go beyond it.
export const NEAR_PINNED_LIMIT = 0.98;
export const SPARK = { width: 60, height: 14 };
// With more devices their figures are folded away until somebody asks for them.
const MOST_OPEN = 2;

/** The parts of a device's bar, from the left. */
export const PARTS = /** @type {const} */ (["resident", "staging", "torch", "cache", "other"]);
/** A device's figures; each has a text of its name, and a longer one. */
export const FIGURES = /** @type {const} */ ([...PARTS, "free", "peak"]);

/**
 * @typedef {typeof PARTS[number] | "free"} Part
 * @typedef {{key: Part | "peak", label: string, long: string, value: string}} Figure
 * @typedef {{key: Part, start: number, size: number}} Segment  fractions of the whole bar
 * @typedef {{now: number | null, max: number, text: string, label: string}} Meter
 * @typedef {{key: string, title: string, detail: string, amount: string, meter: Meter, segments: Segment[],
 *   peak: number | null, warning: string, copy: string, stall: string, spark: string, figures: Figure[],
 *   open: boolean}} DeviceView
 * @typedef {{key: string, label: string, amount: string, fill: number | null, warning: string, meter: Meter}} HostView
 * @typedef {{key: string, kind: "inactive" | "fallback" | "failed", title: string, text: string}} NoticeView
 * @typedef {{key: string, text: string, tone: Tone}} BriefView  a line of what is loaded, or was to stream and does not
 * @typedef {"neutral" | "active" | "good" | "warning" | "error"} Tone
 * @typedef {{state: {key: string, tone: Tone, text: string, spoken: string}, banner: string, old: boolean,
 *   devices: DeviceView[], legend: boolean, deviceNote: string, host: HostView[], models: ModelView[], modelNote: string,
 *   briefs: BriefView[], notices: NoticeView[]}} View
 */

/**
 * @param {FeedState} feed
 * @param {Strings} strings
 * @param {{small?: boolean, keep?: (id: string) => boolean}} [options]  small: there is no room for the figures of each
 *   device; keep: whether a model is shown though nothing of it is loaded
 * @returns {View}
 */
export function buildView(feed, strings, { small = false, keep = () => false } = {}) {
  const status = merge(feed.status, feed.event);
  const old = feed.link === "stale" || feed.link === "gone";
  const usable = feed.link === "missing" || feed.link === "newer" ? null : status;
  const open = !small && (usable?.devices.length ?? 0) <= MOST_OPEN;
  const devices = (usable?.devices ?? []).map((device) => deviceView(device, feed, strings, open));
  const host = usable ? hostViews(usable.host, strings) : [];
  const near = [...devices, ...host].some((each) => each.warning !== "");
  const models = usable ? modelViews(usable.models, strings, keep) : [];
  const notices = (usable?.notices ?? []).map((notice, place) => noticeView(notice, place, strings));
  return {
    state: stateView(feed, usable, near, strings),
    banner: bannerText(feed, usable, strings),
    old,
    devices,
    // Where figures are unfolded they have the colours beside them.
    legend: devices.some((device) => !device.open),
    deviceNote: usable && devices.length === 0 ? strings.noDevices(strings.fromServer(usable.why_no_devices ?? "")) : "",
    host,
    models,
    // Without its status the server's models are not known to be none.
    modelNote: usable && feed.status && models.length === 0 ? strings.noModels : "",
    briefs: briefViews(models, notices),
    notices,
  };
}

/**
 * @param {FeedState} feed
 * @param {Status | null} status
 * @param {boolean} near
 * @param {Strings} strings
 */
function stateView(feed, status, near, strings) {
  const [key, tone] = stateOf(feed, status);
  const warned = near && feed.link === "live";
  const text = warned ? `${strings[key]} · ${strings.nearLimit}` : strings[key];
  return {
    key,
    tone: warned && tone !== "error" ? /** @type {Tone} */ ("warning") : tone,
    text,
    spoken: [text, ...spokenNotices(status, strings)].join(". "),
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
 * @param {Status | null} status
 * @param {Strings} strings
 */
function spokenNotices(status, strings) {
  return (status?.notices ?? []).map((notice) => `${strings[notice.kind] ?? ""} ${notice.name}: ${strings.fromServer(notice.text)}`.trim());
}

/**
 * @param {Device} device
 * @param {FeedState} feed
 * @param {Strings} strings
 * @param {boolean} open
 * @returns {DeviceView}
 */
function deviceView(device, feed, strings, open) {
  const { total, free } = device;
  const used = format.isKnown(total) && format.isKnown(free) ? Math.max(0, total - free) : null;
  const detail = device.name || (device.virtual ? strings.virtual : "");
  const near = (format.fraction(keptBytes(device), total) ?? 0) >= NEAR_LIMIT;
  const figures = FIGURES.map((key) => ({
    key,
    label: strings[key],
    long: strings[`${key}Long`],
    value: format.bytes(device[key]),
  }));
  const text = [
    used === null ? strings.unknown : strings.used(format.bytes(used), format.bytes(total)),
    near ? strings.nearlyFullLong : "",
    ...figures.filter(({ key }) => key !== "free").map(({ label, value }) => `${label} ${value === format.DASH ? strings.unknown : value}`),
  ];
  return {
    key: device.device,
    title: device.device,
    detail,
    amount: format.bytesOf(used, total),
    meter: meter(used, total, text.filter(Boolean).join("; "), [device.device, detail].filter(Boolean).join(", ")),
    segments: segmentsOf(device),
    peak: format.fraction(device.peak, total),
    warning: near ? strings.nearlyFull : "",
    copy: format.rate(device.copy_rate),
    stall: format.percent(device.stalled),
    spark: sparkline(feed.history.get(device.device) ?? [], total, feed.now, SPARK),
    figures,
    open,
  };
}

/**
 * What nobody gives up to a model that needs it: slots, activations, other models and programs.
 * @param {Device} device
 */
function keptBytes({ total, free, resident, cache }) {
  return format.isKnown(total) && format.isKnown(free) && format.isKnown(cache) ? total - free - resident - cache : null;
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
    ...inactive.map(({ key, title }) => ({ key: `notice/${key}`, text: title, tone: /** @type {Tone} */ ("warning") })),
  ];
}

/**
 * The parts of the bar, from the left. Parts that come to more than there is, which samples of different moments do, are
 * shown in proportion.
 * @param {Device} device
 * @returns {Segment[]}
 */
function segmentsOf(device) {
  const sizes = PARTS.map((key) => Math.max(0, device[key] ?? 0));
  const sum = sizes.reduce((total, size) => total + size, 0);
  const whole = Math.max(device.total ?? 0, sum);
  if (!format.isKnown(device.total) || whole <= 0) return PARTS.map((key) => ({ key, start: 0, size: 0 }));
  let start = 0;
  return PARTS.map((key, place) => {
    const size = sizes[place] / whole;
    start += size;
    return { key, start: start - size, size };
  });
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
 * @param {number | null} now
 * @param {number | null} max
 * @param {string} text
 * @param {string} label
 * @returns {Meter}
 */
function meter(now, max, text, label) {
  const known = format.isKnown(now) && format.isKnown(max) && max > 0;
  return { now: known ? Math.min(now, max) : null, max: known ? max : 0, text, label };
}

/**
 * @param {Notice} notice
 * @param {number} place
 * @param {Strings} strings
 * @returns {NoticeView}
 */
function noticeView(notice, place, strings) {
  const where = notice.node_id === null ? "" : ` (${strings.node(notice.node_id)})`;
  return {
    key: `${notice.node_id}/${notice.name}/${place}`,
    kind: notice.kind,
    title: `${strings[notice.kind] ?? ""}: ${notice.name}${where}`,
    text: strings.fromServer(notice.text),
  };
}
