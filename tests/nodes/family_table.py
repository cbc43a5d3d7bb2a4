"""The table of families in docs/families.md: written from what the tests find, and read to be compared with it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

PATH = Path(__file__).resolve().parent.parent.parent / "docs" / "families.md"

HEADER = """# Model families

Every entry of ComfyUI 0.30's list of models (`comfy.supported_models.models`), under its name there. The table is what
`tests/nodes/test_families.py` finds; the test fails when it finds anything else, and
`python3 dev.py test tests/nodes/test_families.py --write-table` writes the table anew.

- **Size**, **blocks**, **largest** and **in blocks** are those of a published model of the family in bf16, which
  ComfyUI's own classes build without memory for its weights. Only what is in blocks can stream; the rest stays on the
  device.
- **Identical**: a tiny version with random weights, 3 steps of ComfyUI's sampler with the family's own conditioning,
  streamed with the least memory that works, gives the same latents to the bit as without the pack, twice. The second
  time no kernel was given a streamed weight outside of its block's run, which on a GPU would be an error.

| Family | Size | Blocks | Largest | In blocks | Identical |
|---|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Row:
    """A line of the table, as it is printed.

    Attributes:
        cells: of a family that streams size, blocks, largest block and share of bytes in blocks; else empty.
        identical: "yes", or why it is not streamed.
    """

    cells: tuple[str, str, str, str]
    identical: str

    @classmethod
    def unstreamed(cls, reason: str) -> Row:
        return cls(("", "", "", ""), f"not streamed: {reason}")


def read() -> dict[str, Row]:
    rows = {}
    for line in PATH.read_text(encoding="utf-8").splitlines() if PATH.exists() else ():
        name, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| ") and name != "Family":
            rows[name] = Row(tuple(cells[:4]), cells[4])
    return rows


def write(rows: dict[str, Row], order: list[str]) -> None:
    """Write the rows in the given order; those of other names are dropped."""
    lines = [f"| {' | '.join((name, *rows[name].cells, rows[name].identical))} |\n" for name in order if name in rows]
    PATH.write_text(HEADER + "".join(lines), encoding="utf-8")
