import assert from "node:assert/strict";
import { test } from "node:test";

import { CHINESE_TEXTS, inChinese } from "../../web/lib/server_texts.mjs";
import { LANGUAGES } from "../../web/lib/strings.mjs";
import { buildView } from "../../web/lib/view.mjs";
import { STATES } from "./states.mjs";

test("a plan is Chinese in all its parts, with the values of the server", () => {
  assert.equal(
    inChinese("11.2 GiB a step streamed in 84 segments, from 57 of 57 blocks; 13.1 GiB on the device: 12.1 GiB of blocks stay, "
      + "512 MiB outside of blocks, 512 MiB staging; a step in 0.324 s, limited by the bus (0.177 s of compute); 8.6 GiB more VRAM "
      + "would make it 0.178 s; 11.2 GiB from page-locked memory"),
    "每步流式传输 11.2 GiB，分 84 段，来自 57/57 个块；设备上共 13.1 GiB：常驻块 12.1 GiB，块外 512 MiB，暂存区 512 MiB；"
      + "每步 0.324 秒，瓶颈是总线（计算需 0.177 秒）；显存再多 8.6 GiB 则为 0.178 秒；11.2 GiB 来自锁页内存",
  );
  assert.equal(inChinese("1.0 MiB a step streamed in 1 segment, from 1 of 1 block"), "每步流式传输 1.0 MiB，分 1 段，来自 1/1 个块");
});

test("a reason inside of a sentence is Chinese too", () => {
  assert.equal(
    inChinese("60.2 GiB from page-locked memory, 3.0 GiB staged from the file or pageable memory (the limit of 60.6 GiB page-locked memory is reached)"),
    "60.2 GiB 来自锁页内存，3.0 GiB 经文件或普通内存中转（已达到锁页内存上限 60.6 GiB）",
  );
  assert.equal(inChinese("left as it is: it has no list of repeated blocks"), "保持原样：它没有重复的块");
  assert.equal(inChinese("gpu:3 is not there (this machine has gpu:0); MODEL on gpu:0"), "没有 gpu:3（本机有 gpu:0）；MODEL 在 gpu:0 上");
});

test("a value is no part of the text after it, and a sentence in brackets stays whole", () => {
  assert.equal(inChinese("a step in 0.324 s; 8.6 GiB more VRAM would make it 0.178 s"), "每步 0.324 秒；显存再多 8.6 GiB 则为 0.178 秒");
  assert.equal(
    inChinese("1.0 GiB from page-locked memory, 3.0 GiB staged from the file or pageable memory (host memory is nearly full; page-locking is switched off)"),
    "1.0 GiB 来自锁页内存，3.0 GiB 经文件或普通内存中转（主机内存将满；已关闭锁页）",
  );
});

test("what is not known is shown as it came", () => {
  assert.equal(inChinese("something new; a step in 3 s"), "something new；每步 3 秒");
  assert.equal(LANGUAGES.en.fromServer("a step in 3 s"), "a step in 3 s");
});

test("both texts have the same number of values", () => {
  const count = (/** @type {string} */ text) => text.split("…").length;
  assert.deepEqual(CHINESE_TEXTS.filter(([english, chinese]) => count(english) !== count(chinese)), []);
});

test("no state of the panel has an English sentence in Chinese", () => {
  const english = /[a-z]+ [a-z]+ [a-z]+/;
  for (const [name, feed] of Object.entries(STATES)) {
    const { models, notices, deviceNote, fleet } = buildView(feed, LANGUAGES.zh);
    const told = [...(fleet?.workers ?? []), ...(fleet?.idle ?? [])].flatMap(({ state, reason, detail }) => [state, reason, detail]);
    const texts = [deviceNote, fleet?.summary ?? "", fleet?.idleText ?? "", ...told, ...notices.map(({ text }) => text), ...models.flatMap(({ summary, brief, parts }) => [summary, brief, ...parts.flatMap(({ step, plan }) => [step, plan])])];
    assert.deepEqual(texts.filter((text) => english.test(text)), [], name);
  }
});
