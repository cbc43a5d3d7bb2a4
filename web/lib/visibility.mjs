/**
 * Whether somebody can see an element: it is laid out, inside of what its ancestors show, and the page is in front.
 */

/**
 * @param {Element} element
 * @param {(visible: boolean) => void} listener  called with each change, and first when it is known
 * @returns {() => void} stops watching
 */
export function watchVisibility(element, listener) {
  let inView = false;
  let told = false;
  const tell = () => {
    const visible = inView && document.visibilityState === "visible";
    if (visible === told) return;
    told = visible;
    listener(visible);
  };
  const observer = new IntersectionObserver((entries) => {
    inView = entries[entries.length - 1].isIntersecting;
    tell();
  });
  observer.observe(element);
  window.addEventListener("visibilitychange", tell);
  return () => {
    observer.disconnect();
    window.removeEventListener("visibilitychange", tell);
  };
}
