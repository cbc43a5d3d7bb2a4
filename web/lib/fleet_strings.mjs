/**
 * The texts of a fleet's card, in each language (strings.mjs).
 */

export const ENGLISH_FLEET = {
  fleetTitle: "Fleet",
  fleetWorkers: "Workers",
  fleetWaiting: (/** @type {number} */ count) =>
    count === 0 ? "No prompt waits" : `${count} ${count === 1 ? "prompt waits" : "prompts wait"}`,
  fleetReruns: (/** @type {number} */ count) => `${count} ran again because a worker died`,
  fleetIdle: (/** @type {number} */ count) => `${count} free workers`,
  fleetDone: (/** @type {number} */ done) => `${done} ${done === 1 ? "prompt" : "prompts"} done`,
  fleetChanges: (/** @type {number} */ changes) => `${changes} ${changes === 1 ? "change" : "changes"} of models`,
  fleetNothingLoaded: "no model loaded",
  fleetNoDevices: (/** @type {string} */ reason) => `No GPU to run on${reason && `: ${reason}`}.`,
  workerStarting: "starting",
  workerFree: "free",
  workerRunning: (/** @type {string} */ time) => `running${time && ` for ${time}`}`,
  workerRestarting: "started again",
  workerFailed: "cannot be started",
};

/** @type {typeof ENGLISH_FLEET} */
export const CHINESE_FLEET = {
  fleetTitle: "集群",
  fleetWorkers: "工作进程",
  fleetWaiting: (count) => (count === 0 ? "没有等待的任务" : `${count} 个任务在等待`),
  fleetReruns: (count) => `${count} 个任务因工作进程终止而重新运行`,
  fleetIdle: (count) => `${count} 个空闲工作进程`,
  fleetDone: (done) => `已完成 ${done} 个任务`,
  fleetChanges: (changes) => `更换模型 ${changes} 次`,
  fleetNothingLoaded: "未加载模型",
  fleetNoDevices: (reason) => `没有可运行的 GPU${reason && `：${reason}`}。`,
  workerStarting: "正在启动",
  workerFree: "空闲",
  workerRunning: (time) => `运行中${time && `，已 ${time}`}`,
  workerRestarting: "正在重新启动",
  workerFailed: "无法启动",
};
