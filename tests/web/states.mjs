/**
 * The states that the panel has, by name, as its feed would give them. Tests look at what is made of them; states.html
 * shows them.
 */

/** @import { Feed, FeedState } from "../../web/lib/feed.mjs" */
/** @import { Device, Event, Host, Model, Run, Status } from "../../web/lib/status.mjs" */
/** @import { Steps } from "../../web/lib/step_requests.mjs" */
/** @import { DeviceTrace } from "../../web/lib/timeline.mjs" */
/** @import { Cause } from "../../web/lib/why.mjs" */

export const GB = 1e9;
export const NOW = 1_764_320_000_000;

/**
 * A device, of which `free` is what the parts leave; not known where a part is not.
 * @param {Partial<Device>} [changes]
 * @returns {Device}
 */
export function device(changes = {}) {
  const all = {
    device: "gpu:0", name: "NVIDIA GeForce RTX 4090", virtual: false, total: 25.2 * GB,
    resident: 0, staging: 0, torch: 0.2 * GB, cache: 0.3 * GB, other: 1.1 * GB, peak: null,
    copy_rate: 0, stalled: 0, ...changes,
  };
  const used = all.resident + all.staging + (all.torch ?? 0) + (all.cache ?? 0) + (all.other ?? 0);
  return { free: all.total === null || all.other === null ? null : all.total - used, ...all };
}

/**
 * @param {Partial<Model>} [changes]
 * @returns {Model}
 */
export function model(changes = {}) {
  return {
    id: "1", name: "flux1-dev.safetensors", device: "gpu:0", node_id: "4", ladder: "pinned",
    reason: "12.6 GB of 23.8 GB stay in VRAM",
    plan: "11.2 GB a step streamed in 84 segments, from 57 of 57 blocks; 13.1 GB on the device: 12.1 GB of blocks resident, "
      + "500 MB outside of blocks, 500 MB staging; a step in 0.324 s, limited by the bus (0.177 s of compute); 8.6 GB more "
      + "VRAM would make it 0.178 s; 11.2 GB from page-locked memory",
    running: false, loading: null, last_run: run(), pinned_bytes: 11.4 * GB, resident_bytes: 12.1 * GB,
    rest_bytes: 0.5 * GB, streamed_block_bytes: 11.2 * GB, limited_by: "bus", ...changes,
  };
}

/**
 * @param {Partial<Run>} [changes]
 * @returns {Run}
 */
export function run(changes = {}) {
  return {
    steps: 20, reruns: 0, bytes: 224 * GB, rate: 34.6 * GB, stall_ms_per_block: 2.4, misses: 0, corrupted: 0, step_seconds: 0.324,
    waiting: 0.43, ...changes,
  };
}

/**
 * Why the model is slow: it is too large for a good machine.
 * @param {Partial<Cause>} [changes]
 * @returns {Cause}
 */
export function cause(changes = {}) {
  return { model: "1", device: "gpu:0", kind: "room", seconds: 0.139, streamed: 11.2 * GB, total: 25.2 * GB, ...changes };
}

/**
 * A step of so many blocks behind a bus that brings each a little late.
 * @param {Partial<DeviceTrace>} [changes]
 * @param {number} [blocks]
 * @returns {DeviceTrace}
 */
export function trace(changes = {}, blocks = 24) {
  const [compute, wait, copy] = [0.006, 0.004, 0.0098];
  const at = (/** @type {number} */ place) => place * (compute + wait);
  const numbers = Array.from({ length: blocks }, (_, place) => place);
  return {
    device: "gpu:0", step: 7, time: NOW / 1000, offset: 0, seconds: at(blocks), waited: blocks * wait, copied: blocks * 0.34 * GB,
    blocks: numbers.map((place) => `double_blocks.${place}`),
    compute: numbers.map((place) => [at(place), at(place) + compute + wait, place]),
    waits: numbers.map((place) => [at(place), at(place) + wait, 0]),
    unpacking: [],
    copies: numbers.map((place) => [at(place) - 0.004, at(place) - 0.004 + copy, 0.34 * GB]),
    ...changes,
  };
}

