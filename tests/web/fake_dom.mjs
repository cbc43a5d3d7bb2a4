/**
 * As much of a document as lines on nodes need: elements with text, attributes, children and listeners.
 */

class FakeElement {
  /** @type {(FakeElement | string)[]} */
  children = [];
  /** @type {Map<string, string>} */
  attributes = new Map();
  isConnected = false;
  open = false;
  addEventListener = () => {};

  /** @param {string} tag */
  constructor(tag) {
    this.tag = tag;
  }

  get textContent() {
    return this.children.map((/** @type {any} */ each) => each.textContent ?? each).join("");
  }

  set textContent(/** @type {string} */ text) {
    this.children = [text];
  }

  setAttribute = (/** @type {string} */ name, /** @type {string} */ value) => void this.attributes.set(name, value);
  append = (/** @type {any[]} */ ...children) => void this.children.push(...children);
  replaceChildren = (/** @type {any[]} */ ...children) => void (this.children = children);
}

/** Have the page's globals that there are none of in node. Frames pass by themselves. */
export function fakePage() {
  Object.assign(globalThis, {
    document: { createElement: (/** @type {string} */ tag) => new FakeElement(tag), querySelector: () => null },
    requestAnimationFrame: (/** @type {() => void} */ then) => setImmediate(then),
    LGraphBadge: class {
      constructor(/** @type {any} */ { text }) {
        this.text = text;
      }
    },
  });
}
