import assert from "node:assert/strict";
import { test } from "node:test";

import * as format from "../../web/lib/format.mjs";

test("sizes have one place and the unit that suits them", () => {
  assert.equal(format.bytes(0), "0 B");
  assert.equal(format.bytes(999), "999 B");
  assert.equal(format.bytes(1536), "1.5 KiB");
  assert.equal(format.bytes(25_165_824), "24.0 MiB");
  assert.equal(format.bytes(680e6), "648 MiB");
  assert.equal(format.bytes(23.8e9), "22.2 GiB");
  assert.equal(format.bytes(150.1e9), "140 GiB");
  assert.equal(format.bytes(2.4e12), "2.2 TiB");
});

test("a size just below a unit is not a thousand of the one before", () => {
  assert.equal(format.bytes(2 ** 30 - 40_000), "1.0 GiB");
  assert.equal(format.bytes(99.96 * 2 ** 20), "100 MiB");
  assert.equal(format.bytes(-0.4), "0 B");
});

test("what is not known is a dash", () => {
  for (const unknown of [null, undefined, Number.NaN, Number.POSITIVE_INFINITY, "12"]) {
    const value = /** @type {any} */ (unknown);
    for (const how of [format.bytes, format.rate, format.percent, format.seconds, format.milliseconds]) {
      assert.equal(how(value), format.DASH);
    }
  }
  assert.equal(format.bytesOf(null, null), format.DASH);
  assert.equal(format.bytesOf(null, 25.2e9), "– / 23.5 GiB");
  assert.equal(format.bytesOf(3e9, null), "2.8 GiB");
});

test("a part is given in the unit of its whole", () => {
  assert.equal(format.bytesOf(300e6, 25.2e9), "0.3 / 23.5 GiB");
  assert.equal(format.bytesOf(0, 0), "0 / 0 B");
});

test("a rate is decimal, as buses and disks are rated", () => {
  assert.equal(format.rate(55.2e9), "55.2 GB/s");
  assert.equal(format.rate(999_960_000), "1.0 GB/s");
  assert.equal(format.rate(12), "12 B/s");
});

test("a percentage is neither 0 of something nor 100 of less than all", () => {
  assert.equal(format.percent(0), "0 %");
  assert.equal(format.percent(0.004), "<1 %");
  assert.equal(format.percent(0.43), "43 %");
  assert.equal(format.percent(0.996), ">99 %");
  assert.equal(format.percent(1), "100 %");
});

test("a fraction stays between 0 and 1", () => {
  assert.equal(format.fraction(1, 4), 0.25);
  assert.equal(format.fraction(5, 4), 1);
  assert.equal(format.fraction(-1, 4), 0);
  assert.equal(format.fraction(0, 0), 0);
  assert.equal(format.fraction(null, 4), null);
  assert.equal(format.fraction(4, null), null);
});

test("times keep three places below ten seconds", () => {
  assert.equal(format.seconds(0.3244), "0.324 s");
  assert.equal(format.seconds(12.34), "12.3 s");
  assert.equal(format.milliseconds(0.4), "0.40 ms");
  assert.equal(format.milliseconds(512.3), "512 ms");
});
