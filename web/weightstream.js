/**
 * What the pack adds to ComfyUI's page: a sidebar tab, a line on nodes, VRAM and a picker of GPUs on GPU Placement,
 * Streaming Report, presets, a badge, toasts, commands and settings.
 *
 * The page imports every `.js` file of this folder, so this is the only one.
 */

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { topBarBadge } from "./lib/badge.mjs";
import { createFeed } from "./lib/feed.mjs";
import { gpuPicker } from "./lib/gpu_picker.mjs";
import { graphNodes } from "./lib/graph_nodes.mjs";
import { LINE_EVENT, nodeLines } from "./lib/node_lines.mjs";
import { nodeWidgets } from "./lib/node_widgets.mjs";
import { reportNodes } from "./lib/report_node.mjs";
import { settingsWidgets } from "./lib/settings_widgets.mjs";
import { sidebarTab } from "./lib/sidebar_tab.mjs";
import { stringsFor } from "./lib/strings.mjs";
import { takeover } from "./lib/takeover.mjs";
import { toasts } from "./lib/toasts.mjs";
import { watchWorkflows } from "./lib/workflows.mjs";

const WIDGET_SETTING = "WeightStream.NodeWidget";
const BADGE_SETTING = "WeightStream.TopBarBadge";
const TOAST_SETTING = "WeightStream.Toasts";
const COMMAND = "WeightStream.ShowVRAM";

const locale = () => String(app.extensionManager?.setting?.get("Comfy.Locale") ?? "en");
const strings = stringsFor(locale());
const feed = createFeed(api);
const workflows = watchWorkflows(app, api);
const nodes = graphNodes(app, workflows, api);
const tab = sidebarTab({ feed, locale, nodes });
const badge = topBarBadge({ app, feed, strings, open: () => tab.open(app) });
const setting = (/** @type {string} */ id) => app.extensionManager?.setting?.get(id);
const widgets = nodeWidgets({ app, feed, locale, nodes, openPanel: () => tab.open(app) });
const lines = nodeLines({ app, locale, workflows });
const reports = reportNodes({ app, api, locale });
const picker = gpuPicker({ app, feed, locale });
const inputs = settingsWidgets({ locale });
const takingOver = takeover({ app, api, locale });

app.registerExtension({
  name: "weightstream.vram",
  settings: [
    {
      id: WIDGET_SETTING,
      category: ["WeightStream", strings.placementSettings, "VRAM"],
      name: strings.widgetSetting,
      type: "boolean",
      defaultValue: true,
      onChange: (/** @type {boolean} */ shown) => widgets.show(shown),
    },
    {
      id: BADGE_SETTING,
      category: ["WeightStream", strings.pageSettings, "Badge"],
      name: strings.badgeSetting,
      type: "boolean",
      defaultValue: false,
      onChange: (/** @type {boolean} */ shown) => badge.show(shown),
    },
    {
      id: TOAST_SETTING,
      category: ["WeightStream", strings.pageSettings, "Toasts"],
      name: strings.toastSetting,
      type: "boolean",
      defaultValue: true,
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
    // The top bar is there by now, which it is not when settings are read.
    badge.show(Boolean(setting(BADGE_SETTING)));
    toasts({ app, api, strings, wanted: () => setting(TOAST_SETTING) !== false, title: nodes.title });
  },
  afterConfigureGraph: () => void lines.graphChanged(),
  nodeCreated(/** @type {any} */ node) {
    inputs.add(node);
    picker.add(node);
    reports.add(node);
    widgets.add(node);
  },
});
