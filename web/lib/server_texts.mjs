/**
 * Sentences of the server in Chinese. The server says them in English, in parts between semicolons; `…` stands for values,
 * which come in the same order. What is not here is shown as it came.
 */

/** @type {[english: string, chinese: string][]} */
export const CHINESE_TEXTS = [
  // plans
  ["not loaded", "未加载"],
  ["all … blocks stay (… on the device), nothing streamed", "全部 … 个块常驻（设备上共 …），无需流式传输"],
  ["… (packed, … of weights) a step streamed in … segments, from … of … blocks", "每步流式传输 …（压缩后，权重共 …），分 … 段，来自 …/… 个块"],
  ["… a step streamed in … segments, from … of … blocks", "每步流式传输 …，分 … 段，来自 …/… 个块"],
  ["… on the device: … of blocks stay, … outside of blocks, … staging, … to unpack in", "设备上共 …：常驻块 …，块外 …，暂存区 …，解压区 …"],
  ["… on the device: … of blocks stay, … outside of blocks, … staging", "设备上共 …：常驻块 …，块外 …，暂存区 …"],
  ["a step in … s, limited by the bus (… s of compute)", "每步 … 秒，瓶颈是总线（计算需 … 秒）"],
  ["a step in … s, hardly any of it waiting for the bus", "每步 … 秒，几乎不等待总线"],
  ["a step in … s", "每步 … 秒"],
  ["… more VRAM would make it … s", "显存再多 … 则为 … 秒"],
  ["… from page-locked memory, … from the file until they are page-locked too", "… 来自锁页内存，… 在锁页完成前来自文件"],
  ["… from page-locked memory, … staged from the file or pageable memory (…)", "… 来自锁页内存，… 经文件或普通内存中转（…）"],
  ["… from page-locked memory, … staged from the file or pageable memory", "… 来自锁页内存，… 经文件或普通内存中转"],
  ["… from page-locked memory over … links", "… 来自锁页内存，经 … 条链路"],
  ["… from page-locked memory", "… 来自锁页内存"],
  ["gave up … until it runs again", "已让出 …，下次运行时恢复"],
  ["before that: …", "此前：…"],
  // how weights come, and why
  ["… of … stay in VRAM", "…（共 …）常驻显存"],
  ["its settings ask for it", "由设置指定"],
  ["page-locked copies are made now", "正在制作锁页副本"],
  ["page-locked copies are made before the next step", "锁页副本将在下一步之前制作"],
  ["the limit of … page-locked memory is reached", "已达到锁页内存上限 …"],
  ["this model's limit of … page-locked memory is reached", "已达到此模型的锁页内存上限 …"],
  ["host memory is nearly full", "主机内存将满"],
  ["page-locking is switched off", "已关闭锁页"],
  ["page-locking … failed (CUDA error …)", "锁页 … 失败（CUDA 错误 …）"],
  ["weights do not stream packed: …", "权重未压缩传输：…"],
  // notices
  ["there is no GPU", "没有 GPU"],
  ["left as it is: …", "保持原样：…"],
  ["not streamed, loaded ComfyUI's own way: …", "未流式传输，按 ComfyUI 自己的方式加载：…"],
  ["ComfyUI was told to keep models in VRAM (--highvram or --gpu-only)", "ComfyUI 被要求把模型留在显存中（--highvram 或 --gpu-only）"],
  ["there is no GPU, so there is nothing to stream to", "没有 GPU，无处可流式传输"],
  ["it has no list of repeated blocks", "它没有重复的块"],
  ["somebody has changed it since it was loaded (…), and its loader gives it without that", "加载后有节点修改了它（…），而加载器给出的不含该修改"],
  ["connect this node directly behind the loader, and what changes the model behind this node", "请把本节点直接接在加载器之后，修改模型的节点接在本节点之后"],
  ["… refers to modules of the model that was loaded", "… 引用了已加载模型的模块"],
  ["connect this node directly behind the loader", "请把本节点直接接在加载器之后"],
  ["nothing is known of how it was loaded", "不知道它是如何加载的"],
  ["MODEL is not split, …", "MODEL 未拆分，…"],
  ["MODEL on … at the same time (parallel), close", "MODEL 同时在 … 上计算（并行，close）"],
  ["MODEL on … at the same time (parallel)", "MODEL 同时在 … 上计算（并行）"],
  ["MODEL does not work in parallel, …", "MODEL 不能并行，…"],
  ["that takes two GPUs", "那需要两个 GPU"],
  ["its loader does not give it once more as it is", "其加载器无法按现状再次给出它"],
  ["it runs on several GPUs at once", "它同时在多个 GPU 上运行"],
  ["put this node in front of what splits it", "请把本节点接在拆分它的节点之前"],
  ["it cannot be loaded once more (…)", "无法再次加载它（…）"],
  ["ComfyUI … cannot do that (…)", "ComfyUI … 无法做到（…）"],
  ["… works on … alone, not in parallel: …", "… 只在 … 上运行，未并行：…"],
  ["there is no room for it on all of …", "… 上没有足够的空间"],
  ["several GPUs are no faster (… s a step, … s on one of them)", "多个 GPU 并不更快（每步 … 秒，单个 GPU … 秒）"],
  ["a step gave other bits than on one GPU (by … at most)", "有一步的结果与单个 GPU 在位上不同（最多相差 …）"],
  ["some node keeps state from step to step (…), which GPUs would share", "有节点在各步之间保存状态（…），多个 GPU 会共用它"],
  ["nothing is known of what … does with tokens", "不了解 … 如何处理 token"],
  ["a node has put … into its blocks, which would see a part of the tokens", "有节点在其块中加入了 …，那只会看到一部分 token"],
  ["a node (…) runs code around its steps, which would run on each GPU", "有节点（…）在其各步外运行代码，那会在每个 GPU 上运行"],
  ["it is compiled", "它已被编译"],
  ["a LoRA hangs on its conditioning", "其条件上附有 LoRA"],
  ["its tokens cannot be divided (…)", "无法分割其 token（…）"],
  ["a device has begun the step again when another had ended", "有一个设备重新开始了这一步，而另一个已经结束"],
  ["devices have begun the step again too often", "各设备重新开始这一步的次数过多"],
  ["another device has failed", "另一个设备出错了"],
  ["the devices do not run the same blocks, so one waits for tokens that no other computes", "各设备运行的块不同，有一个在等待没有设备计算的 token"],
  ["the devices do not exchange tokens of the same block", "各设备交换的不是同一个块的 token"],
  ["the last of several … was not run", "一组 … 中的最后一个没有运行"],
  ["some … can be divided and others cannot", "有的 … 可以分割，有的不可以"],
  ["attention in … is not the host's", "… 中的注意力不是 ComfyUI 的"],
  ["a table has … rows for … tokens", "表有 … 行，而 token 有 … 个"],
  ["…, which its prompts use, cannot be had on another GPU", "其提示词使用的 … 无法放到另一个 GPU"],
  ["what is attached to it cannot be had on another GPU (…)", "附加在其上的内容无法放到另一个 GPU（…）"],
  ["…, which is attached to it, cannot be loaded on another GPU", "附加在其上的 … 无法加载到另一个 GPU"],
  ["… stays where its loader put it", "… 留在加载器放置的位置"],
  ["… is left out, …", "未使用 …，…"],
  ["… is not there (this machine has …)", "没有 …（本机有 …）"],
  ["… are not there (this machine has …)", "没有 …（本机有 …）"],
  ["MODEL on …, weights over …", "MODEL 在 … 上，权重经由 …"],
  ["MODEL on …", "MODEL 在 … 上"],
  ["vram_limit_gb=… is too small for …: its largest block and what lies outside of blocks need at least … (GiB). Set vram_limit_gb to that or more, or to 0 for automatic.",
    "vram_limit_gb=… 对 … 太小：最大的块和块外权重至少需要 … GiB。请设为该值或更大，或设为 0（自动）。"],
  ["nothing is connected: connect model, clip, or both", "没有任何连接：请连接 model、clip 或两者"],
  ["choose among these, or set on_missing to fallback", "请从中选择，或把 on_missing 设为 fallback"],
  // a fleet
  ["no worker is up", "没有可用的工作进程"],
  ["its process ended (signal …)", "其进程已结束（信号 …）"],
  ["its process ended (exit code …)", "其进程已结束（退出码 …）"],
  ["its process or its host is gone: …", "其进程或主机已消失：…"],
  ["its ComfyUI does not answer: …", "其 ComfyUI 没有应答：…"],
  ["its ComfyUI did not answer within … s", "其 ComfyUI 在 … 秒内没有应答"],
  ["its ComfyUI has no result of the prompt, and does not run it", "其 ComfyUI 没有该任务的结果，也没有运行它"],
  ["its GPU does not work any more: …", "其 GPU 已无法工作：…"],
  ["there is no ComfyUI at … on …", "… 处没有 ComfyUI（主机 …）"],
  ["there is no GPU for a worker; --workers N starts N of them anyway", "没有可供工作进程使用的 GPU；--workers N 仍可启动 N 个"],
  // why there is no estimate
  ["…: there is no such file in …", "…：在 … 中没有此文件"],
  ["…: most of its bytes lie in no repeated block, so it would not stream", "…：大部分权重不在重复的块中，因此不会流式传输"],
  ["…: its header cannot be read; the file ends within it", "…：无法读取文件头，文件在其中就结束了"],
  ["…: its header cannot be read; the file may be damaged (…)", "…：无法读取文件头，文件可能已损坏（…）"],
  ["…: its header is no JSON object; the file may be damaged", "…：文件头不是 JSON 对象，文件可能已损坏"],
  ["…: its header does not describe tensors (…); it may be damaged", "…：文件头没有描述张量（…），文件可能已损坏"],
  ["…: it is no safetensors file; only such files have a header to plan by", "…：不是 safetensors 文件，只有这种文件才能由文件头估算"],
  ["…: it is no index of a model in several files", "…：不是多文件模型的索引"],
];

const PATTERNS = CHINESE_TEXTS.map(([english, chinese]) => ({
  pattern: patternOf(english),
  chinese,
  // A sentence stands in place of its last value; elsewhere a value with a semicolon would be several parts of the text.
  isOpen: /…\)?$/.test(english),
}));

/** @param {string} english */
function patternOf(english) {
  const parts = english.split("…").map((part) => part.replace(/[.*+?^${}()|[\]\\]/g, "\\$&").replace(/\b(block|segment)s\b/g, "$1s?"));
  return new RegExp(`^${parts.join("(.+?)")}$`);
}

/**
 * What the server says, in Chinese as far as it is known; also what stands in place of a value.
 * @param {string} text
 * @returns {string}
 */
export function inChinese(text) {
  return whole(text) ?? text.split("; ").map((part) => whole(part) ?? part).join("；");
}

/** @param {string} text */
function whole(text) {
  for (const { pattern, chinese, isOpen } of PATTERNS) {
    const found = pattern.exec(text);
    if (!found || (!isOpen && found.slice(1).some((value) => value.includes("; ")))) continue;
    let place = 0;
    return chinese.replace(/…/g, () => inChinese(found[++place]));
  }
  return null;
}
