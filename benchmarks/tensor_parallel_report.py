"""Pure: from what tensor_parallel.py measured to steps, verdicts by the rules of docs/tensor-parallel.md, and tables.

[Note: a step of two GPUs]
Either way each GPU brings half of the bytes over its own link, and copies and compute overlap. The block split computes
one block after the other: its compute is that of one GPU, and an activation crosses once for each block where blocks
are taken in turn, for streaming, and once in all where they are not. Sharded blocks are timed with their collectives.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from cases import GB
from tensor_parallel_shapes import SHAPES, Shape

# Of the block split's step; two GPUs cannot do better than 0.5. Why 0.75: docs/tensor-parallel.md.
WORTH = 0.75
CONNECTIONS = {"direct": "GPU to GPU", "host": "through host memory"}
LAUNCHES = {"python": "from Python", "graphs": "CUDA graphs"}
WAYS = {"pairs": "sums cut", "columns": "no sum cut"}
COLUMNS = [(connection, way) for connection in CONNECTIONS for way in WAYS]
HEADS = [f"{WAYS[way]}, {CONNECTIONS[connection]}" for connection, way in COLUMNS]


class Step(NamedTuple):
    """A step's seconds (Note: a step of two GPUs)."""

    shape: str
    streams: bool
    launch: str
    split_s: float
    parallel_s: dict[tuple[str, str], float]

    def ratio(self, connection: str, way: str) -> float:
        return self.parallel_s[connection, way] / self.split_s


def steps(result: dict[str, Any]) -> list[Step]:
    """With nothing streamed and with everything. The block split is launched from Python, as it is."""
    found = []
    for shape in measured_shapes(result):
        for streams in (False, True):
            wire = shape.nbytes / 2 / result["alone"]["h2d_bytes_per_s"] if streams else 0.0
            split = max(split_seconds(result, shape, in_turn=streams), wire)
            for launch in LAUNCHES:
                compute = {column: compute_seconds(result, shape, column, launch) for column in COLUMNS}
                parallel = {column: max(took, wire) for column, took in compute.items() if took is not None}
                if parallel:
                    found.append(Step(shape.name, streams, launch, split, parallel))
    return found


def measured_shapes(result: dict[str, Any]) -> list[Shape]:
    """Models whose whole blocks were timed."""
    shapes = [shape.shrunk() if result["tiny"] else shape for shape in SHAPES]
    return [shape for shape in shapes if compute_seconds(result, shape, ("direct", "whole"), "python") is not None]


def compute_seconds(result: dict[str, Any], shape: Shape, column: tuple[str, str], launch: str) -> float | None:
    """Of all blocks of a model; None where one was not measured."""
    connection, way = column
    blocks = result.get(connection, {}).get(launch, {})
    names = {f"{shape.name} {kind}": count for kind, count in shape.blocks.items()}
    if not all(way in blocks.get(name, {}) for name in names):
        return None
    return sum(count * blocks[name][way]["s"] for name, count in names.items())


def split_seconds(result: dict[str, Any], shape: Shape, in_turn: bool) -> float:
    """The block split's compute with what crosses between GPUs."""
    crossings = {(each["rows"], each["width"]): each["copy_s"] for each in result["alone"]["exchanges"]}
    times = sum(shape.blocks.values()) if in_turn else 1
    compute = compute_seconds(result, shape, ("direct", "whole"), "python")
    return compute + times * crossings[shape.tokens, shape.hidden]


def identical(result: dict[str, Any], connection: str, way: str) -> bool:
    """Whether every block gave what the whole one gives, to the bit."""
    blocks = result.get(connection, {}).get("python", {}).values()
    return bool(blocks) and all(block[way]["differing"] == 0 for block in blocks if way in block)


def verdicts(result: dict[str, Any]) -> dict[tuple[str, str], str]:
    """What the rules say of each way on machines with each connection, launched as ComfyUI does, from Python."""
    known = [step for step in steps(result) if step.launch == "python"]
    found = {}
    for column in COLUMNS:
        ratios = [step.ratio(*column) for step in known if column in step.parallel_s]
        best = f"{min(ratios, default=0):.2f} of the block split's step at best"
        if not ratios:
            found[column] = "not measured"
        elif not identical(result, *column):
            found[column] = f"no: other bits ({best})"
        elif min(ratios) > WORTH:
            found[column] = f"no: the same bits, but {best}"
        else:
            found[column] = f"yes: the same bits, {best}"
    return found


# ------------------------------------------------------------------------------------------------------ tables


