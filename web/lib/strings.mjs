/**
 * Every text of the page, in each language. What the server says (plans, reasons, notices) comes in English.
 *
 * @typedef {typeof ENGLISH} Strings
 */

import { CHINESE_ESTIMATES, ENGLISH_ESTIMATES } from "./estimate_strings.mjs";
import { CHINESE_FLEET, ENGLISH_FLEET } from "./fleet_strings.mjs";
import { CHINESE_PICKER, ENGLISH_PICKER } from "./picker_strings.mjs";
import { CHINESE_PICTURES, ENGLISH_PICTURES } from "./picture_strings.mjs";
import { inChinese } from "./server_texts.mjs";

const ENGLISH = {
  ...ENGLISH_ESTIMATES,
  ...ENGLISH_FLEET,
  ...ENGLISH_PICTURES,
  ...ENGLISH_PICKER,

  title: "WeightStream",
  tab: "VRAM",
  tooltip: "VRAM and streamed models (WeightStream)",
  showCommand: "WeightStream: show VRAM",
  placementSettings: "GPU Placement",
  pageSettings: "Page",
  widgetSetting: "Show VRAM on the GPU Placement node",

  resident: "Stays",
  staging: "Staging",
  torch: "Other torch",
  cache: "torch cache",
  other: "Other",
  free: "Free",
  peak: "Peak",
  residentLong: "Weights of streamed models that stay on the device",
  stagingLong: "Memory through which streamed weights pass",
  torchLong: "Everything else that torch has allocated: activations, other models",
  cacheLong: "Memory that torch keeps for its next allocations",
  otherLong: "Other programs, contexts, and ComfyUI's dynamic VRAM",
  freeLong: "Free for anybody",
  peakLong: "Most that was in use since the last run began",
  copy: "copy",
  stall: "waiting",
  copyLong: "Host to device",
  stallLong: "Part of the time in which compute waits for copies",
  unknown: "not known",
  virtual: "virtual",
  nearlyFull: "little room left",
  nearlyFullLong: "90 % or more is held by what cannot be given up: staging, activations, other models and programs",
  atLimit: "at its limit",
  devices: "Devices",
  models: "Models",
  openPanel: "Open the panel",
  notices: "Notices",
  host: "Host memory",
  ram: "RAM",
  pinned: "Page-locked",
  noLimit: "no limit known",
  noDevices: (/** @type {string} */ reason) =>
    `No device to stream to${reason && `: ${reason}`}. Models run ComfyUI's own way.`,
  noModels: "No streamed model is loaded.",
  legend: "What the colours mean",

  starting: "Connecting",
  idle: "Idle",
  allResident: "All stays in VRAM",
  loading: "Loading",
  streaming: "Streaming",
  running: "Running, all stays in VRAM",
  locking: "Page-locking RAM",
  stale: "No news",
  missing: "Not available",
  gone: "No connection",
  newer: "Reload this page",
  nearLimit: "near the limit",
  startingText: "Waiting for the server's first answer.",
  staleText: "The server has said nothing for 5 s.",
  missingText: "The server has no such route: its WeightStream is older than this page, or was not loaded. Restart ComfyUI.",
  goneText: "The server does not answer.",
  oldText: "The figures below are from before.",
  newerText: "The server's WeightStream is newer than this page. Reload it.",

  unloaded: "not loaded",
  ladderResident: "all stays in VRAM",
  ladderPinned: "streams from page-locked RAM",
  ladderStaged: "streams from the file",
  ladderSynchronous: "copied when needed",
  inactive: "Not streaming",
  fallback: "Placed differently",
  failed: "Failed",
  refused: "Not run",
  because: (/** @type {string} */ step, /** @type {string} */ reason) => `${step}: ${reason}`,
  and: (/** @type {string} */ one, /** @type {string} */ other) => `${one}, ${other}`,
  stay: (/** @type {string} */ kept, /** @type {string} */ all) => `${kept} of ${all} stay in VRAM`,
  packed: (/** @type {string} */ sent, /** @type {string} */ weights) => `${sent} (packed, ${weights} of weights)`,
  summaryResident: "The whole model is in VRAM; nothing has to be copied.",
  summaryBus: (/** @type {string} */ copied) =>
    `Each step copies ${copied}, which takes longer than to compute it: more VRAM makes it faster.`,
  summaryCompute: (/** @type {string} */ copied) =>
    `Each step copies ${copied} while it computes, which takes longer: more VRAM makes nothing faster.`,
  summarySynchronous: (/** @type {string} */ copied) => `Each step copies ${copied}, and does not compute meanwhile.`,
  summaryUnmeasured: (/** @type {string} */ copied) => `Each step copies ${copied}; what limits it is not measured yet.`,
  used: (/** @type {string} */ used, /** @type {string} */ total) => `${used} of ${total} used`,
  modelLoading: (/** @type {string} */ amount, /** @type {string} */ speed) => `${amount}, ${speed}`,
  lastRunUncopied: (/** @type {{steps: number, step: string}} */ run) =>
    `Last run: ${run.steps} ${run.steps === 1 ? "step" : "steps"} of ${run.step}; nothing had to be copied`,
  lastRun: (/** @type {{steps: number, step: string, copied: string, rate: string, stall: string, misses: number}} */ run) =>
    `Last run: ${run.steps} ${run.steps === 1 ? "step" : "steps"} of ${run.step}; ${run.copied} copied at ${run.rate} on average; ` +
    `${run.stall} of waiting per block; ${run.misses} ${run.misses === 1 ? "copy" : "copies"} came late`,
  corrupted: (/** @type {number} */ count) => `${count} ${count === 1 ? "copy" : "copies"} arrived damaged, and came again`,

  /** What the server says, in the language of the page. */
  fromServer: (/** @type {string} */ text) => text,
  automatic: "auto",
  unlimited: "no limit",
  lineStep: (/** @type {string} */ step) => `${step}/step`,
  lineAll: (/** @type {string} */ all) => `all ${all} in VRAM`,
  lineNoWaiting: "hardly any waiting for the bus",
  lineWaiting: (/** @type {string} */ part) => `${part} waiting for the bus`,
  lineMore: (/** @type {string} */ size, /** @type {string} */ device, /** @type {string} */ step) =>
    `+${size} VRAM${device && ` on ${device}`} → ${step}`,
  lineStaged: (/** @type {string} */ size) => `${size} not page-locked`,

  freeModel: "Free model",
  freePinned: (/** @type {string} */ size) => `Free page-locked RAM${size && ` (${size})`}`,
  freeModelOf: (/** @type {string} */ model) => `Free ${model}`,
  freePinnedOf: (/** @type {string} */ model, /** @type {string} */ size) => `Free ${size} of page-locked RAM of ${model}`,
  freeing: "Freeing…",
  freed: (/** @type {string} */ device, /** @type {string} */ pinned) => `Freed ${device} of VRAM and ${pinned} of page-locked RAM.`,
  notFreed: (/** @type {string} */ error) => `Not freed: ${error}`,
};

