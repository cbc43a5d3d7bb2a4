import assert from "node:assert/strict";
import { test } from "node:test";

import { lineText } from "../../web/lib/line.mjs";
import { LANGUAGES } from "../../web/lib/strings.mjs";

const GIB = 2 ** 30;
const STREAMING = {
  node: "4", devices: ["gpu:0"], seconds: 0.324, waiting: 0.4537, more_bytes: 8 * GIB, more_seconds: 0.178, more_device: "gpu:0",
  kept_bytes: 7 * GIB, total_bytes: 23 * GIB, staged_bytes: 0, synchronous: false, text: "", details: [],
};

/**
 * @param {Partial<typeof STREAMING> | {seconds: null} | {waiting: null}} [changes]
 * @param {keyof typeof LANGUAGES} [language]
 */
function line(changes = {}, language = "en") {
  return lineText({ ...STREAMING, ...changes }, LANGUAGES[language]);
}

test("the line says what a step takes, what it waits for, and what more memory would bring", () => {
  assert.equal(line(), "0.32 s/step · 45 % waiting for the bus · +8.0 GiB VRAM → 0.18 s");
  assert.equal(line({}, "zh"), "每步 0.32 s · 45 % 的时间在等待总线 · 显存再多 8.0 GiB → 0.18 s");
});

test("where nothing is to gain no limit is told", () => {
  assert.equal(line({ waiting: null, more_bytes: 0 }), "0.32 s/step · hardly any waiting for the bus");
  assert.equal(line({ waiting: null, kept_bytes: 23 * GIB, seconds: 12.4 }), "12 s/step · all 23.0 GiB in VRAM");
});

test("before a step was measured the line says what stays", () => {
  assert.equal(line({ seconds: null, waiting: null }), "7.0 GiB of 23.0 GiB stay in VRAM");
  assert.equal(line({ devices: [] }), "not loaded");
});

test("several devices have one line, with the one that lacks memory", () => {
  assert.equal(
    line({ devices: ["gpu:0", "gpu:1"], more_device: "gpu:1" }),
    "0.32 s/step · 45 % waiting for the bus · +8.0 GiB VRAM on gpu:1 → 0.18 s · gpu:0, gpu:1",
  );
});

test("devices that work at the same time have one line, with the figures of one", () => {
  const both = { devices: ["gpu:0", "gpu:1"], more_bytes: 0, waiting: null, parallel: true };
  assert.equal(line(both), "0.32 s/step · hardly any waiting for the bus · gpu:0 and gpu:1 at the same time");
  const three = { ...both, devices: ["gpu:0", "gpu:1", "gpu:2"] };
  assert.match(line(three), / · gpu:0, gpu:1 and gpu:2 at the same time$/);
  assert.match(line(both, "zh"), / · gpu:0、gpu:1 同时计算$/);
});

test("what is not as it could be is told", () => {
  assert.match(line({ staged_bytes: 3 * GIB, synchronous: true }), /0\.18 s · 3\.0 GiB not page-locked · copied when needed$/);
});
