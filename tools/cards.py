"""What a card that we do not have would gain: our own planner, asked with the card's data.

    python tools/cards.py

makes the tables of docs/cards.md anew, and what README.md has of them. The planner is the one that runs
(``streaming/planning``), and it is asked about models as the pack cuts them (shapes.py). What it would measure on a
card is put in by hand: compute is the H200's, in proportion to what both can do at most, and the bus carries a share
of what its link can. The document says so. A test holds the same calculation with the H200's bus and VRAM to what was
measured there.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

TOOLS = Path(__file__).absolute().parent
ROOT = TOOLS.parent
# Said here because embedded interpreters do not put a script's folder on the path. The pack's comes last: it has a
# package of the same name as a module of ComfyUI's (nodes).
sys.path.insert(0, str(TOOLS))
sys.path.append(str(ROOT))

from shapes import Shape, load_shape  # noqa: E402

from streaming import Plan, StreamingConfig  # noqa: E402
from streaming.estimating.cards import CARDS, H200_TFLOPS, Card  # noqa: E402
from streaming.estimating.estimate import pinnable_bytes  # noqa: E402
from streaming.planning.packing import Packing, Refusals  # noqa: E402
from streaming.planning.plan import FORECAST_TOLERANCE, forecast_seconds  # noqa: E402
from streaming.planning.planner import Planner  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
DOCUMENT, README = ROOT / "docs" / "cards.md", ROOT / "README.md"

GIB = 1024**3
H200_MEMORY = 4800e9
# Bytes of weights a second that the H200 unpacks beside copies (docs/packing.md).
H200_UNPACKS = {"bfloat16": 1810e9, "float16": 1590e9}

SYSTEMS = {"Linux": "posix", "Windows": "nt"}
# Of what the disk reads with eight threads, weights from a file come at this part (`ram-50` in benchmarks/README.md).
DISK_SHARE = 0.83
DISKS = (3e9, 7e9)
RAM_GIB = (16, 32, 64)
RAM_CARDS = ("RTX 4060", "RTX 4070")
# What README.md has of it.
FRONT_CARDS = ("RTX 4060", "RTX 4070", "RTX 5080", "RTX 4090")
FRONT_MODELS = ("FLUX.1-dev, bf16", "Qwen-Image, bf16", "Wan 2.1 14B, bf16")
FRONT_RAM_CARD, FRONT_RAM_GIB, FRONT_DISK = "RTX 4060", (16, 32), 3e9
# Of the estimated compute: next to nothing.
NO_COMPUTE = 1e-4


class Model(NamedTuple):
    """A model and a size of its picture.

    Attributes:
        name, size: for people.
        outline: its name in shapes.json.
        cases: results of benchmarks/ from which its compute and the VRAM for activations are.
        dtype: in which weights stream packed; empty where they do not.
        packed_in: the case that shows how small they are then.
        casts: whether a layer's weights are cast when it runs, into memory for that.
    """

    name: str
    size: str
    outline: str
    cases: tuple[str, ...]
    dtype: str = "bfloat16"
    packed_in: str = "flux-1024-streamed"
    casts: bool = False

    @property
    def shape(self) -> Shape:
        return load_shape(self.outline)


FLUX_CASES = ("flux-1024-8gb", "flux-1024-12gb", "flux-1024-16gb")
MODELS = (
    Model("FLUX.1-dev, bf16", "1024 x 1024", "flux", FLUX_CASES),
    Model("FLUX.1-dev, fp8", "1024 x 1024", "flux-fp8", FLUX_CASES, dtype="", casts=True),
    Model("Qwen-Image, bf16", "1328 x 1328", "qwen-image", ("qwen-1328-12gb", "qwen-1328-24gb")),
    Model("Wan 2.1 14B, bf16", "832 x 480, 33 frames", "wan", ("wan-480p-8gb",)),
    Model("SD3.5-large, fp16", "1024 x 1024", "sd35", ("sd35-1024-8gb",), "float16", "sd35-1024-8gb"),
)


# --- what was measured on the H200 -----------------------------------------------------------------------------------


@cache
def result(case: str) -> Any:
    return json.loads((RESULTS / f"{case}.json").read_text("utf-8"))


def ours(case: str) -> Any:
    return result(case)["runs"]["weightstream"]


def resident_seconds(model: Model) -> float:
    """A step with everything in the VRAM of the H200."""
    return statistics.median(result(case)["resident_step_s"] for case in model.cases)


def reserved_bytes(model: Model) -> float:
    """VRAM that is not for weights: what a step takes besides, kernels and all, and what stays free."""
    takes = (ours(case)["peak_bytes"]["device"] - ours(case)["status"]["device_bytes"] for case in model.cases)
    cast = 2 * max(model.shape.outline.unit_bytes) if model.casts else 0
    return statistics.median(takes) + cast + StreamingConfig.headroom_bytes


def packing_of(model: Model, memory: float) -> Packing | None:
    """What packing saves, and costs a device whose memory carries so many bytes a second."""
    if not model.dtype:
        return None
    status = ours(model.packed_in)["status"]
    share = status["streamed_block_bytes"] / status["streamed_weight_bytes"]
    sizes = tuple(round(nbytes * share) for nbytes in model.shape.outline.unit_bytes)
    return Packing(sizes, H200_UNPACKS[model.dtype] * memory / H200_MEMORY)


# --- plans ------------------------------------------------------------------------------------------------------------


def plan_of(
    model: Model, compute: float, bandwidth: float, free: float, memory: float, staged: frozenset[int] = frozenset()
) -> Plan:
    """The planner's plan for ``free`` bytes of VRAM; ``staged``: units for which no RAM can be page-locked."""
    planner = Planner(model.shape.outline, StreamingConfig())
    planner.profile = model.shape.profile(compute, bandwidth)
    planner.packing = packing_of(model, memory)
    planner.refusals = Refusals(without_room=staged)
    return planner.plan_for(free - reserved_bytes(model))