/** @type {Strings} */
const CHINESE = {
  ...CHINESE_ESTIMATES,
  ...CHINESE_FLEET,
  ...CHINESE_PICTURES,
  ...CHINESE_PICKER,

  title: "WeightStream",
  tab: "显存",
  tooltip: "显存与流式模型（WeightStream）",
  showCommand: "WeightStream：显示显存",
  placementSettings: "GPU 分配",
  pageSettings: "页面",
  widgetSetting: "在“GPU 分配”节点上显示显存",

  resident: "常驻",
  staging: "暂存区",
  torch: "其他 torch",
  cache: "torch 缓存",
  other: "其他",
  free: "空闲",
  peak: "峰值",
  residentLong: "流式模型中常驻显存的权重",
  stagingLong: "流式权重经过的内存",
  torchLong: "torch 分配的其余内存：激活值、其他模型",
  cacheLong: "torch 为之后的分配保留的内存",
  otherLong: "其他程序、上下文，以及 ComfyUI 的动态显存",
  freeLong: "可供任意程序使用",
  peakLong: "自上次运行开始以来的最大用量",
  copy: "拷贝",
  stall: "等待",
  copyLong: "主机到设备",
  stallLong: "计算等待拷贝的时间占比",
  unknown: "未知",
  virtual: "虚拟",
  nearlyFull: "余量很少",
  nearlyFullLong: "90 % 以上被无法让出的内容占用：暂存区、激活值、其他模型和程序",
  atLimit: "已达上限",
  devices: "设备",
  models: "模型",
  openPanel: "打开面板",
  notices: "提示",
  host: "主机内存",
  ram: "内存",
  pinned: "锁页内存",
  noLimit: "上限未知",
  noDevices: (reason) => `没有可流式传输的设备${reason && `：${reason}`}。模型按 ComfyUI 自己的方式运行。`,
  noModels: "没有已加载的流式模型。",
  legend: "颜色说明",

  starting: "正在连接",
  idle: "空闲",
  allResident: "全部常驻",
  loading: "加载中",
  streaming: "流式传输中",
  running: "运行中，全部常驻",
  locking: "正在锁页内存",
  stale: "无更新",
  missing: "不可用",
  gone: "连接中断",
  newer: "请刷新页面",
  nearLimit: "接近上限",
  startingText: "正在等待服务器的首次应答。",
  staleText: "服务器已有 5 秒没有更新。",
  missingText: "服务器没有此接口：其 WeightStream 比本页面旧，或未加载。请重启 ComfyUI。",
  goneText: "服务器没有应答。",
  oldText: "下面是之前的数值。",
  newerText: "服务器的 WeightStream 比本页面新，请刷新页面。",

  unloaded: "未加载",
  ladderResident: "全部常驻",
  ladderPinned: "从锁页内存流式传输",
  ladderStaged: "从文件流式传输",
  ladderSynchronous: "需要时才拷贝",
  inactive: "未流式传输",
  fallback: "放置与要求不同",
  failed: "失败",
  refused: "未运行",
  because: (step, reason) => `${step}：${reason}`,
  and: (one, other) => `${one}，${other}`,
  stay: (kept, all) => `${all} 中的 ${kept} 常驻显存`,
  packed: (sent, weights) => `${sent}（压缩后，权重共 ${weights}）`,
  summaryResident: "整个模型都在显存中，无需拷贝。",
  summaryBus: (copied) => `每步拷贝 ${copied}，比计算更久：更多显存会更快。`,
  summaryCompute: (copied) => `每步拷贝 ${copied}，与计算同时进行，计算更久：更多显存不会更快。`,
  summarySynchronous: (copied) => `每步拷贝 ${copied}，其间不计算。`,
  summaryUnmeasured: (copied) => `每步拷贝 ${copied}；瓶颈尚未测得。`,
  used: (used, total) => `已用 ${used}，共 ${total}`,
  modelLoading: (amount, speed) => `${amount}，${speed}`,
  lastRunUncopied: (run) => `上次运行：${run.steps} 步，每步 ${run.step}；无需拷贝`,
  lastRun: (run) =>
    `上次运行：${run.steps} 步，每步 ${run.step}；平均以 ${run.rate} 拷贝 ${run.copied}；每块等待 ${run.stall}；${run.misses} 次拷贝迟到`,
  corrupted: (count) => `${count} 次拷贝损坏，已重新拷贝`,

  fromServer: inChinese,
  automatic: "自动",
  unlimited: "不限",
  lineStep: (step) => `每步 ${step}`,
  lineAll: (all) => `全部 ${all} 在显存中`,
  lineNoWaiting: "几乎不等待总线",
  lineWaiting: (part) => `${part} 的时间在等待总线`,
  lineMore: (size, device, step) => `${device}显存再多 ${size} → ${step}`,
  lineStaged: (size) => `${size} 未锁页`,

  freeModel: "释放模型",
  freePinned: (size) => `释放锁页内存${size && `（${size}）`}`,
  freeModelOf: (model) => `释放 ${model}`,
  freePinnedOf: (model, size) => `释放 ${model} 的锁页内存 ${size}`,
  freeing: "正在释放…",
  freed: (device, pinned) => `已释放显存 ${device}、锁页内存 ${pinned}。`,
  notFreed: (error) => `未释放：${error}`,
};

export const LANGUAGES = { en: ENGLISH, zh: CHINESE };

/**
 * The texts for a locale such as `en` or `zh-TW`; English where there are none.
 * @param {string | null | undefined} locale
 * @returns {Strings}
 */
export function stringsFor(locale) {
  return String(locale ?? "").toLowerCase().split(/[-_]/)[0] === "zh" ? CHINESE : ENGLISH;
}
