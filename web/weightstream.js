/**
 * What the pack adds to ComfyUI's page: a sidebar tab, a line on nodes, a widget on GPU Placement, presets, commands and a
 * setting.
 *
 * The page imports every `.js` file of this folder, so this is the only one.
 */

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { createFeed } from "./lib/feed.mjs";
import { LINE_EVENT, nodeLines } from "./lib/node_lines.mjs";
import { nodeWidgets } from "./lib/node_widgets.mjs";
import { settingsWidgets } from "./lib/settings_widgets.mjs";
import { sidebarTab } from "./lib/sidebar_tab.mjs";
import { stringsFor } from "./lib/strings.mjs";
import { takeover } from "./lib/takeover.mjs";

const WIDGET_SETTING = "WeightStream.NodeWidget";
const COMMAND = "WeightStream.ShowVRAM";

const locale = () => String(app.extensionManager?.setting?.get("Comfy.Locale") ?? "en");
const strings = stringsFor(locale());
const feed = createFeed(api);
const tab = sidebarTab({ feed, locale });
const widgets = nodeWidgets({ app, feed, locale });
const lines = nodeLines({ app, locale });
const inputs = settingsWidgets({ locale });
const takingOver = takeover({ app, api, locale });

app.registerExtension({
  name: "weightstream.vram",
  settings: [
    {
      id: WIDGET_SETTING,
      category: ["WeightStream", "GPU Placement", "VRAM"],
      name: strings.widgetSetting,
      type: "boolean",
      defaultValue: true,
      onChange: (/** @type {boolean} */ shown) => widgets.show(shown),
    },
  ],
  commands: [
    { id: COMMAND, label: strings.showCommand, icon: tab.icon, function: () => tab.open(app) },
    takingOver.command,
  ],
  menuCommands: [takingOver.menu],
  getCanvasMenuItems: takingOver.canvasItems,
  getNodeMenuItems: takingOver.nodeItems,
  setup() {
    api.addEventListener(LINE_EVENT, lines.hear);
    app.extensionManager.registerSidebarTab(tab.entry);
  },
  nodeCreated(/** @type {any} */ node) {
    inputs.add(node);
    widgets.add(node);
  },
});