def on_h200(model: Model, case: str) -> Plan:
    """The plan for the H200 in this case, with the bus and the free VRAM that it had there."""
    bandwidth, free = result(case)["h2d_bytes_per_s"], ours(case)["free_bytes_before"]
    return plan_of(model, resident_seconds(model), bandwidth, free, H200_MEMORY)


@cache
def on_card(card: Card, model: Model, compute_share: float = 1.0) -> Plan:
    """The plan for a card whose compute takes this part of what was estimated."""
    compute = card.compute_seconds(resident_seconds(model)) * compute_share
    return plan_of(model, compute, card.bandwidth, card.free_bytes, card.memory_gb_s * 1e9)


@cache
def bus_share(card: Card, model: Model) -> float:
    """The part of the estimated compute below which the bus limits a step: what a step takes without any compute."""
    return seconds_of(on_card(card, model, NO_COMPUTE)) / card.compute_seconds(resident_seconds(model))


class InRam(NamedTuple):
    """A step on a machine with so much RAM: bytes that are page-locked, and those that the disk reads."""

    pinned: float
    from_disk: float
    seconds: float


def with_ram(card: Card, model: Model, limit: float, disk: float) -> InRam:
    """The step if at most ``limit`` bytes are page-locked, and the others come from a disk of ``disk`` bytes a second.

    What comes from the disk is never packed. Where a step waits for it, the planner is asked again: it knows then how
    slowly weights arrive.
    """
    plan, compute = on_card(card, model), card.compute_seconds(resident_seconds(model))
    step, staged, arrive = in_ram(plan, card, model, limit, disk)
    if staged and step.seconds > compute * (1 + FORECAST_TOLERANCE):
        plan = plan_of(model, compute, arrive, card.free_bytes, card.memory_gb_s * 1e9, staged)
        step, staged, arrive = in_ram(plan, card, model, limit, disk)
    return step