/** The requests of single steps, answered. @type {Steps} */
export const STEPS = {
  timeline: async () => ({ ok: true, devices: [trace()] }),
  askTimeline: async () => ({ ok: false, error: "steps of a compiled model are not recorded: it would be compiled anew" }),
  runs: async () => ({
    ok: true,
    runs: [0.41, 0.36, 0.324].map((seconds, place) => ({
      number: place + 2,
      steps: Array.from({ length: 20 }, (_, step) => step + 1),
      seconds: Array.from({ length: 20 }, (_, step) => seconds * (step < 2 ? 2.2 - 0.6 * step : 1 + 0.02 * (step % 3))),
      rate: Array.from({ length: 20 }, (_, step) => (step < 2 ? 6 : 34.6 - 4 * (2 - place)) * GB),
      waiting: Array.from({ length: 20 }, (_, step) => (step < 2 ? 0.8 : 0.43 + 0.06 * (2 - place))),
    })),
  }),
  download: async () => {},
};

/**
 * @param {Partial<Status>} [changes]
 * @returns {Status}
 */
export function status(changes = {}) {
  return {
    schema: 1, time: NOW / 1000, devices: [device()], host: host(), models: [], notices: [], why_no_devices: null, ...changes,
  };
}

/**
 * @param {Partial<Host>} [changes]
 * @returns {Host}
 */
export function host(changes = {}) {
  return { ram_total: 67.4 * GB, ram_available: 41.0 * GB, pinned: 0, pinned_limit: 60.6 * GB, ...changes };
}

/**
 * The event that a server with this status would send.
 * @param {Status} from
 * @param {Partial<Event>} [changes]
 * @returns {Event}
 */
export function event(from, changes = {}) {
  return {
    schema: 1,
    time: from.time,
    revision: "00000001",
    devices: from.devices.map((each) => [
      each.device, each.total, each.free, each.resident, each.staging, each.torch, each.cache, each.other, each.peak,
      each.copy_rate, each.stalled,
    ]),
    host: [from.host.ram_total, from.host.ram_available, from.host.pinned, from.host.pinned_limit],
    loading: from.models.flatMap(({ id, loading }) => (loading ? [[id, loading.done, loading.total, loading.rate]] : [])),
    running: [...new Set(from.models.filter((each) => each.running).map(({ id }) => id))],
    ...changes,
  };
}

/**
 * @param {Status | null} shown
 * @param {Partial<FeedState>} [changes]
 * @returns {FeedState}
 */
export function feedState(shown, changes = {}) {
  return { link: "live", status: shown, event: null, history: historyOf(shown), now: NOW, ...changes };
}

/**
 * Two minutes that end with what the devices have now; each device was loaded at another time.
 * @param {Status | null} shown
 */
function historyOf(shown) {
  return new Map(
    (shown?.devices ?? []).map(({ device: name, total, free }, place) => {
      const used = total === null || free === null ? 0 : total - free;
      const samples = Array.from({ length: total === null ? 0 : 121 }, (_, second) => {
        const loaded = Math.min(1, Math.max(0.08, (second - 20 - 5 * place) / 30));
        return /** @type {[number, number]} */ ([NOW - (120 - second) * 1000, used * loaded * (1 - 0.05 * (second % 7 === 0 ? 1 : 0))]);
      });
      return [name, samples];
    }),
  );
}

/** What is left of a model that was given to other GPUs. */
const UNLOADED = model({
  ladder: "unloaded", reason: "", plan: "not loaded", last_run: null, pinned_bytes: 0, resident_bytes: 0, rest_bytes: 0,
  streamed_block_bytes: 0, limited_by: "",
});

const STREAMING_DEVICE = device({
  resident: 12.6 * GB, staging: 0.5 * GB, torch: 2.9 * GB, cache: 1.2 * GB, peak: 19.4 * GB, copy_rate: 34.4 * GB,
  stalled: 0.43,
});
const STREAMING = status({
  devices: [STREAMING_DEVICE],
  host: host({ pinned: 11.4 * GB, ram_available: 28.5 * GB }),
  models: [model({ running: true })],
  causes: [cause()],
});

