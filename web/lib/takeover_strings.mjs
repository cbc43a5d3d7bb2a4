/**
 * Texts of the takeover. In English the server's sentences are shown; in Chinese each has its own, by its code.
 */

const ENGLISH = {
  chinese: false,
  command: "WeightStream: stream this workflow's models",
  changed: (/** @type {number} */ models) =>
    models === 0 ? "The workflow was converted" : models === 1 ? "1 model streams now" : `${models} models stream now`,
  unchanged: "Nothing to change: no loader here gives a model that does not stream",
  failed: "The workflow was not converted",
  because: (/** @type {string | number} */ failure) => {
    if (failure === 404 || failure === 405)
      return "The server has no such route: its WeightStream is older than this page. Restart ComfyUI.";
    if (failure === 413) return "The workflow is larger than ComfyUI takes. Start it with a larger --max-upload-size.";
    return typeof failure === "number" ? `The server answers with HTTP status ${failure}; its log says more.` : failure;
  },
  meanwhile: "Another workflow was opened meanwhile, or this one was changed. Nothing is replaced; give the command again.",
  more: (/** @type {number} */ count) => `… and ${count} more`,
  next: "Run, then read the line on the node.",
  undo: "Undo takes all of it back.",
  where: (/** @type {string} */ name, /** @type {string} */ graph) => `${name}${graph && ` (in ${graph})`}`,
  numbered: (/** @type {string} */ name, /** @type {string} */ node) => `${name} ${node}`,
  becomes: (/** @type {string} */ node, /** @type {string} */ text) => `${node} ${text}`,
  note: (/** @type {string} */ node, /** @type {string} */ text) => `${node}: ${text}`,
};

/** @type {typeof ENGLISH} */
const CHINESE = {
  chinese: true,
  command: "WeightStream：流式加载此工作流的模型",
  changed: (models) => (models === 0 ? "工作流已转换" : `现在有 ${models} 个模型流式加载`),
  unchanged: "无需更改：没有加载器给出尚未流式加载的模型",
  failed: "工作流未转换",
  because: (failure) => {
    if (failure === 404 || failure === 405) return "服务器没有此路由：其 WeightStream 比本页面旧。请重启 ComfyUI。";
    if (failure === 413) return "工作流超出 ComfyUI 接受的大小。请用更大的 --max-upload-size 启动。";
    return typeof failure === "number" ? `服务器返回 HTTP 状态 ${failure}；详情见其日志。` : failure;
  },
  meanwhile: "其间打开了另一个工作流，或此工作流有改动。未作任何替换；请再次执行命令。",
  more: (count) => `……另有 ${count} 条`,
  next: "请运行，然后查看节点上的一行说明。",
  undo: "撤销一次即可全部恢复。",
  where: (name, graph) => `${name}${graph && `（在 ${graph} 中）`}`,
  numbered: (name, node) => `${name} ${node}`,
  becomes: (node, text) => `${node}：${text}`,
  note: (node, text) => `${node}：${text}`,
};

export const TAKEOVER_LANGUAGES = { en: ENGLISH, zh: CHINESE };

/** @param {string | null | undefined} locale */
export function takeoverStrings(locale) {
  return String(locale ?? "").toLowerCase().split(/[-_]/)[0] === "zh" ? CHINESE : ENGLISH;
}

/** @type {Record<string, (values: Record<string, any>) => string>} */
export const NOTES_IN_CHINESE = {
  loader: () => "已换成 Streamed Model Loader",
  host: ({ name }) => `已换成 ${name}`,
  settings: () => "其后已接上 Async Offload Settings",
  "settings-clip": () => "现在经 Async Offload Settings 流式加载",
  placement: ({ inputs }) => `其后已接上 GPU Placement：${inputs}`,
  "placement-used": ({ number, inputs }) => `现在经过 GPU Placement（节点 ${number}）：${inputs}`,
  "selector-gone": () => "已删除：没有节点再读取它",
  "virtual-vram": ({ gib }) =>
    `不再需要 virtual_vram_gb=${gib}：放不下的部分从内存流式加载。若要留出显存，请把 vram_limit_gb 设为文件大小减去 ${gib}`,
  donor: ({ donor, devices }) => `${donor} 原先只出借显存；现在各块按显存和速度分布在 ${devices} 上，${donor} 也可能参与计算`,
  donors: () => "其他 GPU 原先只出借显存；现在各块按显存和速度分布在所有 GPU 上，它们都可能参与计算",
  limit: ({ gib, name, value }) => `以 vram_limit_gb=${gib} 代替 ${name}=${value}；其余部分从内存流式加载`,
  "limit-left": ({ name, value, gib }) =>
    `${name}=${value}：未转换，因为其后没有加入设置节点；请手动设置 vram_limit_gb=${gib}`,
  ratio: ({ name, value, ratio }) => `${name}=${value}：各 GPU 按 ${ratio} 分配各块；放不下的从内存流式加载，cpu 不再有单独的份额`,
  "by-memory": ({ name, value, devices }) => `${name}=${value}：不保留这种划分；各块按显存和速度分布在 ${devices} 上`,
  unread: ({ name, value }) => `无法读懂 ${name}=${value}；请手动设置 vram_limit_gb，或 devices 与 ratio`,
  linked: ({ name }) => `${name} 来自连线，该连线会消失；请在我们的节点上手动设置`,
  device: ({ name, value }) => `${name}=${value} 没有对应设置：只有 NVIDIA 和 AMD 的 GPU 能流式加载；它留在 ComfyUI 放置的位置`,
  "compute-cpu": ({ name }) => `MODEL 没有与 ${name}=cpu 对应的设置：它在 GPU 上计算，并流式加载到那里`,
  "no-device": ({ name, value }) => `此节点没有与 ${name}=${value} 对应的设置；它留在 ComfyUI 放置的位置`,
  alone: ({ name, value, instead }) => `${name}=${value}：旁边没有可与它一起接到 GPU Placement 的 MODEL；请使用 ComfyUI 的 ${instead}`,
  "placement-stays": ({ number, inputs }) => `GPU Placement（节点 ${number}）已在其后，保持不变；请在那里手动设置：${inputs}`,
  "link-gone": ({ name }) => `这里没有与输入 ${name} 对应的输入，其连线已删除`,
  precision: () => "high_precision_loras 没有对应设置：LoRA 按 ComfyUI 的方式计算",
  "no-equal": () => "这里没有对应的节点；请使用其原节点包中不带 MultiGPU 的同名节点",
  "no-equal-wan": ({ others }) =>
    `以及另外 ${others} 个同类节点：Wan 包装器加载的模型不能流式加载；请使用它自己不带 MultiGPU 的节点，或 ComfyUI 的 Wan 节点`,
  "input-gone": ({ name }) => `子图的输入 ${name} 现在没有去向；请删除它`,
  "group-node": () => "是旧的组节点；请先在页面中把它转换为子图，然后再转换一次",
};
