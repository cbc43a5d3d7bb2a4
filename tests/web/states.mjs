/**
 * The states that the panel has, by name, as its feed would give them. Tests look at what is made of them; states.html
 * shows them.
 */

/** @import { Estimate, Known } from "../../web/lib/estimates.mjs" */
/** @import { Feed, FeedState } from "../../web/lib/feed.mjs" */
/** @import { Device, Event, Fleet, Host, Model, Run, Status, Worker } from "../../web/lib/status.mjs" */
/** @import { Steps } from "../../web/lib/step_requests.mjs" */
/** @import { DeviceTrace } from "../../web/lib/timeline.mjs" */
/** @import { Cause } from "../../web/lib/why.mjs" */

export const GIB = 2 ** 30;
// Rates of buses are decimal.
export const GB = 1e9;
export const NOW = 1_764_320_000_000;

/**
 * A device, of which `free` is what the parts leave; not known where a part is not.
 * @param {Partial<Device>} [changes]
 * @returns {Device}
 */
export function device(changes = {}) {
  const all = {
    device: "gpu:0", name: "NVIDIA GeForce RTX 4090", virtual: false, total: 25.2 * GIB,
    resident: 0, staging: 0, torch: 0.2 * GIB, cache: 0.3 * GIB, other: 1.1 * GIB, peak: null,
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
    reason: "12.6 GiB of 23.8 GiB stay in VRAM",
    plan: "11.2 GiB a step streamed in 84 segments, from 57 of 57 blocks; 13.1 GiB on the device: 12.1 GiB of blocks stay, "
      + "512 MiB outside of blocks, 512 MiB staging; a step in 0.324 s, limited by the bus (0.177 s of compute); 8.6 GiB more "
      + "VRAM would make it 0.178 s; 11.2 GiB from page-locked memory",
    running: false, loading: null, last_run: run(), pinned_bytes: 11.4 * GIB, resident_bytes: 12.1 * GIB,
    rest_bytes: 0.5 * GIB, streamed_block_bytes: 11.2 * GIB, limited_by: "bus", ...changes,
  };
}

/**
 * @param {Partial<Run>} [changes]
 * @returns {Run}
 */
export function run(changes = {}) {
  return {
    steps: 20, reruns: 0, bytes: 224 * GIB, rate: 34.6 * GB, stall_ms_per_block: 2.4, misses: 0, corrupted: 0, step_seconds: 0.324,
    waiting: 0.43, ...changes,
  };
}

/**
 * FLUX.1-dev on an 8 GiB card with 32 GiB of RAM, before anything ran.
 * @param {Partial<Estimate>} [changes]
 * @returns {Estimate}
 */
export function estimate(changes = {}) {
  return {
    name: "flux1-dev.safetensors", loaded: false, device: "gpu:0", device_name: "NVIDIA GeForce RTX 4060", limit: null, link: "gen 4 x8",
    rate: 12.6 * GB, rate_source: "link", file_bytes: 22.2 * GIB, missing_bytes: 0, ram_available: 24 * GIB, blocks: 57,
    model_bytes: 22.2 * GIB, vram: 8 * GIB, reserve: 2.5 * GIB, ram: 32 * GIB, fits: true, least_vram: 3.3 * GIB,
    least_limit: null, stays: 4.2 * GIB,
    streamed_bytes: 18 * GIB, streamed_blocks: 57, pinned_limit: null, pinnable: 25 * GIB, from_file: 0, from_disk: false, bus_seconds: 1.53,
    packed_bus_seconds: 1.09, compute_seconds: null, step_seconds: null, packed_step_seconds: null, overlaps: true, ...changes,
  };
}

/**
 * What is known of a model that the open workflow names.
 * @param {Partial<Estimate> | string} [found]  its estimate, or why there is none
 * @param {Partial<Known["model"]>} [changes]
 * @returns {Known}
 */
export function known(found = {}, changes = {}) {
  const settings = { limit: 0, reserve: 0, pinnedLimit: 0, mode: "auto", pinMemory: "auto", packing: "auto", limitBySettings: false };
  const loader = { node: "4", title: "Load Diffusion Model", name: "flux1-dev.safetensors", folder: "", weightDtype: "default" };
  const model = { ...loader, ...settings, streams: true, placed: false, ...changes };
  if (typeof found === "string") return { model, estimate: null, error: found };
  return { model, estimate: estimate({ name: model.name, ...found }), error: "" };
}

