/**
 * The texts of what a model will do before it runs, in each language (strings.mjs).
 */

export const ENGLISH_ESTIMATES = {
  estimateTitle: "Before a run",
  estimateBar: "Parts of the model",
  estimateFile: "File",
  estimateVram: "In VRAM",
  estimateStreams: "Streams",
  estimateBusLabel: "Bus",
  estimateBus: (/** @type {string} */ streamed, /** @type {string} */ bus) => `${streamed} stream in each step, ${bus} on the bus`,
  estimateStep: (/** @type {string} */ streamed, /** @type {string} */ step) => `About ${step}/step; ${streamed} stream in each`,
  estimateAll: (/** @type {string} */ stays) => `All ${stays} fit into VRAM; nothing streams`,
  estimateTooLittle: (/** @type {string} */ least) => `Too little VRAM: ${least} are the least that it runs with`,
  estimateLowLimit: (/** @type {string} */ least) => `vram_limit_gb is too low: ${least} are the least that it runs with`,
  estimateTheirs: "As the workflow is, ComfyUI loads it its own way. “Stream this workflow's models”, in the menu of the canvas, makes it stream.",
  estimateOff: "The mode of Async Offload Settings is off, so ComfyUI loads it its own way. Set it to auto to have it stream.",
  estimateSmaller: (/** @type {string} */ file, /** @type {string} */ loaded) => `${file}; ${loaded} once it is loaded`,
  estimateAlone: (/** @type {string} */ device) => `This is for ${device} alone; GPU Placement can share the model among GPUs.`,
  estimateStays: (/** @type {string} */ stays, /** @type {string} */ room) => `${stays} stay; ${room}`,
  estimateRoom: (/** @type {{device: string, vram: string, reserve: string}} */ { device, vram, reserve }) =>
    `${device} has ${vram}, of which ${reserve} are left to activations and others`,
  estimateLimit: (/** @type {{device: string, vram: string, limit: string}} */ { device, vram, limit }) =>
    `${device} has ${vram}, and vram_limit_gb is ${limit}`,
  estimateEach: (/** @type {{bytes: string, streamed: number, blocks: number}} */ { bytes, streamed, blocks }) =>
    `${bytes} in each step, from ${streamed} of ${blocks} blocks`,
  estimateOnBus: (/** @type {{seconds: string, rate: string, source: string}} */ { seconds, rate, source }) =>
    `${seconds} of each step at ${rate} (${source})`,
  estimateMeasured: "measured",
  estimateAssumed: "assumed",
  estimatePacked: (/** @type {string} */ text, /** @type {string} */ packed) => `${text}; about ${packed} with packed weights`,
  estimateUnknown: (/** @type {string} */ seconds) => `known after the first run; streaming costs nothing where a step computes for ${seconds} or more`,
  estimateWaits: (/** @type {string} */ seconds) => `known after the first run; a step takes ${seconds} more than it computes, since it waits for its copies`,
  estimatePredicted: (/** @type {string} */ step, /** @type {string} */ compute) => `${step} predicted, with ${compute} of compute as in its last run`,
  estimateRam: (/** @type {{bytes: string, ram: string, most: string, file: string}} */ { bytes, ram, most, file }) =>
    `${bytes} are needed, page-locked; up to ${most} of ${ram} may be${file && `, so ${file} of each step come from the file`}`,
  estimateDoMissing: (/** @type {string} */ missing) => `Download the file again: ${missing} of it are missing.`,
  estimateDoVram: "Use a smaller file (fp8 or GGUF), or a GPU with more VRAM.",
  estimateDoLimit: (/** @type {boolean} */ bySettings) =>
    `Raise vram_limit_gb of ${bySettings ? "Async Offload Settings" : "the loader"}, or set it to 0 for automatic.`,
  estimateDoDisk: "Use a smaller file (fp8 or GGUF), or add RAM: it does not hold this file, and each step waits for the disk.",
  estimateDoFile: (/** @type {string} */ file) => `It runs, but ${file} of each step come more slowly. Use a smaller file (fp8 or GGUF), or add RAM.`,
  estimateDoPin: (/** @type {string} */ file) => `Set pin_memory of Async Offload Settings to on: ${file} of each step come more slowly.`,
  estimateDoPinMore: (/** @type {string} */ file) =>
    `Raise pinned_limit_gb of Async Offload Settings, or set it to 0: ${file} of each step come more slowly.`,
  estimateDoPinHost: (/** @type {string} */ file) =>
    `Start ComfyUI without --disable-pinned-memory, or set pin_memory of Async Offload Settings to on: ${file} of each step come more slowly.`,
  estimateDoRam: (/** @type {string} */ available) => `Close programs that take RAM: only ${available} are free now.`,
};

