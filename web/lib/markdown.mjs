/**
 * Text of others in Markdown: names of files, nodes and devices are whatever somebody has called them. The server's own
 * reports do the same (nodes/tell/markdown.py), by the same table of cases.
 */

const BREAKS = /[\s\x00-\x1f\x7f-\x9f]+/g;
const MARKS = /[\\`*[\]<>|~&$#]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])/g;
// Addresses become links without any mark, names and numbers on GitHub too.
const ADDRESS = /:(?=\/\/)|(?<=www)\./gi;
const REFERENCE = /@|#(?=[0-9])/g;
const NOTHING_BETWEEN = "&#8203;";
// What begins a list, or is a line across.
const BEGINS = /^(?:[-+]|[0-9]+(?=[.)](?: |$)))/;

/**
 * A text as Markdown that shows it as it is, in one line, also in a cell of a table.
 * @param {unknown} text
 */
export function inMarkdown(text) {
  return String(text)
    .replace(BREAKS, " ")
    .trim()
    .replace(MARKS, "\\$&")
    .replace(ADDRESS, "\\$&")
    .replace(REFERENCE, `$&${NOTHING_BETWEEN}`)
    .replace(BEGINS, (begin) => (/\d/.test(begin) ? `${begin}\\` : `\\${begin}`));
}