/**
 * Why the model is slow: it is too large for a good machine.
 * @param {Partial<Cause>} [changes]
 * @returns {Cause}
 */
export function cause(changes = {}) {
  return { model: "1", device: "gpu:0", kind: "room", seconds: 0.139, streamed: 11.2 * GIB, total: 25.2 * GIB, ...changes };
}

/**
 * A worker of a fleet that has nothing to do.
 * @param {Partial<Worker>} [changes]
 * @returns {Worker}
 */
export function worker(changes = {}) {
  return { name: "gpu-0", host: "mill", state: "free", reason: "", since: null, done: 0, changes: 0, loaded: [], ...changes };
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
    device: "gpu:0", step: 7, time: NOW / 1000, offset: 0, seconds: at(blocks), waited: blocks * wait, copied: blocks * 340 * 2 ** 20,
    blocks: numbers.map((place) => `double_blocks.${place}`),
    compute: numbers.map((place) => [at(place), at(place) + compute + wait, place]),
    waits: numbers.map((place) => [at(place), at(place) + wait, 0]),
    unpacking: [],
    copies: numbers.map((place) => [at(place) - 0.004, at(place) - 0.004 + copy, 340 * 2 ** 20]),
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
  return { ram_total: 67.4 * GIB, ram_available: 41.0 * GIB, pinned: 0, pinned_limit: 60.6 * GIB, ...changes };
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
    ...(from.fleet && { fleet: shortened(from.fleet) }),
    ...changes,
  };
}

/** @param {Fleet} fleet */
function shortened({ waiting, reruns, workers }) {
  return { waiting, reruns, workers: workers.map((each) => [each.name, each.state, each.reason, each.since, each.done, each.changes]) };
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
  resident: 12.6 * GIB, staging: 0.5 * GIB, torch: 2.9 * GIB, cache: 1.2 * GIB, peak: 19.4 * GIB, copy_rate: 34.4 * GB,
  stalled: 0.43,
});
const STREAMING = status({
  devices: [STREAMING_DEVICE],
  host: host({ pinned: 11.4 * GIB, ram_available: 28.5 * GIB }),
  models: [model({ running: true })],
  causes: [cause()],
});

const EIGHT = Array.from({ length: 8 }, (_, place) =>
  device({
    device: `gpu:${place}`, name: "NVIDIA H200", total: 150.1 * GIB, resident: (8 + 9 * place) * GIB, staging: 0.5 * GIB,
    torch: (2 + place) * GIB, cache: 3 * GIB, other: 0.6 * GIB, peak: (60 + 9 * place) * GIB, copy_rate: (52 - place) * GB,
    stalled: 0.02 * place,
  }),
);

const FLUX = ["clip_l.safetensors", "flux1-dev.safetensors", "t5xxl_fp16.safetensors"];
// Six workers on two hosts: two work, two do not, and two have nothing to do.
const FLEET = status({
  devices: [
    { ...STREAMING_DEVICE, device: "gpu-0" },
    // ComfyUI's own loader has loaded what runs there.
    device({ device: "gpu-1", torch: 16.8 * GIB, peak: 18.2 * GIB }),
    device({ device: "gpu-4" }),
    device({ device: "gpu-5" }),
  ],
  host: host({ pinned: 11.4 * GIB, ram_available: 28.5 * GIB }),
  models: [model({ id: "gpu-0.1", device: "gpu-0", running: true })],
  fleet: {
    waiting: 3,
    reruns: 1,
    workers: [
      worker({ state: "running", since: NOW / 1000 - 12.4, done: 41, changes: 3, loaded: FLUX }),
      worker({ name: "gpu-1", state: "running", since: NOW / 1000 - 65, done: 38, changes: 1, loaded: ["sd_xl_base_1.0.safetensors"] }),
      worker({ name: "gpu-2", state: "restarting", reason: "its process ended (signal 9)", done: 17, changes: 2 }),
      worker({ name: "gpu-3", host: null, state: "failed", reason: "there is no ComfyUI at /srv/ComfyUI/main.py on loft" }),
      worker({ name: "gpu-4", host: "loft", done: 1, changes: 1, loaded: FLUX }),
      worker({ name: "gpu-5", host: "loft" }),
    ],
  },
});

