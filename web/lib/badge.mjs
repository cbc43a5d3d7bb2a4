/**
 * VRAM and waiting in the page's top bar, while the setting says so. Nobody is asked for anything while it is off.
 */

import { el, setAttribute, setShown, setText } from "./dom.mjs";
import { fraction, percent } from "./format.mjs";
import { merge } from "./status.mjs";

const STYLES = new URL("../weightstream.css", import.meta.url).href;

/** @import { Feed, FeedState } from "./feed.mjs" */
/** @import { Strings } from "./strings.mjs" */

/**
 * The fullest device, and who waits most; "" where nothing is known.
 * @param {FeedState} feed
 * @param {Strings} strings
 */
export function badgeText(feed, strings) {
  if (feed.link !== "live") return "";
  const devices = merge(feed.status, feed.event)?.devices ?? [];
  const used = devices.map(({ total, free }) => fraction(total === null || free === null ? null : total - free, total));
  const most = (/** @type {(number | null)[]} */ values) => {
    const known = values.filter((value) => value !== null);
    return known.length > 0 ? Math.max(...known) : null;
  };
  const full = most(used);
  return full === null ? "" : strings.badge(percent(full), percent(most(devices.map((device) => device.stalled)) ?? 0));
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
      const words = badgeText(state, strings);
      setText(text, words);
      setShown(element, words !== "");
      setAttribute(element, "aria-label", strings.badgeLabel(words));
      setAttribute(element, "title", strings.tooltip);
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
