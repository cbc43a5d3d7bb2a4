import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";

import { AUTOMATIC, UNLIMITED } from "../../web/lib/settings_widgets.mjs";
import { LANGUAGES, stringsFor } from "../../web/lib/strings.mjs";

test("every language has every text, and functions where the others have them", () => {
  const kinds = (/** @type {object} */ table) =>
    Object.fromEntries(Object.entries(table).map(([key, text]) => [key, `${typeof text} ${text.length > 0 ? "" : "empty"}`]).sort());
  assert.deepEqual(kinds(LANGUAGES.zh), kinds(LANGUAGES.en));
});

test("a locale is found by its language, and any other is English", () => {
  for (const locale of ["zh", "zh-TW", "zh_CN", "ZH"]) assert.equal(stringsFor(locale), LANGUAGES.zh);
  for (const locale of ["en", "fr", "", "zhx", null, undefined]) assert.equal(stringsFor(locale), LANGUAGES.en);
});

test("groups of settings have the language of the page", () => {
  const source = readFileSync(new URL("../../web/weightstream.js", import.meta.url), "utf-8");
  const groups = [...source.matchAll(/category: \["WeightStream", ([^,]+),/g)].map(([, group]) => group);
  assert.deepEqual([...new Set(groups)], ["strings.placementSettings", "strings.pageSettings"]);
  assert.match(LANGUAGES.zh.placementSettings + LANGUAGES.zh.pageSettings, /^GPU 分配页面$/);
});

test("where 0 is shown as it is, in Nodes 2.0, the input's own help says what it means", () => {
  for (const language of ["en", "zh"]) {
    const nodes = JSON.parse(readFileSync(new URL(`../../locales/${language}/nodeDefs.json`, import.meta.url), "utf-8"));
    const inputs = Object.values(nodes).flatMap(({ inputs }) => Object.entries(inputs ?? {}));
    for (const name of [...AUTOMATIC, ...UNLIMITED]) {
      const helps = inputs.filter(([input]) => input === name).map(([, { tooltip }]) => tooltip);
      assert.ok(helps.length > 0 && helps.every((help) => /(^|[ 。])0 /.test(help)), `${name}: ${helps}`);
    }
  }
});
