"""Weights of classes of their own: taken apart, laid out, read from files, patched, and put together again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import Stored, Transformer, X, budgets, make_streamer, make_transformer
from reads import Reads
from torch import nn
from torch.utils._pytree import tree_map
from weightstream.streaming import Streamer, UnsupportedModelError
from weightstream.streaming.devices.copies import ALIGNMENT
from weightstream.streaming.model.forms import take_apart
from weightstream.streaming.model.layout import Layout, NamedTensor, Place, make_layout

pytestmark = pytest.mark.usefixtures("watched")

NAME = "blocks.2.qkv.weight"


class Scaled(torch.Tensor):
    """Values times a scale; it wraps both, and is used as their product."""

    @staticmethod
    def __new__(cls, values: torch.Tensor, scale: torch.Tensor, unit: str) -> Scaled:
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=torch.float32, device=values.device)

    def __init__(self, values: torch.Tensor, scale: torch.Tensor, unit: str) -> None:
        self.values_, self.scale, self.unit = values, scale, unit

    def product(self) -> torch.Tensor:
        values = self.values_.product() if isinstance(self.values_, Scaled) else self.values_
        return values.float() * self.scale

    def __tensor_flatten__(self) -> tuple[list[str], str]:
        return ["values_", "scale"], self.unit

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], context: str, size: Any, stride: Any) -> Scaled:
        return Scaled(inner["values_"], inner["scale"], context)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            # As quantised tensors do: what it wraps besides the values is a copy from then on.
            return Scaled(args[0].values_.detach(), args[0].scale.clone(), args[0].unit)
        plain = tree_map(lambda item: item.product() if isinstance(item, Scaled) else item, (args, kwargs or {}))
        return func(*plain[0], **plain[1])


class Tagged(torch.Tensor):
    """Memory, and an attribute by which it is used; its shape is another than that of its memory."""

    tag: float

    @property
    def shape(self) -> torch.Size:
        return torch.Size((7, 7, 7))

    def detach(self) -> Tagged:
        return self


def tagged(values: torch.Tensor, tag: float) -> Tagged:
    result = values.as_subclass(Tagged)
    result.tag = tag
    return result


class TaggedLinear(nn.Linear):
    """Multiplies by the tag, as a layer that knows the class of its weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert type(self.weight) is Tagged
        return nn.functional.linear(x, self.weight.as_subclass(torch.Tensor) * self.weight.tag, self.bias)


