/**
 * The panel as a tab of ComfyUI's sidebar.
 */

import { mountPanel } from "./panel.mjs";
import { stringsFor } from "./strings.mjs";

const ID = "weightstream";
const ICON = "pi pi-microchip";

/**
 * @param {{feed: import("./feed.mjs").Feed, locale: () => string, nodes: import("./graph_nodes.mjs").GraphNodes}} options
 */
export function sidebarTab({ feed, locale, nodes }) {
  const strings = stringsFor(locale());
  /** @type {Map<HTMLElement, {destroy(): void}>} */
  const mounted = new Map();
  return {
    icon: ICON,
    entry: {
      id: ID,
      type: "custom",
      icon: ICON,
      title: strings.tab,
      tooltip: strings.tooltip,
      /** @param {HTMLElement} container */
      render(container) {
        // The host calls this each time that it renders its own part.
        if (mounted.has(container)) return;
        container.classList.add("ws-sidebar");
        mounted.set(container, mountPanel(container, { feed, locale, nodes }));
      },
      destroy() {
        for (const panel of mounted.values()) panel.destroy();
        mounted.clear();
      },
    },
    /** @param {any} app  the host's */
    open(app) {
      // There is a command that opens and closes a tab, and none that only opens it.
      if (mounted.size === 0) app.extensionManager.command.execute(`Workspace.ToggleSidebarTab.${ID}`);
    },
  };
}
