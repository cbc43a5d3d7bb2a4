/**
 * The texts of the picker of GPUs, in each language (strings.mjs).
 */

export const ENGLISH_PICKER = {
  pickGpus: "Choose GPUs",
  pickDefault: "default",
  pickHint:
    "In the order in which they are chosen: the first computes first. With none chosen: those that WEIGHTSTREAM_GPUS names, or all.",
  pickReplaces: "The text in devices is no list of GPUs. A choice replaces it.",
  pickUnreadable: "no list of GPUs",
  pickMissing: (/** @type {string} */ names) => `not here: ${names}`,
  pickNotHere: "not on this server",
  pickEarlier: (/** @type {string} */ name) => `Move ${name} forward`,
  pickNone: "Choose none",
  pickOnly: (/** @type {string} */ device) => `The only GPU here: ${device}`,
  pickLinked: "devices comes from another node.",
};

/** @type {typeof ENGLISH_PICKER} */
export const CHINESE_PICKER = {
  pickGpus: "选择 GPU",
  pickDefault: "默认",
  pickHint: "按选择的先后排列：第一个最先计算。不选时使用 WEIGHTSTREAM_GPUS 中的 GPU，未设置则使用全部。",
  pickReplaces: "devices 中的文本不是 GPU 列表，选择后将被替换。",
  pickUnreadable: "不是 GPU 列表",
  pickMissing: (names) => `本机没有：${names}`,
  pickNotHere: "此服务器上没有",
  pickEarlier: (name) => `将 ${name} 前移`,
  pickNone: "全部不选",
  pickOnly: (device) => `只有一个 GPU：${device}`,
  pickLinked: "devices 由其他节点给出。",
};
