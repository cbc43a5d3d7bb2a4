import assert from "node:assert/strict";
import { test } from "node:test";

import { reportView } from "../../web/lib/report_node.mjs";
import { stringsFor } from "../../web/lib/strings.mjs";
import { buildView } from "../../web/lib/view.mjs";
import { GB, GIB, STATES, device, event, feedState, host, model, run, status } from "./states.mjs";

const EN = stringsFor("en");

/** @param {import("../../web/lib/feed.mjs").FeedState} state */
const view = (state) => buildView(state, EN);
/** @param {Partial<import("../../web/lib/status.mjs").Device>} changes */
const viewOf = (changes) => view(feedState(status({ devices: [device(changes)] }))).devices[0];

const EXPECTED = {
  starting: ["starting", "neutral", "Connecting"],
  idle: ["idle", "neutral", "Idle"],
  beforeRun: ["idle", "neutral", "Idle"],
  beforeRuns: ["idle", "neutral", "Idle"],
  loading: ["loading", "active", "Loading"],
  allResident: ["allResident", "good", "All stays in VRAM"],
  streaming: ["streaming", "active", "Streaming"],
  packed: ["streaming", "active", "Streaming"],
  split: ["streaming", "active", "Streaming"],
  inactive: ["idle", "neutral", "Idle"],
  fallback: ["idle", "neutral", "Idle"],
  nearLimit: ["streaming", "warning", "Streaming · near the limit"],
  slow: ["streaming", "warning", "Streaming · near the limit"],
  idleGpus: ["streaming", "active", "Streaming"],
  fleet: ["streaming", "active", "Streaming"],
  fleetStarts: ["idle", "neutral", "Idle"],
  noGpu: ["idle", "neutral", "Idle"],
  unknown: ["idle", "neutral", "Idle"],
  eight: ["streaming", "active", "Streaming"],
  stale: ["stale", "warning", "No news"],
  missing: ["missing", "error", "Not available"],
  gone: ["gone", "error", "No connection"],
  newer: ["newer", "error", "Reload this page"],
};

test("every example has the state that its name says", () => {
  const found = Object.entries(STATES).map(([name, state]) => {
    const { key, tone, text } = view(state).state;
    return [name, [key, tone, text]];
  });
  assert.deepEqual(Object.fromEntries(found), EXPECTED);
});

