"""Patched weights, and weights that others write."""

from __future__ import annotations

import pytest
import torch
from models import Doubled, X, budgets, make_streamer, make_transformer
from weightstream.streaming.memory import master_copy as masters
from weightstream.streaming.model.layout import Layout


@pytest.mark.slow
def test_patches_are_baked_once_and_taken_out_again() -> None:
    model = make_transformer()
    plain = model(X)
    names = {f"blocks.{index}.qkv.weight" for index in range(6)} | {"input.weight"}
    reference = make_transformer()
    for name in names:
        reference.get_parameter(name).mul_(2)
    patched = reference(X)
    streamer = make_streamer(model)
    for budget in budgets(streamer):
        plan = streamer.plan_for(budget)
        patches = Doubled(names)
        streamer.load(plan, patches)
        assert torch.equal(model(X), patched)
        streamer.load(plan, patches)
        assert sorted(patches.computed) == sorted(set(patches.computed))
        one_less = Doubled(names - {"blocks.3.qkv.weight"})
        streamer.load(plan, one_less)
        assert one_less.computed == []
        with streamer.originals():
            assert torch.equal(model.blocks[0].qkv.weight, make_transformer().blocks[0].qkv.weight)
        streamer.load(plan)
        assert torch.equal(model(X), plain)


def test_an_unloaded_model_shows_its_originals() -> None:
    model = make_transformer()
    original = model.blocks[2].out.weight.clone()
    streamer = make_streamer(model)
    streamer.load(streamer.plan_for(streamer.minimum_bytes), Doubled({"blocks.2.out.weight"}))
    assert torch.equal(model.blocks[2].out.weight, original * 2)
    streamer.unload()
    assert torch.equal(model.blocks[2].out.weight, original)
    with streamer.originals():
        assert torch.equal(model.blocks[2].out.weight, original)
    assert torch.equal(model.blocks[2].out.weight, original)


def test_patched_residents_stay_patched_when_they_become_streamed() -> None:
    model = make_transformer()
    patches = Doubled({"blocks.2.out.weight"})
    streamer = make_streamer(model)
    streamer.load(streamer.plan_for(10**9), patches)
    expected = model(X)
    streamer.load(streamer.plan_for(streamer.minimum_bytes), patches)
    assert torch.equal(model(X), expected)
    assert patches.computed == ["blocks.2.out.weight"]


class Longer(Doubled):
    """Makes vectors longer."""

    def compute(self, name: str, original: torch.Tensor) -> torch.Tensor:
        return torch.cat([super().compute(name, original), torch.ones(3)])


@pytest.mark.slow
def test_a_patch_may_change_a_shape() -> None:
    model = make_transformer()
    plain, original = model(X), model.blocks[2].qkv.bias.clone()
    name = "blocks.2.qkv.bias"
    seen: list[torch.Tensor] = []
    module = model.blocks[2].qkv
    streamer = make_streamer(model)
    for budget in (*budgets(streamer), streamer.minimum_bytes, 10**9):
        streamer.load(streamer.plan_for(budget), Longer({name}))
        # The layer itself could not run: what it would run with is what counts.
        handle = module.register_forward_pre_hook(lambda *_: seen.append(module.bias.clone()))
        with pytest.raises(RuntimeError, match="size"):
            model(X)
        handle.remove()
        assert torch.equal(seen.pop(), torch.cat([original * 2, torch.ones(3)]))
        streamer.load(streamer.plan_for(budget))
        assert torch.equal(model(X), plain)
    streamer.close()
    assert streamer.backend.allocated == 0


