import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";

import { LANGUAGES, stringsFor } from "../../web/lib/strings.mjs";
import { causeViews } from "../../web/lib/why.mjs";
import { GB, STATES, cause } from "./states.mjs";

const EN = stringsFor("en");
const SERVER = readFileSync(new URL("../../nodes/page/causes.py", import.meta.url), "utf-8");
const [, literal] = SERVER.match(/^Kind = Literal\[([^\]]+)\]/m) ?? [];
const KINDS = [...literal.matchAll(/"(\w+)"/g)].map(([, kind]) => kind);

test("the page has words for every cause of the server, in each language", () => {
  assert.ok(KINDS.length > 8);
  for (const strings of Object.values(LANGUAGES)) {
    for (const kind of KINDS) {
      const [view] = causeViews([cause({ kind, link: "gen 3 x16", card: "gen 4 x16", why: "nothing is packed" })], "1", strings);
      assert.ok(view.text.length > 8 && view.todo.length > 4, kind);
      assert.doesNotMatch(view.text + view.todo, /undefined|NaN/);
    }
  }
});

test("a cause of a later server is left out, and so are those of other models", () => {
  assert.deepEqual(causeViews([cause({ kind: "moon" }), cause({ model: "2" })], "1", EN), []);
});

test("the number that matters stands in each sentence", () => {
  const [link, unpinned, others, room] = causeViews(STATES.slow.status?.causes ?? [], "1", EN);
  assert.equal(link.text, "The card's link runs at PCIe 4.0 x4; the card can do PCIe 4.0 x8.");
  assert.match(link.todo, /slot with all lanes/);
  assert.equal(link.costs, "up to 1.71 s of each step");
  assert.match(unpinned.text, /^7.3 GiB are not in page-locked RAM: the limit of 12.8 GiB/);
  assert.match(others.todo, /1.9 GiB of weights could stay/);
  assert.match(room.text, /^20.1 GiB of weights have no room in 8.0 GiB/);
  assert.equal(room.costs, "2.97 s of waiting in all", "the others are part of it");
});

test("a slow generation is another matter than few lanes", () => {
  const [view] = causeViews([cause({ kind: "link", link: "gen 3 x16", card: "gen 4 x16", narrow: false })], "1", EN);
  assert.match(view.todo, /BIOS/);
});

test("GPUs that compute one after the other, and what to do, with cfg 1 or only above it", () => {
  const turns = (/** @type {boolean} */ guidance) => causeViews([cause({ kind: "turns", seconds: 0.46, together: 0.57, guidance })], "1", EN)[0];
  assert.equal(turns(false).text, "The GPUs compute one after the other.");
  assert.equal(turns(false).todo, "Set split of GPU Placement to parallel: a step would take about 0.57 s.");
  assert.match(turns(true).todo, /^Where cfg is above 1, set split /);
  assert.equal(turns(false).costs, "up to 0.46 s of each step");
  const both = [cause({ kind: "turns", together: 0.57, seconds: 0.1 }), cause({ kind: "compute", device: "gpu:1", waiting: 0.01 })];
  assert.deepEqual(causeViews(both, "1", EN).map(({ kind, device }) => [kind, device]), [["turns", ""]]);
});

test("on several devices the dearest comes first, with its device, and room last", () => {
  const causes = [
    cause({ kind: "others", seconds: 0.1, others: GB, gain: GB }), cause({ seconds: 9 }),
    cause({ kind: "limit", device: "gpu:1", seconds: 0.2, limit: GB, gain: GB }), cause({ device: "gpu:1", seconds: 8 }),
  ];
  const views = causeViews(causes, "1", EN);
  assert.deepEqual(views.map(({ device, kind }) => `${device} ${kind}`), ["gpu:1 limit", "gpu:0 others", "gpu:0 room", "gpu:1 room"]);
  assert.ok(causeViews([cause()], "1", EN).every(({ device }) => device === ""));
});

test("where all devices compute one speaks for all, and where one waits they are silent", () => {
  const computes = [cause({ kind: "compute", waiting: 0.01 }), cause({ kind: "compute", waiting: 0.02, device: "gpu:1" })];
  const [view, ...more] = causeViews(computes, "1", EN);
  assert.deepEqual([view.device, more.length], ["", 0]);
  assert.equal(view.text, "Less than 3 % of a step waits for the bus.");
  assert.match(SERVER, /^LEAST_WAITING = 0\.03$/m);
  assert.deepEqual(causeViews([...computes, cause({ device: "gpu:2" })], "1", EN).map(({ kind }) => kind), ["room"]);
});