def in_ram(plan: Plan, card: Card, model: Model, limit: float, disk: float) -> tuple[InRam, frozenset[int], float]:
    """The step with this plan, the units that come from the disk, and with how many bytes a second all arrive."""
    left, staged = limit, set()
    for unit in (unit for segment in plan.segments for unit in segment.units):
        nbytes = plan.outline.bytes_in_slot(unit)
        if nbytes <= left:
            left -= nbytes
        else:
            staged.add(unit)
    read = sum(plan.outline.unit_bytes[unit] for unit in staged)
    pinned = plan.streamed_bytes - sum(plan.outline.bytes_in_slot(unit) for unit in staged)
    arrive = plan.streamed_bytes / max((pinned + read) / card.bandwidth, read / (disk * DISK_SHARE), 1e-9)
    profile = model.shape.profile(card.compute_seconds(resident_seconds(model)), arrive)
    return InRam(pinned, read, forecast_seconds(plan, profile)), frozenset(staged), arrive


def seconds_of(plan: Plan) -> float:
    assert plan.forecast is not None
    return plan.forecast.seconds


# --- the document -----------------------------------------------------------------------------------------------------

CARD_HEAD = ("card", "VRAM, GiB", "PCIe")
MEASURED = tuple((model, case) for model in MODELS if not model.casts for case in model.cases)


def filled(document: Path) -> str:
    """The document with each table made anew, between the two comments with its name."""
    text = document.read_text("utf-8")
    for name, make in tables()[document].items():
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
        before, rest = text.split(begin)
        text = f"{before}{begin}{make()}{end}{rest.split(end)[1]}"
    return text


def tables() -> dict[Path, dict[str, Callable[[], str]]]:
    return {
        DOCUMENT: {"summary": summary, "models": by_model, "ram": by_ram, "measured": measured, "cards": data},
        README: {"cards": front_cards, "ram": front_ram},
    }


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def summary() -> str:
    def cell(card: Card, model: Model) -> str:
        plan = on_card(card, model)
        assert plan.forecast is not None
        if not plan.segments:
            return f"{plan.forecast.seconds:.3g} (fits)"
        taken, whole = f"{plan.forecast.seconds:.3g}", f"{plan.forecast.compute_seconds:.3g}"
        return taken if taken == whole else f"{taken} of {whole}"

    head = [*CARD_HEAD, *(f"{model.name}<br>{model.size}" for model in MODELS)]
    return table(head, ([*card_cells(card), *(cell(card, model) for model in MODELS)] for card in CARDS))


def card_cells(card: Card) -> list[str]:
    return [card.name, str(card.vram_gib), f"{card.generation} x{card.lanes}"]


def by_model() -> str:
    return "\n".join(map(of_model, MODELS))


def of_model(model: Model) -> str:
    def row(card: Card) -> list[str]:
        plan = on_card(card, model)
        assert plan.forecast is not None
        seconds = [f"{plan.forecast.compute_seconds:.3g}", f"{plan.forecast.seconds:.3g}"]
        if not plan.segments:
            return [*card_cells(card), *seconds, "fits", "", "0"]
        share = f"{bus_share(card, model):.2f}"
        return [*card_cells(card), *seconds, plan.forecast.limited_by, share, f"{plan.streamed_bytes / GIB:.1f}"]

    head = [*CARD_HEAD, "all in VRAM, s", "streamed, s", "limit", "bus limits below", "GiB a step"]
    size = f"{model.shape.outline.model_bytes / GIB:.1f} GiB"
    return f"### {model.name}: {size}, {model.size}\n\n" + table(head, map(row, CARDS))


def measured() -> str:
    def row(model: Model, case: str) -> list[str]:
        step, forecast = ours(case)["step_s"], seconds_of(on_h200(model, case))
        free, whole = ours(case)["free_bytes_before"] / GIB, resident_seconds(model)
        peak = model.shape.operations / whole / H200_TFLOPS / 1e12
        seconds = [f"{whole:.3f}", f"{step:.3f}", f"{forecast:.3f}", f"{100 * abs(forecast / step - 1):.1f} %"]
        return [model.name, f"{100 * peak:.0f} %", f"{free:.1f}", *seconds]

    head = ["model", "of the peak", "free VRAM, GiB", "all in VRAM, s", "measured, s", "calculated, s", "off by"]
    return table(head, (row(*case) for case in MEASURED))


def by_ram() -> str:
    return "\n".join(ram_of(card) for card in CARDS if card.name in RAM_CARDS)


