/**
 * Every text of the page, in each language. Sentences of the server (plans, reasons, notices) are shown as they come.
 *
 * @typedef {typeof ENGLISH} Strings
 */

const ENGLISH = {
  title: "WeightStream",
  tooltip: "VRAM and streamed models (WeightStream)",
  showCommand: "WeightStream: show VRAM",
  widgetSetting: "Show VRAM on the GPU Placement node",

  resident: "Resident blocks",
  staging: "Staging",
  torch: "Other torch memory",
  cache: "torch's cache",
  other: "Other programs, dynamic VRAM",
  free: "Free",
  peak: "Peak of this run",
  copy: "copy",
  stall: "stall",
  copyLong: "Host to device",
  stallLong: "Compute waited for copies",
  unknown: "not known",
  virtual: "virtual",
  nearlyFull: "nearly full",
  atLimit: "at its limit",
  details: "Details",
  devices: "Devices",
  models: "Models",
  notices: "Notices",
  host: "Host memory",
  ram: "RAM",
  pinned: "Page-locked",
  noLimit: "no limit known",
  noDevices: "No GPU here: models run in RAM, and nothing streams.",
  noModels: "No streamed model is loaded.",
  legend: "What the colours mean",
  history: "Last two minutes",

  starting: "Connecting",
  idle: "Idle",
  allResident: "All resident",
  loading: "Loading",
  streaming: "Streaming",
  running: "Running, all resident",
  stale: "No news",
  missing: "Not available",
  gone: "No connection",
  newer: "Reload this page",
  nearLimit: "near the limit",
  startingText: "Waiting for the server's first answer.",
  staleText: "The server has said nothing for 5 s. The figures below are from before.",
  missingText: "The server has no such route: its WeightStream is older than this page, or was not loaded. Restart ComfyUI.",
  goneText: "The server does not answer. The figures below are from before.",
  newerText: "The server's WeightStream is newer than this page. Reload it.",

  unloaded: "not loaded",
  ladderResident: "all resident",
  ladderPinned: "streams from page-locked RAM",
  ladderStaged: "streams from the file",
  ladderSynchronous: "copied when needed",
  inactive: "Not streaming",
  fallback: "Placed differently",
  node: (/** @type {string} */ id) => `node ${id}`,
  because: (/** @type {string} */ step, /** @type {string} */ reason) => `${step}: ${reason}`,
  used: (/** @type {string} */ used, /** @type {string} */ total) => `${used} of ${total} used`,
  modelLoading: (/** @type {string} */ amount, /** @type {string} */ speed) => `${amount}, ${speed}`,
  lastRun: (/** @type {{steps: number, step: string, copied: string, rate: string, stall: string, misses: number}} */ run) =>
    `Last run: ${run.steps} ${run.steps === 1 ? "step" : "steps"} of ${run.step}; ${run.copied} copied at ${run.rate}; ` +
    `${run.stall} waited per block; ${run.misses} ${run.misses === 1 ? "miss" : "misses"}`,
  corrupted: (/** @type {number} */ count) => `${count} ${count === 1 ? "copy" : "copies"} arrived damaged, and came again`,

  freeModel: "Free model",
  freePinned: (/** @type {string} */ size) => `Free page-locked RAM (${size})`,
  freeModelOf: (/** @type {string} */ model) => `Free ${model}`,
  freePinnedOf: (/** @type {string} */ model, /** @type {string} */ size) => `Free ${size} of page-locked RAM of ${model}`,
  freeing: "Freeing…",
  freed: (/** @type {string} */ device, /** @type {string} */ pinned) => `Freed ${device} of VRAM and ${pinned} of page-locked RAM.`,
  notFreed: (/** @type {string} */ error) => `Not freed: ${error}`,
};

/** @type {Strings} */
const CHINESE = {
  title: "WeightStream",
  tooltip: "显存与流式模型（WeightStream）",
  showCommand: "WeightStream：显示显存",
  widgetSetting: "在 GPU Placement 节点上显示显存",

  resident: "常驻块",
  staging: "暂存区",
  torch: "其他 torch 内存",
  cache: "torch 缓存",
  other: "其他程序、动态显存",
  free: "空闲",
  peak: "本次运行峰值",
  copy: "拷贝",
  stall: "等待",
  copyLong: "主机到设备",
  stallLong: "计算等待拷贝",
  unknown: "未知",
  virtual: "虚拟",
  nearlyFull: "将满",
  atLimit: "已达上限",
  details: "详情",
  devices: "设备",
  models: "模型",
  notices: "提示",
  host: "主机内存",
  ram: "内存",
  pinned: "锁页内存",
  noLimit: "上限未知",
  noDevices: "此处没有 GPU：模型在内存中运行，不做流式传输。",
  noModels: "没有已加载的流式模型。",
  legend: "颜色说明",
  history: "最近两分钟",

  starting: "正在连接",
  idle: "空闲",
  allResident: "全部常驻",
  loading: "加载中",
  streaming: "流式传输中",
  running: "运行中，全部常驻",
  stale: "无更新",
  missing: "不可用",
  gone: "连接中断",
  newer: "请刷新页面",
  nearLimit: "接近上限",
  startingText: "正在等待服务器的首次应答。",
  staleText: "服务器已有 5 秒没有更新，下面是之前的数值。",
  missingText: "服务器没有此接口：其 WeightStream 比本页面旧，或未加载。请重启 ComfyUI。",
  goneText: "服务器没有应答，下面是之前的数值。",
  newerText: "服务器的 WeightStream 比本页面新，请刷新页面。",

  unloaded: "未加载",
  ladderResident: "全部常驻",
  ladderPinned: "从锁页内存流式传输",
  ladderStaged: "从文件流式传输",
  ladderSynchronous: "需要时才拷贝",
  inactive: "未流式传输",
  fallback: "放置与要求不同",
  node: (id) => `节点 ${id}`,
  because: (step, reason) => `${step}：${reason}`,
  used: (used, total) => `已用 ${used}，共 ${total}`,
  modelLoading: (amount, speed) => `${amount}，${speed}`,
  lastRun: (run) =>
    `上次运行：${run.steps} 步，每步 ${run.step}；以 ${run.rate} 拷贝 ${run.copied}；每块等待 ${run.stall}；未命中 ${run.misses} 次`,
  corrupted: (count) => `${count} 次拷贝损坏，已重新拷贝`,

  freeModel: "释放模型",
  freePinned: (size) => `释放锁页内存（${size}）`,
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
