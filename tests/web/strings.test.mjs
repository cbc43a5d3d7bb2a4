import assert from "node:assert/strict";
import { test } from "node:test";

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
