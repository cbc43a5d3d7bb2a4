"""Names and texts of others in Markdown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from weightstream.nodes.report import as_markdown
from weightstream.nodes.tell.markdown import in_markdown

TEXTS = json.loads((Path(__file__).parents[2] / "web" / "markdown_texts.json").read_text("utf-8"))
ODD = "a|b`c`*d*\n\n# e <!-- @user"
WRITTEN = "a\\|b\\`c\\`\\*d\\* \\# e \\<!-- @&#8203;user"


@pytest.mark.parametrize("case", TEXTS, ids=lambda case: ascii(case["text"]))
def test_texts_are_written_as_by_the_page(case: dict[str, str]) -> None:
    """The page's own tests have the same table."""
    assert in_markdown(case["text"]) == case["markdown"]


def test_no_name_breaks_a_line_of_the_report_or_marks_anything() -> None:
    entry = {"name": ODD, "device": ODD, "ladder": ODD, "reason": ODD, "running": False, "plan": ODD, "loading": None}
    report = {"line": ODD, "streams": True, "model": ODD, "models": [{**entry, "last_run": None}]}
    text = as_markdown({**report, "notices": [{"name": ODD, "text": ODD}]})
    assert text.splitlines() == [
        f"**{WRITTEN}**: {WRITTEN}",
        "",
        f"- **{WRITTEN}**: {WRITTEN} ({WRITTEN})",
        f"  - plan: {WRITTEN}",
        "  - no run has ended yet",
        f"- **{WRITTEN}**: {WRITTEN}",
    ]