const SMALL_CARD = status({
  devices: [device({ name: "NVIDIA GeForce RTX 4060", total: 8 * GIB, other: 0.8 * GIB, torch: 0, cache: 0 })],
  host: host({ ram_total: 32 * GIB, ram_available: 24 * GIB, pinned_limit: 28.8 * GIB }),
});

/** @type {Record<string, FeedState & {estimates?: Known[]}>} */
export const STATES = {
  starting: feedState(null, { link: "starting" }),
  // The model that was given to other GPUs is left out.
  idle: feedState(status({ models: [UNLOADED] })),
  beforeRun: { ...feedState(SMALL_CARD), estimates: [known()] },
  // All that may be amiss.
  beforeRuns: {
    ...feedState(SMALL_CARD),
    estimates: [
      known({ compute_seconds: 1.2, step_seconds: 1.62, packed_step_seconds: 1.2, rate_source: "measured" }, { name: "measured", streams: false }),
      known({ streamed_bytes: 0, stays: 4.1 * GIB, model_bytes: 4.1 * GIB, file_bytes: 8.2 * GIB }, { name: "fits" }),
      known({ fits: false, stays: 0, streamed_bytes: 0 }, { name: "too large" }),
      known({ fits: false, stays: 0, streamed_bytes: 0, limit: 0.5 * GIB, least_limit: 0.8 * GIB }, { name: "limited" }),
      known({ fits: false, stays: 0, streamed_bytes: 0, vram: 2 * GIB, limit: 20 * GIB }, { name: "a small card" }),
      known({ from_file: 4 * GIB, pinnable: 14 * GIB, rate_source: "assumed" }, { name: "in little RAM" }),
      known({ from_file: 9 * GIB, from_disk: true, pinnable: 9 * GIB }, { name: "from the disk" }),
      known({ ram_available: 9 * GIB }, { name: "beside others" }),
      known({ missing_bytes: 3 * GIB }, { name: "a part" }),
      known("damaged.safetensors: its header cannot be read; the file ends within it", { name: "damaged.safetensors" }),
      known({ loaded: true }, { name: "loaded" }),
    ],
  },
  loading: feedState(
    status({
      devices: [device({ resident: 6.1 * GIB, staging: 0.4 * GIB, copy_rate: 1.6 * GB, stalled: 0.91 })],
      host: host({ pinned: 2.1 * GIB }),
      models: [
        model({
          running: true, last_run: null, ladder: "staged", reason: "page-locked copies are made now", locking: true,
          plan: "11.2 GiB a step streamed in 84 segments, from 57 of 57 blocks; 13.1 GiB on the device: 12.1 GiB of blocks "
            + "stay, 512 MiB outside of blocks, 512 MiB staging; 2.1 GiB from page-locked memory, 9.1 GiB from the file until "
            + "they are page-locked too",
          pinned_bytes: 2.1 * GIB, limited_by: "", loading: { done: 8.4 * GIB, total: 23.8 * GIB, rate: 1.6 * GB },
        }),
      ],
    }),
  ),
  allResident: feedState(
    status({
      devices: [device({ name: "NVIDIA H200", total: 150.1 * GIB, resident: 23.8 * GIB, peak: 27.6 * GIB })],
      models: [
        model({
          ladder: "resident", reason: "", pinned_bytes: 0,
          plan: "all 57 blocks stay (23.8 GiB on the device), nothing streamed; a step in 0.174 s",
          resident_bytes: 23.3 * GIB, streamed_block_bytes: 0, limited_by: "compute",
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
          name: "NVIDIA GeForce RTX 4060", total: 8 * GIB, resident: 2.1 * GIB, staging: 0.4 * GIB, torch: 1.6 * GIB, cache: 0.2 * GIB,
          other: 2.9 * GIB, peak: 7.9 * GIB, copy_rate: 6.3 * GB, stalled: 0.86, link: { generation: 4, width: 4 },
          card: { generation: 4, width: 8 },
        }),
      ],
      host: host({ ram_total: 32 * GIB, ram_available: 3.9 * GIB, pinned: 12.8 * GIB, pinned_limit: 12.8 * GIB }),
      models: [
        model({
          running: true, ladder: "staged", reason: "the limit of 12.8 GiB page-locked memory is reached",
          plan: "20.1 GiB a step streamed in 84 segments, from 57 of 57 blocks; 2.5 GiB on the device: 1.6 GiB of blocks stay, "
            + "512 MiB outside of blocks, 400 MiB staging; a step in 3.45 s, limited by the bus (0.483 s of compute); 12.8 GiB from "
            + "page-locked memory, 7.3 GiB staged from the file or pageable memory (the limit of 12.8 GiB page-locked memory is reached)",
          pinned_bytes: 12.8 * GIB, resident_bytes: 1.6 * GIB, streamed_block_bytes: 20.1 * GIB,
          last_run: run({ bytes: 402 * GIB, rate: 6.3 * GB, stall_ms_per_block: 52, step_seconds: 3.45, waiting: 0.86 }),
        }),
      ],
      causes: [
        cause({ kind: "link", seconds: 1.71, link: "gen 4 x4", card: "gen 4 x8", narrow: true }),
        cause({ kind: "unpinned", seconds: 0.58, staged: 7.3 * GIB, why: "the limit of 12.8 GiB page-locked memory is reached" }),
        cause({ kind: "others", seconds: 0.32, others: 2.9 * GIB, gain: 1.9 * GIB }),
        cause({ seconds: 2.97, streamed: 20.1 * GIB, total: 8 * GIB }),
      ],
    }),
  ),
  packed: feedState(
    status({
      devices: [device({ resident: 5.3 * GIB, staging: 0.6 * GIB, torch: 1.4 * GIB, copy_rate: 55.1 * GB, stalled: 0.22 })],
      host: host({ pinned: 13.0 * GIB }),
      models: [
        model({
          running: true, reason: "5.8 GiB of 23.8 GiB stay in VRAM",
          plan: "13.0 GiB (packed, 18.0 GiB of weights) a step streamed in 190 segments, from 57 of 57 blocks; 6.4 GiB on the "
            + "device: 5.3 GiB of blocks stay, 512 MiB outside of blocks, 400 MiB staging, 200 MiB to unpack in; a step in "
            + "0.232 s, limited by the bus (0.177 s of compute); 13.0 GiB from page-locked memory",
          pinned_bytes: 13.0 * GIB, resident_bytes: 5.3 * GIB, streamed_block_bytes: 13.0 * GIB,
          streamed_weight_bytes: 18.0 * GIB,
          last_run: run({ bytes: 260 * GIB, rate: 55.1 * GB, stall_ms_per_block: 0.9, step_seconds: 0.232 }),
        }),
      ],
    }),
  ),
  split: feedState(
    status({
      devices: [
        STREAMING_DEVICE,
        device({ device: "gpu:1", resident: 14.2 * GIB, staging: 0.5 * GIB, peak: 17 * GIB, copy_rate: 21.9 * GB, stalled: 0.04 }),
      ],
      host: host({ pinned: 18.8 * GIB, ram_available: 20.4 * GIB }),
      models: [
        model({ name: "qwen_image_bf16.safetensors", running: true, pinned_bytes: 7.2 * GIB }),
        model({
          name: "qwen_image_bf16.safetensors", device: "gpu:1", running: true, pinned_bytes: 6.9 * GIB,
          resident_bytes: 13.7 * GIB, streamed_block_bytes: 6.9 * GIB, reason: "14.2 GiB of 21.1 GiB stay in VRAM",
          plan: "6.9 GiB a step streamed in 30 segments, from 30 of 30 blocks; 14.7 GiB on the device: 13.7 GiB of blocks "
            + "stay, 512 MiB outside of blocks, 512 MiB staging; a step in 0.318 s, hardly any of it waiting for the bus; "
            + "6.9 GiB from page-locked memory",
          limited_by: "compute", last_run: run({ bytes: 138 * GIB, rate: 21.7 * GB, stall_ms_per_block: 0.2 }),
        }),
        model({
          ...UNLOADED, id: "2", name: "t5xxl_fp16.safetensors", node_id: null, pinned_bytes: 4.7 * GIB,
          last_run: run({ steps: 1, bytes: 9.3 * GIB, step_seconds: 0.41 }),
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
          resident: 1.2 * GIB, staging: 0.5 * GIB, torch: 5.6 * GIB, cache: 0.6 * GIB, other: 17.0 * GIB, peak: 25.0 * GIB,
          copy_rate: 24.8 * GB, stalled: 0.62,
        }),
      ],
      host: host({ pinned: 60.2 * GIB, ram_available: 3.1 * GIB }),
      models: [
        model({
          name: "flux2-dev.safetensors", running: true, ladder: "staged",
          reason: "the limit of 60.6 GiB page-locked memory is reached",
          plan: "63.2 GiB a step streamed in 112 segments, from 56 of 56 blocks; 1.7 GiB on the device: 700 MiB of blocks "
            + "stay, 512 MiB outside of blocks, 512 MiB staging; a step in 2.55 s, limited by the bus (0.977 s of compute); "
            + "39.1 GiB more VRAM would make it 0.98 s; 60.2 GiB from page-locked memory, 3.0 GiB staged from the file or "
            + "pageable memory (the limit of 60.6 GiB page-locked memory is reached)",
          resident_bytes: 0.7 * GIB, streamed_block_bytes: 63.2 * GIB, pinned_bytes: 60.2 * GIB,
          last_run: run({ bytes: 1264 * GIB, rate: 24.7 * GB, stall_ms_per_block: 28.1, corrupted: 1, misses: 3, step_seconds: 2.56 }),
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
        device({ device: "gpu:5", resident: 9.1 * GIB, staging: 0.4 * GIB, peak: 11 * GIB, copy_rate: 12 * GB, stalled: 0.02 }),
      ],
      models: [model({ running: true })],
    }),
  ),
  fleet: feedState(FLEET, { event: event(FLEET) }),
  fleetStarts: feedState(
    status({
      devices: [], why_no_devices: "no worker is up",
      fleet: { waiting: 1, reruns: 0, workers: [worker({ host: null, state: "starting" })] },
    }),
  ),
  noGpu: feedState(status({ devices: [], why_no_devices: "there is no GPU" })),
  // The first sample, before the first step has ended; of a GPU that nobody has used the driver does not tell what is free.
  unknown: feedState(
    status({
      devices: [
        device({ name: "AMD Radeon RX 7900 XTX", total: 25.7 * GIB, resident: 2 * GIB, staging: 0.5 * GIB, peak: 4.1 * GIB, copy_rate: null, stalled: null }),
        device({ device: "gpu:1", name: "AMD Radeon RX 7900 XTX", total: 25.7 * GIB, torch: 0, cache: 0, other: null, copy_rate: null, stalled: null }),
      ],
      host: host({ pinned_limit: null }),
      models: [
        model({
          ladder: "synchronous", reason: "its settings ask for it", pinned_bytes: 0, limited_by: "",
          plan: "21.8 GiB a step streamed in 84 segments, from 57 of 57 blocks; 2.5 GiB on the device: 1.5 GiB of blocks stay, "
            + "512 MiB outside of blocks, 512 MiB staging; 0 B from page-locked memory, 21.8 GiB staged from the file or pageable "
            + "memory (page-locking is switched off)",
          resident_bytes: 1.5 * GIB, streamed_block_bytes: 21.8 * GIB,
          last_run: run({ steps: 1, bytes: 21.8 * GIB, rate: null, step_seconds: null }),
        }),
      ],
    }),
  ),
  eight: feedState(
    status({
      devices: EIGHT,
      host: host({ ram_total: 2164 * GIB, ram_available: 1710 * GIB, pinned: 8 * 38.2 * GIB, pinned_limit: 1947 * GIB }),
      models: EIGHT.map(({ device: name, resident }, place) =>
        model({
          name: "hunyuan_image_3_bf16.safetensors", device: name, running: true, pinned_bytes: 38.2 * GIB,
          reason: `${(resident / GIB).toFixed(1)} GiB of ${(resident / GIB + 38.2).toFixed(1)} GiB stay in VRAM`,
          plan: `38.2 GiB a step streamed in 8 segments, from 4 of 4 blocks; a step in ${(3 + place / 100).toFixed(2)} s, hardly any of it `
            + "waiting for the bus; 38.2 GiB from page-locked memory",
          resident_bytes: resident - 0.5 * GIB, streamed_block_bytes: 38.2 * GIB, limited_by: "compute",
          last_run: run({ bytes: 764 * GIB, rate: 12.7 * GB, stall_ms_per_block: 0.1 * place, step_seconds: 3 + place / 100 }),
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
 * @param {FeedState & {estimates?: Known[]}} shown
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
    estimates: { of: () => shown.estimates ?? [] },
  };
}
