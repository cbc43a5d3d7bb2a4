"""What benchmarks/tensor_parallel.py makes of its figures; and its sharded blocks compute what whole ones do."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
MODULES = ("cases", "tensor_parallel_shapes", "tensor_parallel_report")


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The scripts' modules, which find each other in their folder."""
    monkeypatch.syspath_prepend(str(FOLDER))
    _, shapes, report = map(importlib.import_module, MODULES)
    yield SimpleNamespace(shapes=shapes, report=report)
    for name in MODULES:
        del sys.modules[name]


def measured(benchmark: SimpleNamespace, whole: float, sharded: float, differing: int = 0) -> dict:
    """A result in which every block takes ``whole`` seconds on one GPU, and ``sharded`` on two."""
    names = [f"{shape.name} {kind}" for shape in benchmark.shapes.SHAPES for kind in shape.blocks]
    half = {"s": sharded, "differing": differing, "elements": 100}
    blocks = {name: {"whole": {"s": whole}, "pairs": half, "columns": half} for name in names}
    exchanges = [
        {"what": what, "rows": rows, "width": width, "copy_s": 1e-4, "copy_and_add_s": 2e-4}
        for what, rows, width in benchmark.shapes.activations(list(benchmark.shapes.SHAPES))
    ]
    collectives = [
        {"what": each["what"], "rows": each["rows"], "width": each["width"], "operation": operation, "s": 3e-4}
        for each in exchanges
        for operation in ("all-reduce", "all-gather")
    ]
    return {
        "tiny": False,
        "machine": {"GPUs": 2},
        "versions": {},
        "errors": {},
        "direct": {"collectives": collectives, "python": blocks},
        "host": {},
        "alone": {
            "h2d_bytes_per_s": 50e9,
            "exchanges": exchanges,
            "nccl": [{"what": each["what"], "s": 1e-4} for each in exchanges],
        },
    }


def test_blocks_have_the_sizes_of_the_models(benchmark: SimpleNamespace) -> None:
    flux, _, qwen = benchmark.shapes.SHAPES
    assert round(flux.block_bytes("double") / 1e6) == 680
    assert round(flux.block_bytes("single") / 1e6) == 283
    assert qwen.blocks == {"double": 60}
    assert round(qwen.nbytes / 1e9, 1) == 40.8


def test_the_block_split_computes_as_one_gpu_and_streams_as_two(benchmark: SimpleNamespace) -> None:
    found = {(step.shape, step.streams): step for step in benchmark.report.steps(measured(benchmark, 3e-3, 2e-3))}
    resident, streamed = found["flux-1024", False], found["flux-1024", True]
    assert resident.split_s == pytest.approx(57 * 3e-3 + 1e-4)
    assert resident.ratio("direct", "pairs") == pytest.approx(57 * 2e-3 / resident.split_s)
    wire = benchmark.shapes.SHAPES[0].nbytes / 2 / 50e9
    assert streamed.split_s == streamed.parallel_s["direct", "columns"] == pytest.approx(wire)


def test_a_step_limited_by_compute_counts_each_crossing(benchmark: SimpleNamespace) -> None:
    found = {(step.shape, step.streams): step for step in benchmark.report.steps(measured(benchmark, 9e-3, 5e-3))}
    assert found["flux-2048", True].split_s == pytest.approx(57 * (9e-3 + 1e-4))


@pytest.mark.parametrize(
    ("sharded", "differing", "verdict"),
    [
        (1.6e-3, 0, "yes: the same bits, 0.53"),
        (1.6e-3, 1, "no: other bits (0.53"),
        (2.9e-3, 0, "no: the same bits, but 0.97"),
    ],
)
def test_the_rules_ask_for_the_bits_and_for_the_gain(
    benchmark: SimpleNamespace, sharded: float, differing: int, verdict: str
) -> None:
    found = benchmark.report.verdicts(measured(benchmark, 3e-3, sharded, differing))
    assert found["direct", "columns"].startswith(verdict)
    assert found["host", "columns"] == "not measured"


def test_a_round_that_failed_leaves_gaps_in_the_tables(benchmark: SimpleNamespace) -> None:
    text = benchmark.report.tables(measured(benchmark, 3e-3, 2e-3) | {"errors": {"host": "stopped after 75 s"}})
    assert "Failed, host: stopped after 75 s" in text
    assert "| flux-1024 | nothing | from Python | 0.171 | 0.114 (0.67) | 0.114 (0.67) |  |  |" in text


def test_a_row_of_transfers_has_every_way_to_move_one_activation(benchmark: SimpleNamespace) -> None:
    head, *rows = benchmark.report.transfer_rows(measured(benchmark, 3e-3, 2e-3))
    assert len(rows) == 8
    found = dict(zip(head, rows[0], strict=True))
    assert found["activation"] == "flux-1024, all tokens, 28.3 MB"
    assert found["all-reduce, GPU to GPU"] == "0.300 (94)"
    assert found["all-gather, GPU to GPU"] == "0.300 (47)"
    assert found["one process: NCCL all-reduce"] == "0.100 (283)"


def test_the_page_shows_what_was_measured(benchmark: SimpleNamespace) -> None:
    result = json.loads((FOLDER / "results" / "tensor-parallel.json").read_text())
    page = (FOLDER.parent / "docs" / "tensor-parallel.md").read_text()
    report = benchmark.report
    for make in (report.transfer_rows, report.block_rows, report.step_rows, report.verdict_rows):
        assert report.markdown(make(result)) in page, make.__name__
    assert report.tables(result).count("| modulation | 1 x 3072 x 9216 | 0.12% |") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="torch has NCCL on Linux alone, which is what the script measures")
def test_the_script_runs_without_gpus(tmp_path: Path) -> None:
    command = [sys.executable, str(FOLDER / "tensor_parallel.py"), "--tiny", "--timeout", "240", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "tensor-parallel.json").read_text())
    assert "What the rules say" in done.stdout
    for block in result["direct"]["python"].values():
        for way in ("pairs", "columns"):
            assert block[way]["largest"] <= 0.02 * block[way]["largest_value"], (way, block)
    assert len(result["alone"]["cut_linears"]) == 12
