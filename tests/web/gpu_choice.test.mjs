import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";

import { earlier, gpuChoice, readGpus, toggled, writeGpus } from "../../web/lib/gpu_choice.mjs";
import { stringsFor } from "../../web/lib/strings.mjs";
import { GIB, STATES, device, feedState, status } from "./states.mjs";

const EN = stringsFor("en");

/** @param {number} count */
function server(count) {
  const devices = Array.from({ length: count }, (_, place) => device({ device: `gpu:${place}`, total: 24 * GIB, torch: 2.9 * GIB, cache: 0, other: 0 }));
  return feedState(status({ devices }));
}

/**
 * @param {string} text
 * @param {any} [feed]
 */
const choice = (text, feed = server(3)) => gpuChoice(text, false, feed, EN);

test("a press puts a GPU at the end or takes it away, and one goes forward by one place", () => {
  assert.equal(writeGpus(toggled([], "gpu:1")), "gpu:1");
  assert.equal(writeGpus(toggled(["gpu:1"], "gpu:0")), "gpu:1,gpu:0");
  assert.equal(writeGpus(toggled(["gpu:1", "gpu:0"], "gpu:1")), "gpu:0");
  assert.equal(writeGpus(toggled(["gpu:0"], "gpu:0")), "");
  assert.equal(writeGpus(toggled(null, "gpu:0")), "gpu:0", "what cannot be read is replaced");
  assert.equal(writeGpus(earlier(["gpu:0", "gpu:1", "gpu:2"], "gpu:2")), "gpu:0,gpu:2,gpu:1");
  assert.equal(writeGpus(earlier(["gpu:0", "gpu:1"], "gpu:0")), "gpu:0,gpu:1");
});

test("each GPU has its place, its name and its VRAM as in the panel", () => {
  assert.deepEqual(
    choice("cuda:2, 0").rows.map(({ key, place, detail, amount, raise }) => [key, place, detail, amount, raise]),
    [
      ["gpu:0", 2, "NVIDIA GeForce RTX 4090", "2.9 / 24.0 GiB", "Move gpu:0 forward"],
      ["gpu:1", 0, "NVIDIA GeForce RTX 4090", "2.9 / 24.0 GiB", ""],
      ["gpu:2", 1, "NVIDIA GeForce RTX 4090", "2.9 / 24.0 GiB", ""],
    ],
  );
  assert.equal(choice("cuda:2, 0").text, "gpu:2, gpu:0");
  assert.equal(choice("").text, "default");
  assert.equal(choice("gpu:0,cpu").text, "no list of GPUs");
});

test("a GPU that is not here is shown, and can be taken away", () => {
  const { rows, text, warning, choosable } = choice("gpu:7,gpu:0", server(1));
  assert.deepEqual([text, warning, choosable], ["not here: gpu:7", true, true]);
  assert.deepEqual(rows.map(({ key, place, missing, detail }) => [key, place, missing && detail]), [
    ["gpu:0", 2, false],
    ["gpu:7", 1, "not on this server"],
  ]);
});

test("where nothing can be chosen a line says why", () => {
  for (const text of ["", "gpu:0"]) {
    const { choosable, text: line } = choice(text, server(1));
    assert.deepEqual([choosable, line], [false, "The only GPU here: gpu:0, NVIDIA GeForce RTX 4090, 24.0 GiB"]);
  }
  const chinese = gpuChoice("gpu:0", false, server(1), stringsFor("zh"));
  assert.equal(chinese.text, "只有一个 GPU：gpu:0，NVIDIA GeForce RTX 4090，24.0 GiB");
  assert.match(choice("", STATES.noGpu).text, /^No device to stream to: there is no GPU/);
  assert.equal(choice("", STATES.starting).text, EN.startingText);
  const linked = gpuChoice("gpu:0", true, server(3), EN);
  assert.deepEqual([linked.choosable, linked.text], [false, "devices comes from another node."]);
});

test("lists of GPUs are read as the table has it, by which the server's are tested too", () => {
  const table = JSON.parse(readFileSync(new URL("gpu_lists.json", import.meta.url), "utf-8"));
  assert.ok(table.length > 40);
  for (const { text, gpus } of table) assert.deepEqual(readGpus(text), gpus, JSON.stringify(text));
  assert.deepEqual(readGpus(undefined), []);
});
