/**
 * An element that shows what a feed says, and does nothing while it cannot be seen.
 */

import { el } from "./dom.mjs";
import { stringsFor } from "./strings.mjs";
import { watchVisibility } from "./visibility.mjs";

/** @import { Feed, FeedState } from "./feed.mjs" */
/** @import { Strings } from "./strings.mjs" */

const STYLES = new URL("../weightstream.css", import.meta.url).href;

/**
 * @param {HTMLElement} container
 * @param {{feed: Feed, locale: () => string, classes: string,
 *   build: (root: HTMLElement, strings: Strings) => (state: FeedState) => void}} options  build: fills the element, anew for
 *   each language, and returns what updates it
 * @returns {{element: HTMLElement, destroy(): void}}
 */
export function mountLive(container, { feed, locale, classes, build }) {
  // No landmark: a page may have many.
  const element = el("div", { class: classes, role: "group", tabindex: "-1" });
  /** @type {Strings | null} */
  let strings = null;
  /** @type {(state: FeedState) => void} */
  let update = () => {};
  const viewer = feed.watch((state) => {
    const wanted = stringsFor(locale());
    if (wanted !== strings) {
      strings = wanted;
      element.replaceChildren();
      update = build(element, strings);
    }
    const focused = element.contains(document.activeElement);
    update(state);
    // What had the focus is gone: from here the next Tab goes on in the element, and not at the page's begin.
    if (focused && !element.contains(document.activeElement)) element.focus({ preventScroll: true });
  });
  // In the element's own place: other packs' elements share the page's head.
  const style = el("link", { rel: "stylesheet", href: STYLES });
  container.append(element, style);
  const stop = watchVisibility(element, (visible) => viewer.show(visible));
  return {
    element,
    destroy() {
      stop();
      viewer.close();
      element.remove();
      style.remove();
    },
  };
}
