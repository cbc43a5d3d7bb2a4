/**
 * The states that the panel has, by name, as its feed would give them. Tests look at what is made of them; states.html
 * shows them.
 */

/** @import { Feed, FeedState } from "../../web/lib/feed.mjs" */
/** @import { Device, Event, Host, Model, Run, Status } from "../../web/lib/status.mjs" */

const GB = 1e9;
export const NOW = 1_764_320_000_000;

/**
 * A device, of which `free` is what the parts leave.
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
  return { free: all.total === null ? null : all.total - used, ...all };
}

/**
 * @param {Partial<Model>} [changes]
 * @returns {Model}
 */
export function model(changes = {}) {
  return {
    id: "1", name: "flux1-dev.safetensors", device: "gpu:0", node_id: "4", ladder: "pinned",
    reason: "the model needs 23.8 GB, and 16.0 GB are there for it",
    plan: "11.2 GB a step streamed in 84 segments, from 57 of 57 blocks; a step in 0.324 s, limited by the bus (0.177 s of "
      + "compute); 8.6 GB more VRAM would make it 0.178 s",
    running: false, loading: null, last_run: run(), pinned_bytes: 11.4 * GB, ...changes,
  };
}

/**
 * @param {Partial<Run>} [changes]
 * @returns {Run}
 */
export function run(changes = {}) {
  return {
    steps: 20, bytes: 224 * GB, rate: 34.6 * GB, stall_ms_per_block: 2.4, misses: 0, corrupted: 0, step_seconds: 0.324,
    ...changes,
  };
}

/**
 * @param {Partial<Status>} [changes]
 * @returns {Status}
 */
export function status(changes = {}) {
  return {
    schema: 1, time: NOW / 1000, devices: [device()], host: host(), models: [], notices: [], ...changes,
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
    running: from.models.filter((each) => each.running).map(({ id }) => id),
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

const STREAMING_DEVICE = device({
  resident: 12.6 * GB, staging: 0.5 * GB, torch: 2.9 * GB, cache: 1.2 * GB, peak: 19.4 * GB, copy_rate: 34.4 * GB,
  stalled: 0.43,
});
const STREAMING = status({
  devices: [STREAMING_DEVICE],
  host: host({ pinned: 11.4 * GB, ram_available: 28.5 * GB }),
  models: [model({ running: true })],
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
  idle: feedState(status()),
  loading: feedState(
    status({
      devices: [device({ resident: 6.1 * GB, staging: 0.4 * GB, copy_rate: 1.6 * GB, stalled: 0.91 })],
      host: host({ pinned: 2.1 * GB }),
      models: [
        model({
          running: true, plan: "", last_run: null, reason: "page-locked copies are made before the second step",
          ladder: "staged", pinned_bytes: 2.1 * GB, loading: { done: 8.4 * GB, total: 23.8 * GB, rate: 1.6 * GB },
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
          plan: "the whole model fits: every block is resident, and nothing has to stream",
          last_run: run({ bytes: 0, rate: null, stall_ms_per_block: 0, step_seconds: 0.174 }),
        }),
      ],
    }),
  ),
  streaming: feedState(STREAMING, { event: event(STREAMING) }),
  split: feedState(
    status({
      devices: [
        STREAMING_DEVICE,
        device({ device: "gpu:1", resident: 14.2 * GB, staging: 0.5 * GB, peak: 17 * GB, copy_rate: 21.9 * GB, stalled: 0.04 }),
      ],
      host: host({ pinned: 14.1 * GB, ram_available: 25.1 * GB }),
      models: [
        model({ name: "qwen_image_bf16.safetensors", running: true, pinned_bytes: 7.2 * GB }),
        model({ name: "qwen_image_bf16.safetensors", device: "gpu:1", running: true, pinned_bytes: 6.9 * GB }),
        model({
          id: "2", name: "t5xxl_fp16.safetensors", node_id: null, ladder: "unloaded", reason: "", plan: "not loaded", pinned_bytes: 0,
          last_run: run({ steps: 1, bytes: 9.3 * GB, step_seconds: 0.41 }),
        }),
      ],
    }),
  ),
  inactive: feedState(
    status({
      notices: [
        {
          node_id: "7", name: "Async Offload Settings", kind: "inactive",
          text: "the model has no list of blocks that could be streamed; it is loaded ComfyUI's own way",
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
        device({ resident: 16.4 * GB, staging: 0.5 * GB, torch: 5.6 * GB, cache: 0.6 * GB, peak: 24.9 * GB, copy_rate: 24.8 * GB, stalled: 0.004 }),
      ],
      host: host({ pinned: 60.2 * GB, ram_available: 3.1 * GB }),
      models: [
        model({
          running: true, ladder: "staged", reason: "no more RAM may be page-locked (60.6 GB at most)",
          last_run: run({ corrupted: 1, misses: 3 }), pinned_bytes: 60.2 * GB,
        }),
      ],
    }),
  ),
  noGpu: feedState(status({ devices: [] })),
  unknown: feedState(
    status({
      devices: [
        device({ name: "", total: null, torch: null, cache: null, other: null, copy_rate: null, stalled: null }),
        device({ device: "gpu:1", name: "Intel Arc B580", total: 12.2 * GB, free: 8 * GB, resident: 2 * GB, torch: null, cache: null, other: null, copy_rate: null, stalled: null }),
      ],
      host: { ram_total: 67.4 * GB, ram_available: null, pinned: 0, pinned_limit: null },
      models: [
        model({
          plan: "", ladder: "synchronous", reason: "", pinned_bytes: null,
          last_run: run({ rate: null, stall_ms_per_block: null, step_seconds: null }),
        }),
      ],
    }),
  ),
  eight: feedState(
    status({
      devices: EIGHT,
      host: host({ ram_total: 2164 * GB, ram_available: 1710 * GB, pinned: 311 * GB, pinned_limit: 1947 * GB }),
      models: [model({ running: true })],
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
 * @returns {Feed}
 */
export function fixedFeed(shown, unload = async () => ({ ok: false, error: "a prompt is running" })) {
  return {
    state: () => shown,
    watch: (listener) => ({ show: (visible) => void (visible && listener(shown)), close: () => {} }),
    unload,
  };
}