def parameter(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def wrap(model: Transformer) -> None:
    """Every block has a wrapper, and a wrapper of a wrapper."""
    for block in model.blocks:
        block.qkv.weight = parameter(Scaled(block.qkv.weight.data, torch.tensor([0.5]), "half"))
        inner = Scaled(block.out.weight.data.to(torch.bfloat16), torch.tensor(3.0), "inner")
        block.out.weight = parameter(Scaled(inner, torch.full((32, 1), 0.25), "outer"))


def tag(model: Transformer) -> None:
    """Every block has a parameter with an attribute, and a bare tensor with one."""
    for index, block in enumerate(model.blocks):
        for name, bare in (("qkv", False), ("out", True)):
            layer = getattr(block, name)
            layer.__class__ = TaggedLinear
            weight = tagged(layer.weight.data, 1.5 + index)
            layer._parameters["weight"] = weight if bare else parameter(weight)


KINDS = {"wrapped": wrap, "tagged": tag}


def layout_of(**tensors: torch.Tensor) -> tuple[Layout, dict[str, Any]]:
    holder: dict[str, Any] = dict(tensors)
    named = (NamedTensor((key,), tensor, torch.float64, (Place(holder, key, True),)) for key, tensor in holder.items())
    return make_layout(list(named)), holder


def test_parts_lie_aligned_one_behind_another_and_are_not_cast() -> None:
    inner = Scaled(torch.ones(3, 5, dtype=torch.int8), torch.tensor(2.0), "inner")
    layout, _ = layout_of(a=Scaled(inner, torch.ones(3, 1), "outer"), b=tagged(torch.ones(2, 4).half(), 1.0))
    assert [(spec.name, spec.dtype, tuple(spec.shape)) for spec in layout.specs] == [
        ("a.values_.values_", torch.int8, (3, 5)),
        ("a.values_.scale", torch.float32, ()),
        ("a.scale", torch.float32, (3, 1)),
        ("b", torch.float16, (2, 4)),
    ]
    assert [spec.offset for spec in layout.specs] == [0, ALIGNMENT, 2 * ALIGNMENT, 3 * ALIGNMENT]
    assert [value.dtype for value in layout.values] == [torch.float32, torch.float16]


def test_a_binding_makes_the_same_tensors_of_the_buffer() -> None:
    nested = Scaled(Scaled(torch.rand(3, 5), torch.rand(()), "inner"), torch.rand(3, 1), "outer")
    layout, holder = layout_of(nested=parameter(nested), bare=tagged(torch.rand(6), 2.0), held=parameter(tagged(X, 3)))
    originals = dict(holder)
    buffer = torch.zeros(layout.nbytes, dtype=torch.uint8)
    for spec, view in zip(layout.specs, layout.views(buffer), strict=True):
        view.copy_(spec.original)
    layout.binding(buffer).apply()
    for name, original in originals.items():
        bound = holder[name]
        assert bound is not original
        assert type(bound) is type(original)
        assert isinstance(bound, nn.Parameter) is isinstance(original, nn.Parameter) is (name != "bare")
        begin, end = buffer.data_ptr(), buffer.data_ptr() + buffer.nbytes
        (mine, _), (theirs, _) = take_apart(name, bound), take_apart(name, original)
        for key, part in mine.items():
            assert begin <= part.data_ptr() < end, "it was copied"
            assert torch.equal(part, theirs[key])
    assert (holder["nested"].unit, holder["nested"].values_.unit) == ("outer", "inner")
    assert (holder["bare"].tag, holder["held"].tag) == (2.0, 3)
    layout.original_binding().apply()
    assert all(holder[name] is original for name, original in originals.items())


@pytest.mark.parametrize("kind", KINDS)
def test_they_stream_from_the_file_and_from_page_locked_memory(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for pin_memory in (True, False):
        stored = Stored(tmp_path, change=KINDS[kind], pin_memory=pin_memory)
        mapped = {spec.name for spec in stored.streamer.blocks.specs if spec.source is not None}
        assert ("blocks.2.qkv.weight.values_" if kind == "wrapped" else NAME) in mapped
        reads = Reads(monkeypatch)
        for plan in (stored.streamer.plan_for(10**9), stored.half, stored.least):
            stored.streamer.load(plan)
            stored.check(2)
        assert NAME in reads.tensors
        stored.streamer.finish_building()
        stored.check(2)
        assert stored.streamer.counters.streamed_bytes > 0
        stored.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_makes_no_weight(kind: str) -> None:
    model = make_transformer()
    KINDS[kind](model)
    expected = model(X)
    streamer = make_streamer(model, learned=True)
    streamer.load(streamer.plan_for(streamer.minimum_bytes))
    seen: dict[int, torch.Tensor] = {}

    def see(module: nn.Module, _: object) -> None:
        seen[id(module.weight)] = module.weight

    for block in model.blocks:
        block.qkv.register_forward_pre_hook(see)
    for _ in range(6):
        assert torch.equal(model(X), expected)
    assert len(seen) == len(model.blocks)
    streamer.close()


class Changed:
    """Patches that make another weight of some."""

    def __init__(self, made: dict[str, torch.Tensor]) -> None:
        self.made = made

    def signature(self, name: str) -> object | None:
        return id(self.made[name]) if name in self.made else None

    def compute(self, name: str, original: torch.Tensor) -> torch.Tensor:
        return self.made[name]


def patched_of(kind: str, model: Transformer) -> torch.Tensor:
    """Another weight for ``NAME``: other values, another context or attribute, a scale of another shape."""
    if kind == "wrapped":
        return Scaled(model.blocks[2].qkv.weight.values_ * 3, torch.tensor(0.75), "three quarters")
    return tagged(model.blocks[2].qkv.weight.as_subclass(torch.Tensor) * 3, 0.125)


@pytest.mark.parametrize("kind", KINDS)
def test_patches_are_written_and_taken_out_again(kind: str) -> None:
    model, reference = make_transformer(), make_transformer()
    for each in (model, reference):
        KINDS[kind](each)
    plain = model(X)
    made = patched_of(kind, reference)
    reference.blocks[2].qkv.weight = parameter(made)
    expected = reference(X)
    assert not torch.equal(expected, plain)
    streamer = make_streamer(model)
    for budget in budgets(streamer):
        plan = streamer.plan_for(budget)
        streamer.load(plan, Changed({NAME: made}))
        assert torch.equal(model(X), expected)
        shown = model.get_parameter(NAME)
        assert (shown.unit if kind == "wrapped" else shown.tag) == (made.unit if kind == "wrapped" else made.tag)
        with streamer.originals():
            assert model.get_parameter(NAME) is original_of(streamer)
        streamer.load(plan)
        assert torch.equal(model(X), plain)


@pytest.mark.parametrize("kind", KINDS)
def test_a_patched_resident_keeps_its_form_when_it_becomes_streamed(kind: str) -> None:
    model, reference = make_transformer(), make_transformer()
    for each in (model, reference):
        KINDS[kind](each)
    made = patched_of(kind, reference)
    reference.blocks[2].qkv.weight = parameter(made)
    patches = Changed({NAME: made})
    streamer = make_streamer(model)
    for budget in (10**9, streamer.minimum_bytes, 10**9):
        streamer.load(streamer.plan_for(budget), patches)
        assert torch.equal(model(X), reference(X))


def original_of(streamer: Streamer) -> torch.Tensor:
    return next(value.original for value in streamer.blocks.values if value.name == NAME)


WRONG = {
    "a plain tensor": (wrap, torch.ones(96, 32), r"makes a Tensor of blocks\.2\.qkv\.weight, which is a Scaled"),
    "no attributes": (tag, torch.ones(96, 32), r"makes a Tensor of blocks\.2\.qkv\.weight, which is a Tagged"),
    "a wrapper": (lambda model: None, Scaled(torch.ones(96, 32), torch.ones(()), ""), r"makes a Scaled of"),
    "wrapped once more": (
        wrap,
        Scaled(Scaled(torch.ones(96, 32), torch.ones(1), ""), torch.ones(1), ""),
        r"made of other tensors",
    ),
    "another shape": (
        wrap,
        Scaled(torch.ones(96, 32), torch.ones(96, 1), ""),
        r"shape of blocks\.2\.qkv\.weight\.scale from \(1,\) to \(96, 1\)",
    ),
    "another dtype": (
        wrap,
        Scaled(torch.ones(96, 32).half(), torch.ones(1), ""),
        r"dtype of blocks\.2\.qkv\.weight\.values_ from torch\.float32 to torch\.float16",
    ),
    "other memory": (tag, tagged(torch.ones(96, 31), 1.0), r"shape of blocks\.2\.qkv\.weight from \(96, 32\)"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_patch_that_makes_something_else_is_refused_by_name(case: str) -> None:
    change, made, message = WRONG[case]
    model = make_transformer()
    change(model)
    plain = model(X)
    streamer = make_streamer(model)
    plan = streamer.plan_for(streamer.minimum_bytes)
    with pytest.raises(UnsupportedModelError, match=message):
        streamer.load(plan, Changed({NAME: made}))
    assert streamer.backend.allocated == 0
    streamer.load(plan)
    assert torch.equal(model(X), plain)


def test_a_tied_weight_is_one_tensor_everywhere() -> None:
    model = make_transformer()
    weight = parameter(Scaled(model.blocks[0].qkv.weight.data, torch.tensor(0.5), "half"))
    for block in model.blocks:
        block.qkv.weight = weight
    expected = model(X)
    streamer = make_streamer(model)
    streamer.load(streamer.plan_for(streamer.minimum_bytes))
    assert torch.equal(model(X), expected)
    assert len({id(block.qkv.weight) for block in model.blocks}) == 1
    assert model.blocks[0].qkv.weight is not weight
