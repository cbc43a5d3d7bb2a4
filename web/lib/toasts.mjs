/**
 * Says it once when something does not stream, or is placed differently, than its node was asked for.
 */

/** @import { Server } from "./feed.mjs" */
/** @import { Notice } from "./status.mjs" */
/** @import { Strings } from "./strings.mjs" */

export const NOTICE_EVENT = "weightstream.notice";
const SHOWN_MS = 10_000;

/**
 * @param {{app: any, api: Server, strings: Strings, wanted: () => boolean, title: (id: string) => string}} options
 */
export function toasts({ app, api, strings, wanted, title }) {
  /** What was said; a node that is asked the same in each prompt need not say it each time. @type {Set<string>} */
  const said = new Set();
  api.addEventListener(NOTICE_EVENT, ({ detail }) => {
    const notice = /** @type {Notice} */ (detail);
    const key = JSON.stringify([notice.node_id, notice.name, notice.text]);
    // The host has a dialog for what failed.
    if (notice.kind === "failed" || said.has(key) || !wanted()) return;
    said.add(key);
    const node = notice.node_id === null ? "" : title(notice.node_id);
    app.extensionManager?.toast?.add({
      severity: "warn",
      summary: `${strings[notice.kind] ?? ""}: ${node || notice.name}`,
      detail: strings.fromServer(notice.text),
      life: SHOWN_MS,
    });
  });
}