/** @type {typeof ENGLISH_ESTIMATES} */
export const CHINESE_ESTIMATES = {
  estimateTitle: "运行之前",
  estimateBar: "模型的组成",
  estimateFile: "文件",
  estimateVram: "显存中",
  estimateStreams: "流式传输",
  estimateBusLabel: "总线",
  estimateBus: (streamed, bus) => `每步流式传输 ${streamed}，占用总线 ${bus}`,
  estimateStep: (streamed, step) => `每步约 ${step}；其中流式传输 ${streamed}`,
  estimateAll: (stays) => `全部 ${stays} 可放入显存，无需流式传输`,
  estimateTooLittle: (least) => `显存太小：运行至少需要 ${least}`,
  estimateLowLimit: (least) => `vram_limit_gb 太小：运行至少需要 ${least}`,
  estimateTheirs: "按当前工作流，ComfyUI 会以自己的方式加载它。画布菜单中的“流式加载此工作流的模型”可使其流式传输。",
  estimateOff: "“异步卸载设置”的 mode 为 off，因此 ComfyUI 会以自己的方式加载它。设为 auto 可使其流式传输。",
  estimateSmaller: (file, loaded) => `${file}；加载后为 ${loaded}`,
  estimateAlone: (device) => `此为仅用 ${device} 时的估计；“GPU 分配”可把模型分布到多个 GPU。`,
  estimateStays: (stays, room) => `${stays} 常驻；${room}`,
  estimateRoom: ({ device, vram, reserve }) => `${device} 共 ${vram}，其中 ${reserve} 留给激活值和其他程序`,
  estimateLimit: ({ device, vram, limit }) => `${device} 共 ${vram}，vram_limit_gb 为 ${limit}`,
  estimateEach: ({ bytes, streamed, blocks }) => `每步 ${bytes}，来自 ${streamed}/${blocks} 个块`,
  estimateOnBus: ({ seconds, rate, source }) => `每步 ${seconds}，速度 ${rate}（${source}）`,
  estimateMeasured: "实测",
  estimateAssumed: "假定",
  estimatePacked: (text, packed) => `${text}；权重压缩后约 ${packed}`,
  estimateUnknown: (seconds) => `首次运行后可知；若每步计算 ${seconds} 或更久，流式传输不耗额外时间`,
  estimateWaits: (seconds) => `首次运行后可知；每步要等待复制，比计算多用 ${seconds}`,
  estimatePredicted: (step, compute) => `预计 ${step}，其中计算 ${compute}（与上次运行相同）`,
  estimateRam: ({ bytes, ram, most, file }) => `需锁页 ${bytes}；${ram} 中最多可锁页 ${most}${file && `，因此每步有 ${file} 来自文件`}`,
  estimateDoMissing: (missing) => `请重新下载文件：缺少 ${missing}。`,
  estimateDoVram: "请使用更小的文件（fp8 或 GGUF），或显存更大的 GPU。",
  estimateDoLimit: (bySettings) => `请提高${bySettings ? "“异步卸载设置”" : "加载器"}的 vram_limit_gb，或设为 0（自动）。`,
  estimateDoDisk: "请使用更小的文件（fp8 或 GGUF），或增加内存：内存放不下此文件，每步都要等待磁盘。",
  estimateDoFile: (file) => `可以运行，但每步有 ${file} 传输较慢。请使用更小的文件（fp8 或 GGUF），或增加内存。`,
  estimateDoPin: (file) => `请将“异步卸载设置”的 pin_memory 设为 on：每步有 ${file} 传输较慢。`,
  estimateDoPinMore: (file) => `请提高“异步卸载设置”的 pinned_limit_gb，或设为 0：每步有 ${file} 传输较慢。`,
  estimateDoPinHost: (file) => `启动 ComfyUI 时请勿使用 --disable-pinned-memory，或将“异步卸载设置”的 pin_memory 设为 on：每步有 ${file} 传输较慢。`,
  estimateDoRam: (available) => `请关闭占用内存的程序：目前仅有 ${available} 空闲。`,
};