test("no example shows what is no text, in any language", () => {
  for (const locale of ["en", "zh"]) {
    for (const [name, state] of Object.entries(STATES)) {
      const text = JSON.stringify(buildView(state, stringsFor(locale)));
      assert.doesNotMatch(text, /undefined|NaN|Infinity|\[object|null [A-Z]/, `${name} in ${locale}`);
    }
  }
});

test("the parts of a bar lie side by side and leave what is free", () => {
  const { segments } = viewOf({ total: 100, free: 50, resident: 20, staging: 10, torch: 5, cache: 5, other: 10 });
  assert.deepEqual(segments.map(({ key }) => key), ["resident", "staging", "torch", "cache", "other"]);
  assert.deepEqual(segments.map(({ size }) => size), [0.2, 0.1, 0.05, 0.05, 0.1]);
  const ends = segments.map(({ start, size }) => start + size);
  segments.slice(1).forEach(({ start }, place) => assert.ok(Math.abs(start - ends[place]) < 1e-9));
});

test("parts of different moments that come to more than all fill the bar in proportion", () => {
  const { segments } = viewOf({ total: 100, free: 0, resident: 150, staging: 50, torch: 0, cache: 0, other: 0 });
  assert.deepEqual(segments.slice(0, 2).map(({ size }) => size), [0.75, 0.25]);
});

test("a part below nothing is nothing", () => {
  const { segments } = viewOf({ total: 100, free: 90, resident: 10, torch: -5, cache: 0, other: 0 });
  assert.equal(segments[2].size, 0);
});

test("a device of unknown or no size has an empty bar and no meter", () => {
  for (const total of [null, 0]) {
    const shown = viewOf({ total, free: null, resident: 10, torch: null, cache: null, other: null, peak: 5 });
    assert.equal(shown.meter.now, null);
    assert.match(shown.meter.text, /not known/);
    assert.equal(shown.spark, "");
    assert.equal(shown.warning, "");
  }
  assert.ok(viewOf({ total: null, free: null }).segments.every(({ size }) => size === 0));
});

test("unknown values are dashes", () => {
  const shown = viewOf({ copy_rate: null, stalled: null, torch: null, cache: null, other: null, peak: null });
  assert.equal(shown.copy, "–");
  assert.equal(shown.stall, "–");
  assert.equal(shown.peak, null);
  const dashes = shown.figures.filter(({ value }) => value === "–").map(({ key }) => key);
  assert.deepEqual(dashes, ["torch", "cache", "other", "free", "peak"]);
});

test("a meter says in words what the bar shows", () => {
  const [shown] = view(STATES.streaming).devices;
  assert.equal(shown.meter.label, "gpu:0, NVIDIA GeForce RTX 4090");
  assert.equal(shown.meter.max, 25.2 * GIB);
  assert.equal(Math.round((shown.meter.now ?? 0) / GIB * 10), 183);
  assert.match(shown.meter.text, /^18\.3 GiB of 25\.2 GiB used; Stays 12\.6 GiB; Staging 512 MiB; .*; Peak 19\.4 GiB$/);
});

test("a device is near its limit when 90 % are held by what cannot be given up", () => {
  const free = { total: 1000, resident: 0, cache: 0 };
  assert.equal(viewOf({ ...free, free: 101 }).warning, "");
  assert.equal(viewOf({ ...free, free: 100 }).warning, "little room left");
  assert.equal(viewOf({ ...free, free: 0, resident: 101 }).warning, "", "resident weights give way");
  assert.equal(viewOf({ ...free, free: 0, cache: 101 }).warning, "", "so does torch's cache");
  assert.equal(viewOf({ ...free, free: 40, resident: 30, cache: 30 }).warning, "little room left");
  const over = viewOf({ ...free, free: -5 });
  assert.equal(over.warning, "little room left");
  assert.match(over.meter.text, /cannot be given up/);
  assert.equal(over.meter.now, 1000, "a meter's value is within its range");
});

test("page-locked memory is at its limit when no more piece fits, and never where there is none", () => {
  const warning = (/** @type {Partial<import("../../web/lib/status.mjs").Host>} */ changes) =>
    view(feedState(status({ host: host(changes) }))).host[1].warning;
  assert.equal(warning({ pinned: 99, pinned_limit: 100 }), "at its limit");
  assert.equal(warning({ pinned: 90, pinned_limit: 100 }), "");
  assert.equal(warning({ pinned: 90, pinned_limit: null }), "");
  assert.equal(warning({ pinned: 0, pinned_limit: 0 }), "");
});

test("page-locked memory without a limit is no meter, and says so", () => {
  const [, pinned] = view(feedState(status({ host: host({ pinned: 5 * GIB, pinned_limit: null }) }))).host;
  assert.equal(pinned.amount, "5.0 GiB");
  assert.equal(pinned.fill, null);
  assert.equal(pinned.meter.now, null);
  assert.equal(pinned.meter.text, "5.0 GiB; no limit known");
});

test("figures are unfolded for two devices, and folded with a legend for more", () => {
  assert.deepEqual(view(STATES.split).devices.map(({ open }) => open), [true, true]);
  assert.equal(view(STATES.split).legend, false);
  const eight = view(STATES.eight);
  assert.equal(eight.devices.length, 8);
  assert.ok(eight.devices.every(({ open }) => !open));
  assert.equal(eight.legend, true);
});

test("without a device the host is shown, and why", () => {
  const shown = view(STATES.noGpu);
  assert.deepEqual(shown.devices, []);
  assert.equal(shown.deviceNote, "No device to stream to: there is no GPU. Models run ComfyUI's own way.");
  const neutral = "No device to stream to. Models run ComfyUI's own way.";
  for (const why of [null, undefined]) {
    assert.equal(view(feedState(status({ devices: [], why_no_devices: why }))).deviceNote, neutral);
  }
  const reason = "it needs CUDA or ROCm, and ComfyUI runs on mps";
  const mps = status({ devices: [], why_no_devices: reason });
  assert.match(view(feedState(mps, { event: event(mps) })).deviceNote, new RegExp(reason), "an event does not tell it again");
  assert.equal(shown.host[0].amount, "26.4 / 67.4 GiB");
});

test("before the first status models are not said to be none", () => {
  const shown = view(feedState(null, { event: event(status()) }));
  assert.equal(shown.devices.length, 1);
  assert.equal(shown.modelNote, "");
  assert.equal(view(STATES.idle).modelNote, "No streamed model is loaded.");
});

test("the parts of a split model share a card and its buttons", () => {
  const [split, encoder] = view(STATES.split).models;
  assert.deepEqual(split.parts.map((part) => part.device), ["gpu:0", "gpu:1"]);
  assert.equal(split.pinned, "14.1 GiB");
  assert.match(split.lastRun, /^Last run: 20 steps of 0\.324 s; 362 GiB copied at 56\.3 GB\/s on average; 2\.40 ms of waiting per block; 0 copies came late$/);
  assert.equal(split.freeable, true);
  assert.equal(encoder.freeable, false);
  assert.equal(encoder.pinned, "4.7 GiB");
  assert.equal(encoder.pinnedText, "Free page-locked RAM (4.7 GiB)");
  assert.deepEqual(encoder.parts.map(({ step, plan }) => [step, plan]), [["not loaded", ""]]);
  assert.match(encoder.lastRun, /^Last run: 1 step of/);
});

test("the step of the ladder comes with its reason, where there is one", () => {
  const [part] = view(STATES.nearLimit).models[0].parts;
  assert.equal(part.step, "streams from the file: the limit of 60.6 GiB page-locked memory is reached");
  assert.equal(view(STATES.allResident).models[0].parts[0].step, "all stays in VRAM");
});

test("a model of which nothing is there is left out, and kept for who asks", () => {
  const gone = model({ ladder: "unloaded", pinned_bytes: 0, last_run: run() });
  const shown = status({ models: [gone, model({ id: "2" })] });
  assert.deepEqual(view(feedState(shown)).models.map(({ key }) => key), ["2"]);
  assert.deepEqual(buildView(feedState(shown), EN, { keep: (id) => id === "1" }).models.map(({ key }) => key), ["1", "2"]);
  const alone = view(feedState(status({ models: [gone] })));
  assert.deepEqual(alone.models, []);
  assert.equal(alone.modelNote, "No streamed model is loaded.");
  const coming = { ...gone, loading: { done: 0, total: 5, rate: null } };
  assert.deepEqual(view(feedState(status({ models: [coming] }))).briefs.map(({ text }) => text), ["flux1-dev: Loading, 0 / 5 B"]);
  const parts = [gone, model({ device: "gpu:1" })];
  assert.equal(view(feedState(status({ models: parts }))).models[0].parts.length, 2, "a model stays whole");
});

test("each loaded model has a line, and what does not stream", () => {
  const lines = (/** @type {string} */ name) => view(STATES[name]).briefs.map(({ text }) => text);
  assert.deepEqual(lines("streaming"), ["flux1-dev: 0.324 s/step · 43 % waiting · streams from page-locked RAM"]);
  assert.deepEqual(lines("allResident"), ["flux1-dev: 0.174 s/step · all stays in VRAM"]);
  assert.deepEqual(lines("split"), ["qwen_image_bf16: 0.324 s/step · 43 % waiting · streams from page-locked RAM"]);
  assert.deepEqual(lines("eight").length, 1);
  assert.deepEqual(lines("loading"), ["flux1-dev: Loading, 8.4 / 23.8 GiB"]);
  const before = (/** @type {any[]} */ ...parts) => view(feedState(status({ models: parts.map((part) => model({ last_run: null, ...part })) }))).briefs[0].text;
  assert.equal(before({}), "flux1-dev: streams from page-locked RAM, 12.6 GiB of 23.8 GiB stay in VRAM");
  assert.deepEqual(lines("inactive"), ["Not streaming: Flux"]);
  assert.deepEqual(lines("idle"), []);
  const halves = [{}, { device: "gpu:1", reason: "another" }].map((changes) =>
    ({ resident_bytes: 5.3 * GIB, streamed_block_bytes: 13.0 * GIB, streamed_weight_bytes: 18.0 * GIB, ...changes }));
  assert.equal(before(...halves), "flux1-dev: streams from page-locked RAM, 11.6 GiB of 47.6 GiB stay in VRAM", "weights, not what is sent");
  const other = { device: "gpu:1", ladder: "staged", reason: "host memory is nearly full" };
  assert.equal(before({}, other), "flux1-dev: streams from the file, host memory is nearly full", "the worst of its parts");
});

test("a card begins with what is copied in a step and what limits it", () => {
  const summary = (/** @type {string} */ name) => view(STATES[name]).models[0].summary;
  assert.match(summary("streaming"), /^Each step copies 11\.2 GiB, .* more VRAM makes it faster\.$/);
  assert.match(summary("packed"), /^Each step copies 13\.0 GiB \(packed, 18\.0 GiB of weights\), which takes longer /);
  assert.match(summary("split"), /^Each step copies 18\.1 GiB, .* more VRAM makes it faster\.$/, "one part waits for its bus");
  assert.match(summary("eight"), /^Each step copies 306 GiB .* makes nothing faster\.$/);
  assert.match(summary("loading"), /not measured yet\.$/);
  assert.match(summary("unknown"), /does not compute meanwhile\.$/);
  assert.match(summary("allResident"), /nothing has to be copied\.$/);
  assert.equal(view(STATES.split).models[1].summary, "");
  const early = model({ streamed_block_bytes: undefined });
  assert.equal(view(feedState(status({ models: [early] }))).models[0].summary, "");
});

test("parts that work in parallel say so, or why one works alone, and have one copy in RAM", () => {
  const devices = ["gpu:0", "gpu:1"];
  const card = (/** @type {string} */ alone) => {
    const parts = devices.map((device) => model({ device, pinned_bytes: 3 * GIB, parallel: { devices, alone } }));
    return view(feedState(status({ models: parts }))).models[0];
  };
  assert.match(card("").headline, /gpu:0 and gpu:1 at the same time$/);
  assert.equal(card("").pinned, "3.0 GiB");
  assert.doesNotMatch(card("bits differ").headline, /at the same time/);
  assert.match(card("bits differ").summary, /^It runs on gpu:0 alone, not in parallel: bits differ\. /);
  assert.doesNotMatch(view(feedState(status({ models: [model({ parallel: null })] }))).models[0].headline, /same time/);
});

test("a step that a later server has is shown as it is called", () => {
  const later = model({ ladder: /** @type {any} */ ("teleported"), reason: "" });
  assert.equal(view(feedState(status({ models: [later] }))).models[0].parts[0].step, "teleported");
});

test("damaged copies are said, and a run that copied nothing", () => {
  assert.match(view(STATES.nearLimit).models[0].warning, /^1 copy/);
  assert.equal(view(STATES.streaming).models[0].warning, "");
  assert.match(view(STATES.allResident).models[0].lastRun, /nothing had to be copied$/);
});

test("loading has bytes, rate and a part of the whole; an event's is not counted once for each device", () => {
  const [loading] = view(STATES.loading).models;
  assert.equal(loading.loading?.text, "8.4 / 23.8 GiB, 1.6 GB/s");
  const parts = [model(), model({ device: "gpu:1" })];
  const both = status({ models: parts });
  const live = event(both, { loading: [["1", 3 * GIB, 10 * GIB, null]] });
  const [split] = view(feedState(both, { event: live })).models;
  assert.equal(split.loading?.text, "3.0 / 10.0 GiB, –");
  assert.equal(split.loading?.fill, 0.3);
  const each = parts.map((part) => ({ ...part, loading: { done: GIB, total: 5 * GIB, rate: GB } }));
  assert.equal(view(feedState(status({ models: each }))).models[0].loading?.text, "2.0 / 10.0 GiB, 2.0 GB/s");
  const nothing = [model({ loading: { done: 0, total: 0, rate: null } })];
  assert.equal(view(feedState(status({ models: nothing }))).models[0].loading?.fill, 0);
});

test("a model that was never run has no last run", () => {
  const never = model({ last_run: null });
  assert.equal(view(feedState(status({ models: [never] }))).models[0].lastRun, "");
  const unknown = model({ last_run: run({ rate: null, step_seconds: null, stall_ms_per_block: null }) });
  assert.match(view(feedState(status({ models: [unknown] }))).models[0].lastRun, /of –; .* at – on average; – of waiting/);
});

test("notices name the node, and are spoken with the state", () => {
  const shown = view(STATES.inactive);
  assert.equal(shown.notices[0].title, "Not streaming: Flux");
  assert.match(shown.state.spoken, /^Idle\. Not streaming Flux: left as it is: /);
  const file = status({ notices: [{ node_id: null, name: "a.gguf", kind: "inactive", text: "why" }] });
  assert.equal(view(feedState(file)).notices[0].title, "Not streaming: a.gguf");
});

test("Streaming Report says what a card says, with the first cause alone, in each language", () => {
  const { models, causes } = /** @type {any} */ (STATES.slow.status);
  const report = { streams: true, model: models[0].name, models, notices: [] };
  const told = reportView(report, causes, EN);
  assert.deepEqual([told.title, told.headline], ["flux1-dev.safetensors", "3.450 s/step · 86 % waiting · 6.3 GB/s"]);
  assert.deepEqual(told.causes.map(({ kind }) => kind), ["link"]);
  assert.match(told.parts[0], /^gpu:0: streams from the file: the limit/);
  assert.match(told.details.join("|"), /^gpu:0: 20\.1 GiB a step .*\|Last run: 20 steps/);
  assert.doesNotMatch(JSON.stringify(told), /\*\*/, "no Markdown");
  const chinese = reportView(report, causes, stringsFor("zh"));
  for (const text of [chinese.headline, ...chinese.parts, ...chinese.details, chinese.causes[0].text, chinese.causes[0].todo]) {
    assert.doesNotMatch(text, /[a-z]+ [a-z]+ [a-z]+/);
  }
  const other = reportView({ streams: false, model: "Flux", models: [], notices: [{ node_id: null, name: "Flux", kind: "inactive", text: "why" }] }, causes, EN);
  assert.deepEqual([other.headline, other.causes, other.notices], ["does not stream: ComfyUI moves its weights", [], ["Flux: why"]]);
});

test("two equal notices are two", () => {
  const one = { node_id: null, name: "a", kind: /** @type {const} */ ("inactive"), text: "why" };
  const shown = view(feedState(status({ notices: [one, { ...one }] }))).notices;
  assert.equal(new Set(shown.map(({ key }) => key)).size, 2);
});

test("old figures stay and are marked; a server without the route shows none", () => {
  for (const name of ["stale", "gone"]) {
    const shown = view(STATES[name]);
    assert.equal(shown.old, true);
    assert.equal(shown.devices.length, 1);
    assert.match(shown.banner, /The figures below are from before\.$/);
    assert.doesNotMatch(view(feedState(null, { link: /** @type {any} */ (name) })).banner, /figures/, "there are none");
  }
  const missing = view(feedState(status(), { link: "missing" }));
  assert.deepEqual(missing.devices, []);
  assert.deepEqual(missing.host, []);
  assert.match(missing.banner, /older than this page/);
});

test("what was known is shown while the page connects again", () => {
  const shown = view(feedState(status(), { link: "starting" }));
  assert.equal(shown.banner, "");
  assert.equal(shown.state.key, "idle");
});

test("devices that nothing is loaded on are put aside where there are many, and closed where there are two", () => {
  const shown = view(STATES.idleGpus);
  assert.deepEqual(shown.devices.map(({ title }) => title), ["gpu:0", "gpu:5"]);
  assert.deepEqual(shown.idle.map(({ title }) => title), ["gpu:1", "gpu:2", "gpu:3", "gpu:4"]);
  assert.equal(shown.idleText, "4 idle GPUs");
  const two = view(feedState(status({ devices: [device({ resident: GIB }), device({ device: "gpu:1" })] })));
  assert.deepEqual(two.devices.map(({ open }) => open), [true, false]);
  assert.deepEqual(two.idle, []);
  assert.ok(view(feedState(status({ devices: [device()] }))).devices[0].open);
});

test("an idle device that is nearly full stays in view", () => {
  const devices = [0, 1, 2, 3].map((place) => device({ device: `gpu:${place}`, other: place === 1 ? 24 * GIB : GIB }));
  const shown = view(feedState(status({ devices })));
  assert.deepEqual(shown.devices.map(({ title }) => title), ["gpu:1"]);
});

test("a node is called as in the graph, and not at all where the graph has no such node", () => {
  const state = feedState(status({ models: [model()], notices: [{ node_id: "9", name: "Flux", kind: "fallback", text: "x" }] }));
  const shown = buildView(state, EN, { title: (id) => (id === "4" ? "My loader" : "") });
  assert.deepEqual(shown.models[0].node, { id: "4", text: "My loader", label: "Go to the node My loader" });
  assert.equal(shown.notices[0].node, null);
  assert.equal(shown.notices[0].title, "Placed differently: Flux");
  assert.equal(view(feedState(status({ models: [model({ node_id: null })] }))).models[0].node, null);
});

test("progress is that of a run, and only while one is on", () => {
  const shown = view(STATES.streaming).progress;
  assert.equal(shown?.text, "Step 7 of 20 · 4 s left");
  assert.equal(shown?.fill, 0.35);
  const progress = { done: 1, total: 20, left: null };
  assert.equal(view(feedState(status({ models: [model({ running: true })] }), { progress })).progress?.text, "Step 1 of 20");
  assert.equal(view(feedState(status({ models: [model()] }), { progress })).progress, null);
});

test("the headline is of the last run: what a step took, what of it was waiting, and how fast copies were", () => {
  const headline = (/** @type {any[]} */ ...runs) =>
    view(feedState(status({ models: runs.map((each, place) => model({ device: `gpu:${place}`, last_run: each })) }))).models[0].headline;
  assert.equal(headline(run()), "0.324 s/step · 43 % waiting · 34.6 GB/s");
  assert.equal(headline(run(), run({ waiting: 0.5, rate: 1e9 })), "0.324 s/step · 50 % waiting · 35.6 GB/s");
  assert.equal(headline(run({ bytes: 0 })), "0.324 s/step · nothing to copy");
  assert.equal(headline(run({ step_seconds: null })), "");
  assert.equal(headline(null), "");
});