const EIGHT = Array.from({ length: 8 }, (_, place) =>
  device({
    device: `gpu:${place}`, name: "NVIDIA H200", total: 150.1 * GB, resident: (8 + 9 * place) * GB, staging: 0.5 * GB,
    torch: (2 + place) * GB, cache: 3 * GB, other: 0.6 * GB, peak: (60 + 9 * place) * GB, copy_rate: (52 - place) * GB,
    stalled: 0.02 * place,
  }),
);

/** @type {Record<string, FeedState>} */
export const STATES = {
  starting: feedState(null, { link: "starting" }),
  // The model that was given to other GPUs is left out.
  idle: feedState(status({ models: [UNLOADED] })),
  loading: feedState(
    status({
      devices: [device({ resident: 6.1 * GB, staging: 0.4 * GB, copy_rate: 1.6 * GB, stalled: 0.91 })],
      host: host({ pinned: 2.1 * GB }),
      models: [
        model({
          running: true, last_run: null, ladder: "staged", reason: "page-locked copies are still being made",
          plan: "11.2 GB a step streamed in 84 segments, from 57 of 57 blocks; 13.1 GB on the device: 12.1 GB of blocks "
            + "resident, 500 MB outside of blocks, 500 MB staging; 2.1 GB from page-locked memory, 9.1 GB from the file until "
            + "they are page-locked too",
          pinned_bytes: 2.1 * GB, limited_by: "", loading: { done: 8.4 * GB, total: 23.8 * GB, rate: 1.6 * GB },
        }),
      ],
    }),
  ),
  allResident: feedState(
    status({
      devices: [device({ name: "NVIDIA H200", total: 150.1 * GB, resident: 23.8 * GB, peak: 27.6 * GB })],
      models: [
        model({
          ladder: "resident", reason: "", pinned_bytes: 0,
          plan: "all 57 blocks resident (23.8 GB on the device), nothing streamed; a step in 0.174 s, limited by compute",
          resident_bytes: 23.3 * GB, streamed_block_bytes: 0, limited_by: "compute",
          last_run: run({ bytes: 0, rate: null, stall_ms_per_block: 0, step_seconds: 0.174 }),
        }),
      ],
    }),
  ),
  streaming: feedState(STREAMING, { event: event(STREAMING), progress: { done: 7, total: 20, left: 4.2 } }),
  // An 8 GB card in a slot of four lanes, with a browser beside it.
  slow: feedState(
    status({
      devices: [
        device({
          name: "NVIDIA GeForce RTX 4060", total: 8.6 * GB, resident: 2.1 * GB, staging: 0.4 * GB, torch: 1.6 * GB, cache: 0.2 * GB,
          other: 2.9 * GB, peak: 7.9 * GB, copy_rate: 6.3 * GB, stalled: 0.86, link: { generation: 4, width: 4 },
          card: { generation: 4, width: 8 },
        }),
      ],
      host: host({ ram_total: 33.6 * GB, ram_available: 3.9 * GB, pinned: 13.4 * GB, pinned_limit: 13.4 * GB }),
      models: [
        model({
          running: true, ladder: "staged", reason: "the limit of 13.4 GB page-locked memory is reached",
          pinned_bytes: 13.4 * GB, resident_bytes: 1.6 * GB, streamed_block_bytes: 21.7 * GB,
          last_run: run({ bytes: 434 * GB, rate: 6.3 * GB, stall_ms_per_block: 52, step_seconds: 3.45, waiting: 0.86 }),
        }),
      ],
      causes: [
        cause({ kind: "link", seconds: 1.72, link: "gen 4 x4", card: "gen 4 x8", narrow: true }),
        cause({ kind: "unpinned", seconds: 0.66, staged: 8.3 * GB, why: "the limit of 13.4 GB page-locked memory is reached" }),
        cause({ kind: "others", seconds: 0.3, others: 2.9 * GB, gain: 1.9 * GB }),
        cause({ seconds: 2.97, streamed: 21.7 * GB, total: 8.6 * GB }),
      ],
    }),
  ),
  packed: feedState(
    status({
      devices: [device({ resident: 5.3 * GB, staging: 0.6 * GB, torch: 1.4 * GB, copy_rate: 55.1 * GB, stalled: 0.22 })],
      host: host({ pinned: 13.0 * GB }),
      models: [
        model({
          running: true, reason: "5.8 GB of 23.8 GB stay in VRAM",
          plan: "13.0 GB (packed, 18.0 GB of weights) a step streamed in 190 segments, from 57 of 57 blocks; 6.4 GB on the "
            + "device: 5.3 GB of blocks resident, 500 MB outside of blocks, 400 MB staging, 200 MB to unpack in; a step in "
            + "0.232 s, limited by the bus (0.177 s of compute); 13.0 GB from page-locked memory",
          pinned_bytes: 13.0 * GB, resident_bytes: 5.3 * GB, streamed_block_bytes: 13.0 * GB,
          streamed_weight_bytes: 18.0 * GB,
          last_run: run({ bytes: 260 * GB, rate: 55.1 * GB, stall_ms_per_block: 0.9, step_seconds: 0.232 }),
        }),
      ],
    }),
  ),
  split: feedState(
    status({
      devices: [
        STREAMING_DEVICE,
        device({ device: "gpu:1", resident: 14.2 * GB, staging: 0.5 * GB, peak: 17 * GB, copy_rate: 21.9 * GB, stalled: 0.04 }),
      ],
      host: host({ pinned: 18.8 * GB, ram_available: 20.4 * GB }),
      models: [
        model({ name: "qwen_image_bf16.safetensors", running: true, pinned_bytes: 7.2 * GB }),
        model({
          name: "qwen_image_bf16.safetensors", device: "gpu:1", running: true, pinned_bytes: 6.9 * GB,
          resident_bytes: 13.7 * GB, streamed_block_bytes: 6.9 * GB, reason: "14.2 GB of 21.1 GB stay in VRAM",
          plan: "6.9 GB a step streamed in 30 segments, from 30 of 30 blocks; 14.7 GB on the device: 13.7 GB of blocks "
            + "resident, 500 MB outside of blocks, 500 MB staging; a step in 0.318 s, limited by compute (streaming is free); "
            + "6.9 GB from page-locked memory",
          limited_by: "compute", last_run: run({ bytes: 138 * GB, rate: 21.7 * GB, stall_ms_per_block: 0.2 }),
        }),
        model({
          ...UNLOADED, id: "2", name: "t5xxl_fp16.safetensors", node_id: null, pinned_bytes: 4.7 * GB,
          last_run: run({ steps: 1, bytes: 9.3 * GB, step_seconds: 0.41 }),
        }),
      ],
    }),
  ),
  inactive: feedState(
    status({
      notices: [
        {
          node_id: "7", name: "Flux", kind: "inactive",
          text: "left as it is: ComfyUI was told to keep models in VRAM (--highvram or --gpu-only)",
        },
      ],
    }),
  ),
  fallback: feedState(
    status({
      devices: [STREAMING_DEVICE],
      models: [model()],
      notices: [
        {
          node_id: "9", name: "GPU Placement", kind: "fallback",
          text: "gpu:3 is not there (this machine has gpu:0); MODEL on gpu:0",
        },
      ],
    }),
  ),
  nearLimit: feedState(
    status({
      devices: [
        device({
          resident: 1.2 * GB, staging: 0.5 * GB, torch: 5.6 * GB, cache: 0.6 * GB, other: 17.0 * GB, peak: 25.0 * GB,
          copy_rate: 24.8 * GB, stalled: 0.62,
        }),
      ],
      host: host({ pinned: 60.2 * GB, ram_available: 3.1 * GB }),
      models: [
        model({
          name: "flux2-dev.safetensors", running: true, ladder: "staged",
          reason: "the limit of 60.6 GB page-locked memory is reached",
          plan: "63.2 GB a step streamed in 112 segments, from 56 of 56 blocks; 1.7 GB on the device: 700 MB of blocks "
            + "resident, 500 MB outside of blocks, 500 MB staging; a step in 2.55 s, limited by the bus (0.977 s of compute); "
            + "39.1 GB more VRAM would make it 0.98 s; 60.2 GB from page-locked memory, 3.0 GB staged from the file or "
            + "pageable memory (the limit of 60.6 GB page-locked memory is reached)",
          resident_bytes: 0.7 * GB, streamed_block_bytes: 63.2 * GB, pinned_bytes: 60.2 * GB,
          last_run: run({ bytes: 1264 * GB, rate: 24.7 * GB, stall_ms_per_block: 28.1, corrupted: 1, misses: 3, step_seconds: 2.56 }),
        }),
      ],
    }),
  ),
  // Two of six work.
  idleGpus: feedState(
    status({
      devices: [
        STREAMING_DEVICE,
        ...Array.from({ length: 4 }, (_, place) => device({ device: `gpu:${place + 1}` })),
        device({ device: "gpu:5", resident: 9.1 * GB, staging: 0.4 * GB, peak: 11 * GB, copy_rate: 12 * GB, stalled: 0.02 }),
      ],
      models: [model({ running: true })],
    }),
  ),
  noGpu: feedState(status({ devices: [], why_no_devices: "there is no GPU" })),
  // The first sample, before the first step has ended; of a GPU that nobody has used the driver does not tell what is free.
  unknown: feedState(
    status({
      devices: [
        device({ name: "AMD Radeon RX 7900 XTX", total: 25.7 * GB, resident: 2 * GB, staging: 0.5 * GB, peak: 4.1 * GB, copy_rate: null, stalled: null }),
        device({ device: "gpu:1", name: "AMD Radeon RX 7900 XTX", total: 25.7 * GB, torch: 0, cache: 0, other: null, copy_rate: null, stalled: null }),
      ],
      host: host({ pinned_limit: null }),
      models: [
        model({
          ladder: "synchronous", reason: "its settings ask for it", pinned_bytes: 0, limited_by: "",
          plan: "21.8 GB a step streamed in 84 segments, from 57 of 57 blocks; 2.5 GB on the device: 1.5 GB of blocks resident, "
            + "500 MB outside of blocks, 500 MB staging; 0 B from page-locked memory, 21.8 GB staged from the file or pageable "
            + "memory (page-locking is switched off)",
          resident_bytes: 1.5 * GB, streamed_block_bytes: 21.8 * GB,
          last_run: run({ steps: 1, bytes: 21.8 * GB, rate: null, step_seconds: null }),
        }),
      ],
    }),
  ),
  eight: feedState(
    status({
      devices: EIGHT,
      host: host({ ram_total: 2164 * GB, ram_available: 1710 * GB, pinned: 8 * 38.2 * GB, pinned_limit: 1947 * GB }),
      models: EIGHT.map(({ device: name, resident }, place) =>
        model({
          name: "hunyuan_image_3_bf16.safetensors", device: name, running: true, pinned_bytes: 38.2 * GB,
          reason: `${(resident / GB).toFixed(1)} GB of ${(resident / GB + 38.2).toFixed(1)} GB stay in VRAM`,
          plan: `38.2 GB a step streamed in 8 segments, from 4 of 4 blocks; a step in ${(3 + place / 100).toFixed(2)} s, limited by `
            + "compute (streaming is free); 38.2 GB from page-locked memory",
          resident_bytes: resident - 0.5 * GB, streamed_block_bytes: 38.2 * GB, limited_by: "compute",
          last_run: run({ bytes: 764 * GB, rate: 12.7 * GB, stall_ms_per_block: 0.1 * place, step_seconds: 3 + place / 100 }),
        }),
      ),
    }),
  ),
  stale: feedState(STREAMING, { link: "stale" }),
  missing: feedState(null, { link: "missing" }),
  gone: feedState(STREAMING, { link: "gone" }),
  newer: feedState(null, { link: "newer" }),
};

/**
 * A feed that always says the same.
 * @param {FeedState} shown
 * @param {Feed["unload"]} [unload]
 * @param {Steps} [steps]
 * @returns {Feed}
 */
export function fixedFeed(shown, unload = async () => ({ ok: false, error: "a prompt is running" }), steps = STEPS) {
  return {
    state: () => shown,
    watch: (listener) => ({ show: (visible) => void (visible && listener(shown)), close: () => {} }),
    unload,
    steps,
  };
}
