/**
 * Elements that are made once and then only changed, so that focus, scrolling and screen readers are left alone.
 */

const SVG = "http://www.w3.org/2000/svg";

/**
 * @param {string} tag
 * @param {Record<string, string>} [attributes]
 * @param {...(Node | string)} children
 * @returns {HTMLElement}
 */
export function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/**
 * @param {string} tag
 * @param {Record<string, string>} [attributes]
 * @param {...Node} children
 * @returns {SVGElement}
 */
export function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/**
 * @param {Node} node
 * @param {string} text
 */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/**
 * @param {Element} element
 * @param {string} name
 * @param {string | null} value  null takes the attribute away
 */
export function setAttribute(element, name, value) {
  if (value === null) element.removeAttribute(name);
  else if (element.getAttribute(name) !== value) element.setAttribute(name, value);
}

/**
 * @param {HTMLElement} element
 * @param {boolean} shown
 */
export function setShown(element, shown) {
  if (element.hidden === shown) element.hidden = !shown;
}

/**
 * Set the text of an element, which is not shown where there is none.
 * @param {HTMLElement} element
 * @param {string} text
 */
export function setOptional(element, text) {
  setText(element, text);
  setShown(element, text !== "");
}

/**
 * @param {HTMLElement | SVGElement} element
 * @param {string} name
 * @param {string} value
 */
export function setStyle(element, name, value) {
  if (element.style.getPropertyValue(name) !== value) element.style.setProperty(name, value);
}

/**
 * @param {number} fraction
 */
export function percentOf(fraction) {
  return `${Math.round(fraction * 1000) / 10}%`;
}

/**
 * One child of `parent` for each item, by key: kept, made or removed, and in the items' order.
 * @template {{key: string}} Item
 * @param {HTMLElement} parent
 * @param {Map<string, Part<Item>>} parts  what `parent` has; changed here
 * @param {readonly Item[]} items
 * @param {(item: Item) => Part<Item>} make
 */
export function syncList(parent, parts, items, make) {
  const keys = new Set(items.map((item) => item.key));
  for (const [key, part] of parts) {
    if (keys.has(key)) continue;
    part.element.remove();
    parts.delete(key);
  }
  items.forEach((item, place) => {
    const part = parts.get(item.key) ?? make(item);
    parts.set(item.key, part);
    // An element that is where it belongs is not moved: moving takes the focus away.
    if (parent.children[place] !== part.element) parent.insertBefore(part.element, parent.children[place] ?? null);
    part.update(item);
  });
}

/**
 * As `syncList`; a list of nothing is not shown.
 * @template {{key: string}} Item
 * @param {HTMLElement} parent
 * @param {Map<string, Part<Item>>} parts
 * @param {readonly Item[]} items
 * @param {(item: Item) => Part<Item>} make
 */
export function showList(parent, parts, items, make) {
  syncList(parent, parts, items, make);
  setShown(parent, items.length > 0);
}

/**
 * @template Item
 * @typedef {{element: HTMLElement, update(item: Item): void}} Part
 */
