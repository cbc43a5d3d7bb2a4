"""Two MODELs, each with a connection of its own as two workers have them: one copy, the host's latents."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import comfy.model_management
import pytest
import torch
from in_half import LoadInHalf
from sampling import sample, with_lora
from share_workers import LINUX, brokered, status_of, until
from weightstream.nodes.host import devices
from weightstream.nodes.model.patch_identity import identity_of_entries
from weightstream.streaming.config import PackingMode
from weightstream.streaming.sharing.broker import Broker
from weightstream.streaming.sharing.share import Share

pytestmark = LINUX


@pytest.fixture
def broker() -> Iterator[Broker]:
    with brokered() as broker:
        yield broker


# Of the LoRA, in turn. By packing it takes longer.
STRENGTHS = {PackingMode.OFF: (0.0, 0.0, 0.7, 0.7, 0.4, 0.7, 0.0), PackingMode.ON: (0.0, 0.0, 0.7)}


def pictures(model: Any, strengths: Sequence[float]) -> list[torch.Tensor]:
    """Latents without and with a LoRA."""
    models = {0.0: model} | {strength: with_lora(model, strength) for strength in {*strengths} - {0.0}}
    return [sample(models[strength]) for strength in strengths]


@pytest.mark.parametrize("packing", [PackingMode.OFF, PackingMode.ON])
def test_models_with_the_same_lora_share_what_it_makes(
    packing: PackingMode, streamed_in_half: LoadInHalf, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = pictures(streamed_in_half(PackingMode.OFF), STRENGTHS[packing])
    shares = [Share(broker.address) for _ in range(2)]
    models = []
    for share in shares:
        monkeypatch.setattr(devices.pins, "share", share)
        models.append(streamed_in_half(packing))
        for found, latent in zip(pictures(models[-1], STRENGTHS[packing]), expected, strict=True):
            assert torch.equal(found, latent)
        assert share.reason == ""
        assert devices.pins.shared > 0
        assert bool(models[-1].streamer.plan.packed) == (packing is PackingMode.ON)
    assert shares[0].built > 0
    assert shares[1].taken > 0
    patched = with_lora(models[1], 0.7)
    before = shares[1].built
    monkeypatch.setattr(devices.pins, "share", shares[0])
    sample(with_lora(models[0], 0.7))
    sample(with_lora(models[0], 0.7))
    monkeypatch.setattr(devices.pins, "share", shares[1])
    assert torch.equal(sample(patched), expected[2])
    assert shares[1].built == before, "it was there already, with the LoRA in it"
    comfy.model_management.unload_all_models()
    for model in models:
        model.streamer.close()
    until(lambda: status_of(broker)["copies"] == 0)
    for share in shares:
        share.give_up("it is over")


@pytest.fixture
def entries(streamed_in_half: LoadInHalf) -> list[tuple]:
    """Patches of one weight, as the host has them."""
    patched = with_lora(streamed_in_half(PackingMode.OFF), 0.7)
    return next(iter(patched.patches.values()))


def test_a_lora_is_known_by_what_is_in_it(entries: list[tuple], streamed_in_half: LoadInHalf) -> None:
    identity = identity_of_entries(entries, "here")
    assert identity is not None
    patched = with_lora(streamed_in_half(PackingMode.OFF), 0.7)
    again = next(iter(patched.patches.values()))
    assert again[0][1] is not entries[0][1], "another object, of the same file"
    assert identity_of_entries(again, "here") == identity
    assert identity_of_entries(entries, "elsewhere") != identity
    strength, patch, *rest = entries[0]
    others = [
        [(strength * 0.5, patch, *rest)],
        [*entries, *entries],
        [(strength, patch, 0.5, *rest[1:])],
        [(strength, patch, rest[0], (0, 0, 1), rest[2])],
        [(strength, changed(patch), *rest)],
    ]
    found = {identity_of_entries(other, "here") for other in others}
    assert len(found | {identity}) == 6
    assert None not in found


def changed(patch: Any) -> Any:
    """The same adapter with another number in it."""
    other = copy.copy(patch)
    first = patch.weights[0].clone()
    first.view(-1)[-1] += 1
    other.weights = (first, *patch.weights[1:])
    return other


def test_what_is_not_known_has_no_identity(entries: list[tuple]) -> None:
    """A function of a pack, an object of a class of its own, a tensor of another kind."""
    strength, patch, model_strength, offset, _ = entries[0]
    assert identity_of_entries([(strength, patch, model_strength, offset, lambda weight: weight)], "") is None
    strange = copy.copy(patch)
    strange.weights = (object(), *patch.weights[1:])
    subclass = type("Other", (type(patch),), {"__module__": "a_pack"})
    own = copy.copy(patch)
    own.__class__ = subclass
    for each in (object(), strange, own, ("diff", (torch.empty(2, device="meta"),))):
        assert identity_of_entries([(strength, each, model_strength, offset, None)], "") is None
    assert identity_of_entries([(strength, ("diff", (torch.ones(2),)), model_strength, offset, None)], "") is not None
