/**
 * What to paste into an issue: versions, devices, models and why they are as they are, as Markdown, in English.
 */

import * as format from "./format.mjs";
import { inMarkdown } from "./markdown.mjs";
import { merge } from "./status.mjs";
import { causeViews } from "./why.mjs";

/** @import { FeedState } from "./feed.mjs" */
/** @import { Device, Model } from "./status.mjs" */
/** @import { Strings } from "./strings.mjs" */

/**
 * @param {FeedState} feed
 * @param {Strings} english
 * @param {string} browser
 */
export function issueReport(feed, english, browser) {
  const status = merge(feed.status, feed.event);
  if (status === null) return `WeightStream: ${feed.link}`;
  const { version = "?" } = feed.status ?? {};
  const host = status.host;
  return [
    "### WeightStream report",
    inMarkdown(`WeightStream ${version}, ComfyUI ${feed.status?.comfyui?.version ?? "?"}, ${browser}`),
    ...environmentLines(feed.status?.environment ?? {}),
    ...(feed.status?.comfyui?.broken ?? []).map((text) => inMarkdown(`ComfyUI is not as expected: ${text}`)),
    "",
    "| GPU | name | used | other programs | copy | waiting | link |",
    "| --- | --- | --- | --- | --- | --- | --- |",
    ...status.devices.map(deviceRow),
    "",
    `RAM ${format.bytesOf(used(host.ram_total, host.ram_available), host.ram_total)}, page-locked ${format.bytesOf(host.pinned, host.pinned_limit)}`,
    ...status.models.flatMap(modelLines),
    ...[...new Set(status.models.map((model) => model.id))].flatMap((id) =>
      causeViews(feed.status?.causes ?? [], id, english).map(({ device, text, costs }) => `- why: ${inMarkdown([device, text, costs].filter(Boolean).join(" "))}`),
    ),
    ...status.notices.map((notice) => `- ${english[notice.kind]}: ${inMarkdown(notice.name)}: ${inMarkdown(notice.text)}`),
    "",
  ].join("\n");
}

/** @param {Record<string, string>} environment */
function environmentLines(environment) {
  const told = Object.entries(environment).map(([name, text]) => `${name} ${text}`);
  return told.length > 0 ? [inMarkdown(told.join(", "))] : [];
}

/** @param {Device} device */
function deviceRow(device) {
  const cells = [
    device.device, device.name, format.bytesOf(used(device.total, device.free), device.total), format.bytes(device.other),
    format.rate(device.copy_rate), format.percent(device.stalled), linkText(device),
  ];
  return `| ${cells.map(inMarkdown).join(" | ")} |`;
}

/** @param {Device} device */
function linkText({ link, card }) {
  const text = (/** @type {{generation: number | null, width: number | null} | undefined} */ each) =>
    each?.generation && each.width ? `PCIe ${each.generation}.0 x${each.width}` : "";
  return text(link) ? `${text(link)} of ${text(card) || "?"}` : format.DASH;
}

/** @param {Model} model */
function modelLines(model) {
  const run = model.last_run;
  const ran = run ? `; ${run.steps} steps of ${format.seconds(run.step_seconds)}, ${format.bytes(run.bytes)} copied, ${run.misses} copies came late, ${run.reruns} reruns` : "";
  const settings = Object.entries(model.settings ?? {}).map(([name, value]) => `${name}=${value}`);
  return [
    `- ${inMarkdown(`${model.name} on ${model.device}: ${model.ladder}${model.reason && ` (${model.reason})`}${ran}`)}`,
    `  - ${inMarkdown(model.plan)}`,
    ...(settings.length > 0 ? [`  - set: ${inMarkdown(settings.join(", "))}`] : []),
  ];
}

/**
 * @param {number | null} total
 * @param {number | null} free
 */
function used(total, free) {
  return total === null || free === null ? null : total - free;
}