def test_a_failed_patch_leaves_a_clean_model() -> None:
    model = make_transformer()
    plain = model(X)

    class Broken(Doubled):
        def compute(self, name: str, original: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no such adapter")

    streamer = make_streamer(model)
    plan = streamer.plan_for(streamer.minimum_bytes)
    with pytest.raises(RuntimeError, match="no such adapter"):
        streamer.load(plan, Broken({"blocks.2.out.weight"}))
    assert streamer.backend.allocated == 0
    streamer.load(plan)
    assert torch.equal(model(X), plain)


def test_a_patch_half_taken_out_is_not_taken_for_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """The master copy's memory outlives the failure: with the patch back it must be written anew."""
    model = make_transformer()
    plain = model(X)
    patches = Doubled({"blocks.2.out.weight"})
    streamer = make_streamer(model)
    plan = streamer.plan_for(streamer.minimum_bytes)
    streamer.load(plan, patches)
    patched = model(X)
    read_range = masters.read_range

    def stop_half_way(layout: Layout, start: int, stop: int, target: torch.Tensor, forget: bool) -> None:
        read_range(layout, start, stop // 2, target[: stop // 2 - start], forget)
        raise OSError("the disk is gone")

    for wanted, expected in ((None, plain), (patches, patched)):
        with monkeypatch.context() as patch:
            patch.setattr(masters, "read_range", stop_half_way)
            streamer.load(plan)
        streamer.load(plan, wanted)
        assert torch.equal(model(X), expected)


@pytest.mark.slow
@pytest.mark.parametrize("budget", ["least", "half", "all"])
@pytest.mark.parametrize("broken", [1, 2, 3, 6])
def test_a_failure_amid_patches_leaves_none_half_written(budget: str, broken: int) -> None:
    """Neither those that were computed before it, nor those whose copies were under way."""
    model = make_transformer()
    plain = model(X)
    streamer = make_streamer(model, slots=3)
    names = {f"blocks.{block}.{layer}.weight" for block in range(6) for layer in ("out", "qkv")}
    budgets = {"least": streamer.minimum_bytes, "half": streamer.model_bytes // 2, "all": 10**9}
    plan = streamer.plan_for(budgets[budget])

    class Breaking(Doubled):
        def signature(self, name: str) -> object | None:
            return "broken" if name in self.names else None

        def compute(self, name: str, original: torch.Tensor) -> torch.Tensor:
            if len(self.computed) == broken:
                raise RuntimeError("no such adapter")
            return super().compute(name, original)

    reference = make_transformer()
    for name in names:
        reference.get_parameter(name).mul_(2)
    doubled = reference(X)
    for before in (None, Doubled(names), Doubled({"blocks.3.qkv.weight"})):
        streamer.load(plan, before)
        with pytest.raises(RuntimeError, match="no such adapter"):
            streamer.load(plan, Breaking(names | {"blocks.1.mlp.0.weight"}))
        assert streamer.backend.allocated == 0
        streamer.load(plan, Doubled(names))
        assert torch.equal(model(X), doubled)
        streamer.load(plan)
        assert torch.equal(model(X), plain)


def test_weights_written_in_place_are_copied_anew() -> None:
    model = make_transformer()
    streamer = make_streamer(model)
    streamer.load(streamer.plan_for(streamer.minimum_bytes))
    model(X)
    plain = make_transformer()
    originals = [spec.original for spec in streamer.blocks.specs if spec.name.endswith("out.weight")]
    streamer.make_masters({f"blocks.{index}.out.weight" for index in range(6)})
    for block in model.blocks:
        block.out.weight.mul_(0.5)
    streamer.invalidate()
    result = model(X)
    for original, block in zip(originals, plain.blocks, strict=True):
        assert torch.equal(original, block.out.weight), "what was loaded is nobody's to write to"
    reference = make_transformer()
    for block in reference.blocks:
        block.out.weight.mul_(0.5)
    assert torch.equal(result, reference(X))


def test_weights_that_were_written_to_are_where_they_were_written_after_a_step() -> None:
    """Who undoes what it has written finds master copies in the modules still, and no original."""
    model, plain = make_transformer(), make_transformer()
    expected = model(X)
    streamer = make_streamer(model, learned=True)
    streamer.load(streamer.plan_for(streamer.minimum_bytes))
    originals = [spec.original for spec in streamer.blocks.specs if spec.name.endswith("out.weight")]
    streamer.make_masters({f"blocks.{index}.out.weight" for index in range(6)})
    for factor in (0.5, 2.0):
        for block in model.blocks:
            block.out.weight.mul_(factor)
        streamer.invalidate()
        result = model(X)
        for original, block in zip(originals, plain.blocks, strict=True):
            assert torch.equal(original, block.out.weight), "what was loaded is nobody's to write to"
    assert torch.equal(result, expected)
