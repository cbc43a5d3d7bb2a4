"""The table of families in docs/families.md: written from what the tests find, and read to be compared with it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PATH = Path(__file__).resolve().parent.parent.parent / "docs" / "families.md"

HEADER = """# Model families

Every entry of ComfyUI's list of models (`comfy.supported_models.models`), under its name there. The table is what
`tests/nodes/test_families.py` finds; the test fails when it finds anything else, and
`python3 dev.py test tests/nodes/test_families.py --write-table` writes anew what the ComfyUI at hand has. A model that
is not here streams as others do, if it has a list of layers.

- **Since**: the first of the tested versions of ComfyUI, 0.30 and 0.33, that has it. An older one cannot test it.

- **Size**, **blocks**, **largest** and **in blocks** are those of a published model of the family in bf16, which
  ComfyUI's own classes build without memory for its weights. Only what is in blocks can stream; the rest stays on the
  device.
- **Identical**: a tiny version with random weights, 3 steps of ComfyUI's sampler with the family's own conditioning,
  streamed with the least memory that works, gives the same latents to the bit as without the pack, twice. The second
  time no kernel was given a streamed weight outside of its block's run, which on a GPU would be an error.

| Family | Since | Size | Blocks | Largest | In blocks | Identical |
|---|---|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Row:
    """A line of the table, as it is printed.

    Attributes:
        since: the first of the tested versions of the host that has it.
        cells: of a family that streams size, blocks, largest block and share of bytes in blocks; else empty.
        identical: "yes", or why it is not streamed.
    """

    since: str
    cells: tuple[str, str, str, str]
    identical: str

    @classmethod
    def unstreamed(cls, since: str, reason: str) -> Row:
        return cls(since, ("", "", "", ""), f"not streamed: {reason}")


def read() -> dict[str, Row]:
    return {name: Row(since, tuple(cells), identical) for name, since, *cells, identical in _lines()}


def names() -> list[str]:
    """As they are there, each as often as it is there."""
    return [name for name, *_ in _lines()]


def _lines() -> Iterator[list[str]]:
    for line in PATH.read_text(encoding="utf-8").splitlines() if PATH.exists() else ():
        name, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| ") and name != "Family":
            yield [name, *cells]


def in_order(host: list[str], committed: list[str]) -> list[str]:
    """``committed`` names, and those that only the host has, each in front of the one that follows it there."""
    order = list(committed)
    for name, follower in reversed(list(zip(host, [*host[1:], None], strict=True))):
        if name not in order:
            order.insert(order.index(follower) if follower is not None else len(order), name)
    return order


def write(rows: dict[str, Row], order: list[str]) -> None:
    """Write the rows in the given order; those of other names are dropped."""
    found = [(name, rows[name]) for name in order if name in rows]
    lines = [f"| {' | '.join((name, row.since, *row.cells, row.identical))} |\n" for name, row in found]
    PATH.write_text(HEADER + "".join(lines), encoding="utf-8")
