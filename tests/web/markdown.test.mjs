import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";

import { issueReport } from "../../web/lib/issue_report.mjs";
import { inMarkdown } from "../../web/lib/markdown.mjs";
import { stringsFor } from "../../web/lib/strings.mjs";
import { cause, device, feedState, model, status } from "./states.mjs";

test("texts are written as the table has it, by which the server's are tested too", () => {
  const table = JSON.parse(readFileSync(new URL("markdown_texts.json", import.meta.url), "utf-8"));
  assert.ok(table.length > 30);
  for (const { text, markdown } of table) assert.equal(inMarkdown(text), markdown, JSON.stringify(text));
});

test("no name breaks a line of a report, or marks anything", () => {
  const odd = "a|b`c`*d*\n\n# e <!-- @user";
  const said = {
    ...status({
      devices: [device({ device: `gpu:0${odd}`, name: odd })], notices: [{ node_id: null, name: odd, kind: "failed", text: odd }],
      models: [model({ name: odd, device: odd, ladder: /** @type {any} */ (odd), reason: odd, plan: odd, settings: { mode: odd } })],
    }),
    version: odd, environment: { options: odd }, comfyui: { version: odd, broken: [odd] }, causes: [cause({ kind: "unpacked", reason: odd, device: odd })],
  };
  const report = issueReport(feedState(/** @type {any} */ (said)), stringsFor("en"), odd);
  const plain = issueReport(feedState({ .../** @type {any} */ (said), environment: { options: "x" } }), stringsFor("en"), "x");
  assert.equal(report.split("\n").length, plain.split("\n").length);
  assert.equal(report.split("a\\|b\\`c\\`\\*d\\* \\# e \\<!-- @&#8203;user").length - 1, report.split("user").length - 1);
  assert.ok(report.split("user").length > 15);
  const [row] = report.split("\n").filter((line) => line.startsWith("| gpu:0"));
  assert.equal(row.replaceAll("\\|", "").split("|").length, 9, "seven cells");
});