def ram_of(card: Card) -> str:
    def cell(model: Model, system: str, ram: int) -> str:
        limit = pinnable_bytes(ram * GIB, SYSTEMS[system])
        steps = [with_ram(card, model, limit, disk) for disk in DISKS]
        if not any(step.from_disk for step in steps):
            return f"{steps[0].pinned / GIB:.1f}"
        read = " or ".join(dict.fromkeys(f"{step.from_disk / GIB:.1f}" for step in steps))
        seconds = (f"{step.from_disk / (disk * DISK_SHARE):.1f}" for step, disk in zip(steps, DISKS, strict=True))
        return f"{steps[0].pinned / GIB:.1f} + {read}: {' or '.join(dict.fromkeys(seconds))} s"

    def row(model: Model, system: str) -> list[str]:
        compute = f"{card.compute_seconds(resident_seconds(model)):.3g}"
        return [model.name, compute, system, *(cell(model, system, ram) for ram in RAM_GIB)]

    head = ["model", "computes, s", "system", *(f"{ram} GiB of RAM" for ram in RAM_GIB)]
    rows = (row(model, system) for model in MODELS for system in SYSTEMS)
    return f"### {card.name}, {card.vram_gib} GiB, PCIe {card.generation} x{card.lanes}\n\n" + table(head, rows)


def one_after_the_other(card: Card, model: Model) -> float:
    """A step that computes nothing while it copies what does not fit, unpacked."""
    return card.compute_seconds(resident_seconds(model)) + on_card(card, model).streamed_weight_bytes / card.bandwidth


def front_models() -> list[Model]:
    return [model for model in MODELS if model.name in FRONT_MODELS]


def front_cards() -> str:
    """A step, in ComfyUI at worst, and what is page-locked, where there is RAM enough."""

    def cell(card: Card, model: Model) -> str:
        plan = on_card(card, model)
        ours, theirs = (f"{seconds:.2g} s" for seconds in (seconds_of(plan), one_after_the_other(card, model)))
        return f"{ours}, {theirs}, {plan.streamed_bytes / GIB:.0f} GiB"

    def row(card: Card) -> list[str]:
        link = f"{card.name}, {card.vram_gib} GB, PCIe {card.generation} x{card.lanes}"
        return [link, *(cell(card, model) for model in front_models())]

    head = ["card", *(model.name.replace(",", "") for model in front_models())]
    return table(head, (row(card) for card in CARDS if card.name in FRONT_CARDS))


def front_ram() -> str:
    """What is page-locked and what is read in each step; the step, where reading makes it longer."""
    card = next(card for card in CARDS if card.name == FRONT_RAM_CARD)

    def cell(model: Model, system: str, ram: int) -> str:
        step = with_ram(card, model, pinnable_bytes(ram * GIB, SYSTEMS[system]), FRONT_DISK)
        read = f" + {step.from_disk / GIB:.1f}" if step.from_disk else ""
        longer = step.seconds > seconds_of(on_card(card, model)) * (1 + FORECAST_TOLERANCE)
        return f"{step.pinned / GIB:.1f}{read}" + (f": {step.seconds:.2g} s" if longer else "")

    places = [(ram, system) for ram in FRONT_RAM_GIB for system in SYSTEMS]
    head = [f"{card.name}, {card.vram_gib} GB", *(f"{ram} GiB, {system}" for ram, system in places)]
    rows = (
        [model.name.replace(",", ""), *(cell(model, system, ram) for ram, system in places)] for model in front_models()
    )
    return table(head, rows)


def data() -> str:
    rows = (
        [
            *card_cells(card),
            f"{card.sms} x {card.boost_mhz} MHz",
            f"{card.tflops:.1f}",
            str(card.memory_gb_s),
            f"{card.bandwidth / 1e9:.1f}",
        ]
        for card in CARDS
    )
    head = [*CARD_HEAD, "SMs x boost", "bf16, TFLOPS", "memory, GB/s", "bus as taken, GB/s"]
    return table(head, rows)


if __name__ == "__main__":
    for path in tables():
        path.write_text(filled(path), "utf-8", newline="\n")