def tables(result: dict[str, Any]) -> str:
    facts = ", ".join(f"{name} {value}" for name, value in (result["machine"] | result["versions"]).items())
    wire = result["alone"]["h2d_bytes_per_s"] / GB
    parts = [f"Measured on: {facts}. H2D {wire:.1f} GB/s to each of two GPUs at once."]
    parts += [f"Failed, {name}: {text}" for name, text in result["errors"].items()]
    for head, make in (
        ("An activation between two GPUs, milliseconds (GB/s that each sends)", transfer_rows),
        ("A block, milliseconds, and the part of its output's elements that differ", block_rows),
        ("A step on two GPUs, seconds by the model (to the block split's)", step_rows),
        ("What the rules say", verdict_rows),
        ("Part of the elements that differ from the whole layer's when it is cut in two", linear_rows),
        ("Part of the elements that differ from the whole attention's", attention_rows),
    ):
        rows = make(result)
        if len(rows) > 1:
            parts.append(f"{head}:\n\n{markdown(rows)}")
    return "\n\n".join(parts)


def markdown(rows: list[list[str]]) -> str:
    head, *body = rows
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *body])


def transfer_rows(result: dict[str, Any]) -> list[list[str]]:
    """One row for each activation, one column for each way to move it."""
    table: dict[str, dict[str, str]] = {}
    for connection, said in CONNECTIONS.items():
        for each in result.get(connection, {}).get("collectives", []):
            sent = nbytes(each) / (2 if each["operation"] == "all-gather" else 1)
            table.setdefault(size(each), {})[f"{each['operation']}, {said}"] = rate(each["s"], sent)
    for each in result["alone"]["exchanges"]:
        row = table.setdefault(size(each), {})
        row["one process: a copy"] = rate(each["copy_s"], nbytes(each))
        row["one process: copies both ways and sums"] = rate(each["copy_and_add_s"], nbytes(each))
    exchanged = {each["what"]: each for each in result["alone"]["exchanges"]}
    for each in result["alone"].get("nccl", []):
        same = exchanged[each["what"]]
        table[size(same)]["one process: NCCL all-reduce"] = rate(each["s"], nbytes(same))
    heads = list(dict.fromkeys(head for row in table.values() for head in row))
    return [["activation", *heads], *([name, *(row.get(head, "") for head in heads)] for name, row in table.items())]


def nbytes(each: dict[str, Any]) -> int:
    return 2 * each["rows"] * each["width"]


def size(each: dict[str, Any]) -> str:
    return f"{each['what']}, {nbytes(each) / 1e6:.1f} MB"


def rate(seconds: float, sent: float) -> str:
    return f"{milliseconds(seconds)} ({sent / seconds / GB:.0f})"


def milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.3f}"


def block_rows(result: dict[str, Any]) -> list[list[str]]:
    rows = [["block", "launched", "whole", *HEADS, *(f"{way}: differ" for way in WAYS.values())]]
    for launch, launched in LAUNCHES.items():
        for name, block in result.get("direct", {}).get(launch, {}).items():
            of = {"direct": block, "host": result.get("host", {}).get(launch, {}).get(name, {})}
            times = [of[connection].get(way) for connection, way in COLUMNS]
            cells = [milliseconds(time["s"]) if time else "" for time in (block["whole"], *times)]
            rows.append([name, launched, *cells, *(part(block[way]) if way in block else "" for way in WAYS)])
    return rows


def part(counted: dict[str, Any]) -> str:
    return f"{counted['differing'] / counted['elements']:.2%}" if counted["differing"] else "none"


def step_rows(result: dict[str, Any]) -> list[list[str]]:
    rows = [["model", "streams", "launched", "block split", *HEADS]]
    for step in steps(result):
        what = [step.shape, "all" if step.streams else "nothing", LAUNCHES[step.launch], f"{step.split_s:.3f}"]
        known = [
            column in step.parallel_s and f"{step.parallel_s[column]:.3f} ({step.ratio(*column):.2f})"
            for column in COLUMNS
        ]
        rows.append([*what, *(cell or "" for cell in known)])
    return rows


def verdict_rows(result: dict[str, Any]) -> list[list[str]]:
    rows = [["how", "between GPUs", "implement"]]
    return rows + [[WAYS[way], CONNECTIONS[connection], text] for (connection, way), text in verdicts(result).items()]


def linear_rows(result: dict[str, Any]) -> list[list[str]]:
    rows = [["layer", "rows x inputs x outputs", "by columns", "by rows, summed", "by tokens", "not cut, again"]]
    for each in result["alone"].get("cut_linears", []):
        sizes = f"{each['rows']} x {each['inputs']} x {each['outputs']}"
        rows.append([each["name"], sizes, *parts(each, "columns", "rows", "tokens", "again")])
    return rows


def attention_rows(result: dict[str, Any]) -> list[list[str]]:
    rows = [["model", "by heads", "by queries", "not cut, again"]]
    for name, each in result["alone"].get("cut_attention", {}).items():
        rows.append([name, *parts(each, "heads", "queries", "again")])
    return rows


def parts(each: dict[str, Any], *ways: str) -> list[str]:
    counted = each["differing"]
    return [part(each | {"differing": counted[way]}) if way in counted else "" for way in ways]
