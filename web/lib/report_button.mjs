/**
 * Puts what an issue needs into the clipboard, or into a box where the browser keeps pages from that.
 */

import { el, setAttribute, setShown, setText } from "./dom.mjs";
import { issueReport } from "./issue_report.mjs";
import { stringsFor } from "./strings.mjs";

/** @import { Feed } from "./feed.mjs" */
/** @import { Strings } from "./strings.mjs" */

/**
 * @param {Feed} feed
 * @param {Strings} strings
 */
export function reportButton(feed, strings) {
  const button = el("button", { type: "button", class: "ws-button" }, strings.copyReport);
  const answer = el("p", { class: "ws-note", role: "status" });
  const box = /** @type {HTMLTextAreaElement} */ (
    el("textarea", { class: "ws-report", readonly: "", rows: "8", "aria-label": strings.reportText })
  );
  box.hidden = true;
  let busy = false;
  button.addEventListener("click", async () => {
    if (busy) return;
    busy = true;
    setAttribute(button, "aria-disabled", "true");
    const text = issueReport(feed.state(), stringsFor("en"), navigator.userAgent);
    const copied = await copy(text);
    box.value = text;
    setShown(box, !copied);
    setText(answer, copied ? strings.copied : strings.notCopied);
    setAttribute(button, "aria-disabled", null);
    busy = false;
  });
  return el("div", { class: "ws-report-part" }, el("div", { class: "ws-buttons" }, button), answer, box);
}

/**
 * @param {string} text
 * @returns {Promise<boolean>} false where the page may not, as one that came by plain HTTP from another machine
 */
async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return false;
  }
}
