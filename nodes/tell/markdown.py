"""Text of others in Markdown: names of files, nodes and devices are whatever somebody has called them.

The page does the same (web/lib/markdown.mjs), by the same table of cases.
"""

from __future__ import annotations

import re

BREAKS = re.compile(r"[\s\x00-\x1f\x7f-\x9f\ufeff]+")
MARKS = re.compile(r"[\\`*\[\]<>|~&$#]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
# Addresses become links without any mark, names and numbers on GitHub too.
ADDRESS = re.compile(r":(?=//)|(?<=www)\.", re.IGNORECASE)
REFERENCE = re.compile(r"@|#(?=[0-9])")
NOTHING_BETWEEN = "&#8203;"
# What begins a list, or is a line across.
SIGN, NUMBER = re.compile(r"^(?=[-+])"), re.compile(r"^[0-9]+(?=[.)](?: |\Z))")


def in_markdown(text: str) -> str:
    """A text as Markdown that shows it as it is, in one line, also in a cell of a table."""
    text = BREAKS.sub(" ", text).strip(" ")
    for marks in (MARKS, ADDRESS):
        text = marks.sub(r"\\\g<0>", text)
    text = REFERENCE.sub(rf"\g<0>{NOTHING_BETWEEN}", text)
    return NUMBER.sub(r"\g<0>\\", SIGN.sub(r"\\", text))
