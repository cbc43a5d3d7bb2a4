/**
 * VRAM and waiting in the page's top bar, while the setting says so. Nobody is asked for anything while it is off.
 */

import { el, setAttribute, setShown, setText } from "./dom.mjs";
import { bytesOf, fraction, isKnown, percent } from "./format.mjs";
import { merge } from "./status.mjs";

const STYLES = new URL("../weightstream.css", import.meta.url).href;

/** @import { Feed, FeedState } from "./feed.mjs" */
/** @import { Device } from "./status.mjs" */
/** @import { Strings } from "./strings.mjs" */

/**
 * The fullest device, and what part of the last run waited; nothing where no device is known.
 * @param {FeedState} feed
 * @param {Strings} strings
 * @returns {{text: string, title: string}}
 */
export function badgeView(feed, strings) {
  const status = feed.link === "live" ? merge(feed.status, feed.event) : null;
  const used = (/** @type {Device} */ { total, free }) => (total === null || free === null ? null : total - free);
  const part = (/** @type {Device} */ device) => fraction(used(device), device.total) ?? -1;
  const devices = (status?.devices ?? []).filter((device) => used(device) !== null).sort((one, other) => part(other) - part(one));
  if (devices.length === 0) return { text: "", title: "" };
  const [fullest] = devices;
  const vram = bytesOf(used(fullest), fullest.total);
  const runs = (status?.models ?? []).filter((model) => model.ladder !== "unloaded").map((model) => model.last_run?.waiting);
  const known = runs.filter(isKnown);
  const waiting = known.length > 0 ? percent(Math.max(...known)) : "";
  const told = [
    strings.badgeVram(fullest.device, vram),
    devices.length > 1 ? strings.badgeFullest(devices.length) : "",
    waiting && strings.badgeWaiting(waiting),
  ];
  return { text: strings.badge(vram, waiting), title: told.filter(Boolean).join("; ") };
}

/** @param {{app: any, feed: Feed, strings: Strings, open: () => void}} options */
export function topBarBadge({ app, feed, strings, open }) {
  /** @type {{element: HTMLElement, stop: () => void} | null} */
  let shown = null;

  function mount() {
    const group = app.menu?.settingsGroup?.element;
    if (!group) return null; // The page's old menu has no top bar.
    const text = el("span");
    const element = el("button", { type: "button", class: "ws-top-badge" }, el("i", { class: "pi pi-microchip", "aria-hidden": "true" }), text);
    element.addEventListener("click", open);
    const viewer = feed.watch((state) => {
      const view = badgeView(state, strings);
      setText(text, view.text);
      setShown(element, view.text !== "");
      setAttribute(element, "aria-label", strings.badgeLabel(view.text));
      setAttribute(element, "title", view.title);
    });
    const style = el("link", { rel: "stylesheet", href: STYLES });
    group.before(element, style);
    const look = () => viewer.show(document.visibilityState === "visible");
    document.addEventListener("visibilitychange", look);
    look();
    const stop = () => {
      document.removeEventListener("visibilitychange", look);
      viewer.close();
      element.remove();
      style.remove();
    };
    return { element, stop };
  }

  return {
    /** @param {boolean} wanted */
    show(wanted) {
      if (wanted && !shown) shown = mount();
      if (!wanted && shown) {
        shown.stop();
        shown = null;
      }
    },
  };
}
