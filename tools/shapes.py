"""Models in numbers, as a plan sees them: what is cut of each, and where in a step its parts compute.

    COMFYUI_PATH=/path/to/ComfyUI python tools/shapes.py [FILE]

writes ``tools/shapes.json`` anew, or another file: ComfyUI builds each model on the meta device, where nothing is
stored or computed, the pack cuts it, and one forward shows in which order its units run and counts their operations. A
test compares the file with what this makes.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

TOOLS = Path(__file__).absolute().parent
# Said here because embedded interpreters do not put a script's folder on the path. The pack's comes last: it has a
# package of the same name as a module of ComfyUI's (nodes).
sys.path.insert(0, str(TOOLS))
sys.path.append(str(TOOLS.parent))

from checkpoints import (  # noqa: E402
    FLUX_SIZES,
    SD35_SIZES,
    WAN_SIZES,
    TensorSpec,
    flux_tensors,
    qwen_image_tensors,
    sd35_tensors,
    wan_tensors,
)

from streaming import Outline, Profile, cut_model  # noqa: E402
from streaming.planning.profile import UnitTime  # noqa: E402

if TYPE_CHECKING:
    from streaming import BlockSet

FILE = TOOLS / "shapes.json"


class Shape(NamedTuple):
    """A model in a step.

    Attributes:
        outline: what is cut of it.
        runs: for each block its units, in the order in which they run.
        hold: of each unit, operations while it runs.
        work: of each unit, operations until the next one begins, or the block ends.
        operations: of the whole step: floating-point, as matrix products and attention count them.
    """

    outline: Outline
    runs: tuple[tuple[int, ...], ...]
    hold: tuple[float, ...]
    work: tuple[float, ...]
    operations: float

    def profile(self, compute: float, bandwidth: float) -> Profile:
        """What would be measured if each operation took as long as any other, ``compute`` seconds in all."""
        one = compute / self.operations
        blocks = tuple(sum(self.work[unit] for unit in units) * one for units in self.outline.block_units)
        runs = tuple(tuple((unit, 1) for unit in units) for units in self.runs)
        times = tuple(UnitTime(hold * one, work * one) for hold, work in zip(self.hold, self.work, strict=True))
        order = tuple(range(self.outline.blocks))
        return Profile(blocks, compute - sum(blocks), bandwidth, runs, times, order, measured=True)


@cache
def load_shape(name: str) -> Shape:
    """The shape of this name in shapes.json."""
    return unfold(json.loads(FILE.read_text("utf-8"))[name])


# The file has each kind of block once: its units in the order in which they run, each as its place in the order of
# definition, its bytes, and its operations while it runs and until the next one; and how often kinds follow each other.


def unfold(folded: Any) -> Shape:
    kinds = [kind for kind, count in folded["blocks"] for _ in range(count)]
    units: list[list[Any]] = []
    unit_block: list[int] = []
    runs: list[tuple[int, ...]] = []
    for block, kind in enumerate(kinds):
        members = folded["kinds"][kind]
        runs.append(tuple(len(units) + place for place, *_ in members))
        units += [numbers for _, *numbers in sorted(members)]
        unit_block += [block] * len(members)
    nbytes, hold, work = zip(*units, strict=True)
    outline = Outline(nbytes, tuple(unit_block), tuple(kinds), folded["rest"])
    return Shape(outline, tuple(runs), hold, work, folded["operations"])


def fold(cut: BlockSet, marks: dict[str, list[float]], operations: float) -> dict[str, Any]:
    """What the file has of a model: ``marks`` are the operations that were counted when a unit had begun and ended, and
    when a block had ended."""
    kinds: dict[int, list[list[float]]] = {}
    blocks: list[list[int]] = []
    for block, kind in zip(cut.blocks, cut.outline.block_kind, strict=True):
        if blocks and blocks[-1][0] == kind:
            blocks[-1][1] += 1
            continue
        blocks.append([kind, 1])
        order = sorted(block.units, key=lambda unit: (marks[unit.name][0], marks[unit.name][-1]))
        ends = [*(marks[unit.name][0] for unit in order[1:]), marks[block.name][0]]
        kinds[kind] = [
            [block.units.index(unit), unit.nbytes, marks[unit.name][1] - marks[unit.name][0], end - marks[unit.name][0]]
            for unit, end in zip(order, ends, strict=True)
        ]
    return {
        "rest": cut.rest.nbytes,
        "operations": operations,
        "blocks": blocks,
        "kinds": [kinds[kind] for kind in sorted(kinds)],
    }


# --- with ComfyUI -----------------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """A file, and the inputs of a step.

    Attributes:
        tensors: of the file, in ``dtype``.
        latent: with 16 channels.
        context: tokens and width; pooled: width, 0 where the model takes none.
    """

    tensors: Sequence[TensorSpec]
    dtype: torch.dtype
    latent: tuple[int, ...]
    context: tuple[int, int]
    pooled: int = 0


def steps() -> dict[str, Step]:
    """As benchmarks/cases.py has them."""
    flux, square = flux_tensors(FLUX_SIZES["dev"]), (1, 16, 128, 128)
    wan, sd35 = wan_tensors(WAN_SIZES["14b"]), sd35_tensors(SD35_SIZES["large"])
    return {
        "flux": Step(flux, torch.bfloat16, square, (512, 4096), 768),
        "flux-fp8": Step(flux, torch.float8_e4m3fn, square, (512, 4096), 768),
        "qwen-image": Step(qwen_image_tensors(60), torch.bfloat16, (1, 16, 1, 166, 166), (128, 3584)),
        "wan": Step(wan, torch.bfloat16, (1, 16, 9, 60, 104), (512, 4096)),
        "sd35": Step(sd35, torch.float16, square, (154, 4096), 2048),
    }


def cut_and_count(step: Step) -> dict[str, Any]:
    """Build the model, cut it, and count the operations of a step."""
    import comfy.model_detection

    runs_in = torch.bfloat16 if step.dtype.itemsize == 1 else step.dtype
    with torch.inference_mode(), torch.device("meta"):
        weights = {spec.name: torch.empty(spec.shape, dtype=step.dtype) for spec in step.tensors}
        config = comfy.model_detection.model_config_from_unet(weights, "")
        config.set_inference_dtype(step.dtype, None if runs_in is step.dtype else runs_in)
        model = config.get_model(weights, "", device="meta")
        inputs = {"context": torch.empty(1, *step.context, dtype=runs_in)}
        if step.pooled:
            inputs["y"] = torch.empty(1, step.pooled, dtype=runs_in)
        if "guidance_in.in_layer.weight" in weights:
            inputs["guidance"] = torch.empty(1, dtype=runs_in)
        cut = cut_model(model)
        with FlopCounterMode(display=False) as counter:
            marks = mark_modules(cut, counter.get_total_flops)
            model.diffusion_model(torch.empty(step.latent, dtype=runs_in), torch.empty(1, dtype=runs_in), **inputs)
    return fold(cut, marks, counter.get_total_flops())


def mark_modules(cut: BlockSet, count: Callable[[], float]) -> dict[str, list[float]]:
    """Note from now on what ``count`` says when units begin and end, and blocks end; in the order in which they run."""
    marks: dict[str, list[float]] = {}

    def mark(name: str) -> Callable[..., None]:
        return lambda *_: marks.setdefault(name, []).append(count())

    for block in cut.blocks:
        block.module.register_forward_hook(mark(block.name))
        for unit in block.units:
            assert unit.module is not None, unit.name
            unit.module.register_forward_pre_hook(mark(unit.name))
            unit.module.register_forward_hook(mark(unit.name))
    return marks


def as_text(shapes: dict[str, Any]) -> str:
    """JSON with a line for each kind of block."""
    models = []
    for name, shape in shapes.items():
        kinds = ",\n   ".join(json.dumps(kind) for kind in shape["kinds"])
        numbers = "".join(f'  "{key}": {json.dumps(value)},\n' for key, value in shape.items() if key != "kinds")
        models.append(f' "{name}": {{\n{numbers}  "kinds": [\n   {kinds}\n  ]\n }}')
    return "{\n" + ",\n".join(models) + "\n}\n"


def main(file: Path) -> None:
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    # Attention is counted as one operation of torch.
    sys.argv[1:] = ["--cpu", "--use-pytorch-cross-attention"]
    import comfy.options

    comfy.options.enable_args_parsing()
    file.write_text(as_text({name: cut_and_count(step) for name, step in steps().items()}), "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else FILE)
