"""Copies that are damaged on a real GPU are found there, named and mended."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import pytest
import torch
from models import make_transformer
from weightstream.streaming import CorruptionError, CudaBackend, Streamer, StreamingConfig, cut_model
from weightstream.streaming.config import PackingMode
from weightstream.streaming.devices.copies import Event, Pair
from weightstream.streaming.model.layout import NamedTensor, make_layout
from weightstream.streaming.model.sums import MOST_WORDS, Summing
from weightstream.streaming.run.checksums import BATCH_BYTES, PIECE_WORDS, checksums

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.beside,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

# Every step takes the sums of everything that streams on the host too, so no wider than it takes for several pieces.
DEPTH, WIDTH, TOKENS = 8, 512, 64
# A norm has only ones and zeros: to move them about is no damage.
SMALLEST_MATRIX = WIDTH * WIDTH


@pytest.fixture(scope="module")
def reference() -> tuple[torch.Tensor, torch.Tensor]:
    """An input, and what the model makes of it when it is an ordinary model on the GPU."""
    resident = make_transformer(DEPTH, WIDTH).cuda()
    x = torch.randn(1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1)).cuda()
    resident(x)
    return x, resident(x)


@pytest.mark.parametrize("nbytes", [1, 6, 4 * PIECE_WORDS, 4 * PIECE_WORDS + 2, 3 * BATCH_BYTES + 4 * PIECE_WORDS + 5])
def test_the_sums_are_the_same_on_both_sides(nbytes: int) -> None:
    memory = torch.randint(0, 256, (nbytes,), generator=torch.Generator().manual_seed(nbytes), dtype=torch.uint8)
    assert torch.equal(checksums(memory.cuda()).cpu(), checksums(memory))


@pytest.mark.parametrize("words", [64, MOST_WORDS, (9 << 14) + 64])
def test_the_sums_of_residents_are_the_same_on_both_sides(words: int) -> None:
    weight = torch.randn(words * 2, generator=torch.Generator().manual_seed(words))
    (value,) = make_layout([NamedTensor(("weight",), weight, weight.dtype, ())]).values
    memory = weight.view(torch.uint8)
    assert torch.equal(Summing()(memory.cuda(), value).cpu(), Summing()(memory, value))


def flip_a_bit(target: torch.Tensor) -> None:
    target[100] ^= 4


def swap_words(target: torch.Tensor) -> None:
    words = target.view(torch.int32)
    one, other = words[3].clone(), words[170].clone()
    words[3], words[170] = other, one


def move_words(target: torch.Tensor) -> None:
    target.copy_(target.roll(4))


def zero_the_tail(target: torch.Tensor) -> None:
    target[-WIDTH * WIDTH // 2 :].zero_()


class CorruptingBackend(CudaBackend):
    """Damages one copy on the stream that makes it, before its event.

    Attributes:
        damage: what it does to what has been copied; None leaves out the copy, so that the slot is stale.
        countdown: copies of matrices until the one that it damages.
    """

    def __init__(self) -> None:
        super().__init__(torch.device("cuda:0"))
        self.damage: Callable[[torch.Tensor], None] | None = None
        self.countdown = 10**9

    def _copy_now(self, stream: torch.cuda.Stream | None, pairs: Sequence[Pair], waits: Sequence[Event]) -> Event:
        largest = max(pairs, key=lambda pair: pair[0].nbytes)
        if largest[0].nbytes >= SMALLEST_MATRIX:
            self.countdown -= 1
        if self.countdown != 0 or largest[0].nbytes < SMALLEST_MATRIX:
            return super()._copy_now(stream, pairs, waits)
        if self.damage is None:
            return super()._copy_now(stream, [pair for pair in pairs if pair is not largest], waits)
        super()._copy_now(stream, pairs, waits)
        stream = stream or torch.cuda.current_stream(self.device)
        with torch.cuda.stream(stream):
            self.damage(largest[0])
            return stream.record_event(torch.cuda.Event(blocking=True))


@pytest.mark.parametrize("damage", [flip_a_bit, swap_words, move_words, zero_the_tail, None])
@pytest.mark.parametrize("pin_memory", [True, False], ids=["page-locked", "staged"])
@pytest.mark.parametrize("copy", [1, 6])
def test_a_damaged_copy_is_found_and_mended(
    reference: tuple[torch.Tensor, torch.Tensor],
    damage: Callable[[torch.Tensor], None] | None,
    pin_memory: bool,
    copy: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    x, expected = reference
    model, backend = make_transformer(DEPTH, WIDTH), CorruptingBackend()
    config = StreamingConfig(verify=True, pin_memory=pin_memory, adaptive=False)
    streamer = Streamer(model, cut_model(model), backend, config)
    streamer.load(streamer.plan_for(streamer.minimum_bytes + streamer.outline.block_bytes(0)))
    for _ in range(4):
        assert torch.equal(streamer.run(lambda: model(x)), expected)
    streamer.drain()
    assert (streamer.counters.corrupted, streamer.snapshot().mode) == (0, "streamed")
    backend.damage, backend.countdown = damage, copy
    for _ in range(4):
        assert torch.equal(streamer.run(lambda: model(x)), expected)
    assert streamer.counters.corrupted == 1
    assert "a copy of blocks." in caplog.records[-1].getMessage()
    assert caplog.records[-1].levelno == logging.ERROR
    assert streamer.snapshot().mode == "synchronous"
    assert "copies are synchronous since one of blocks." in streamer.explain()
    streamer.close()
    assert backend.allocated == 0


def test_damaged_residents_are_found_and_mended(
    reference: tuple[torch.Tensor, torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    x, expected = reference
    model, backend = make_transformer(DEPTH, WIDTH), CorruptingBackend()
    streamer = Streamer(model, cut_model(model), backend, StreamingConfig(verify=True, adaptive=False))
    backend.damage, backend.countdown = swap_words, 5
    streamer.load(streamer.plan_for(10**12))
    for _ in range(2):
        assert torch.equal(streamer.run(lambda: model(x)), expected)
    assert streamer.counters.corrupted == 1
    assert "(resident: " in caplog.text
    streamer.close()


@pytest.mark.parametrize("damage", [flip_a_bit, zero_the_tail, None])
def test_damaged_packed_weights_are_found(
    damage: Callable[[torch.Tensor], None] | None, caplog: pytest.LogCaptureFixture
) -> None:
    """A copy to a slot is mended. A packed copy that was damaged in RAM is an error, and made anew."""
    resident = make_transformer(DEPTH, WIDTH).to(torch.bfloat16).cuda()
    x = torch.randn(1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16).cuda()
    resident(x)
    expected = resident(x)
    model, backend = make_transformer(DEPTH, WIDTH).to(torch.bfloat16), CorruptingBackend()
    config = StreamingConfig(verify=True, packing=PackingMode.ON, stream_all=True, adaptive=False)
    streamer = Streamer(model, cut_model(model), backend, config)

    def check(corrupted: int) -> None:
        for _ in range(4):
            assert torch.equal(streamer.run(lambda: model(x)), expected)
        assert streamer.counters.corrupted == corrupted
        assert len(streamer.plan.packed) == 4 * DEPTH

    budget = streamer.minimum_bytes + streamer.outline.block_bytes(0)
    streamer.load(streamer.plan_for(budget))
    check(corrupted=0)
    streamer.drain()
    backend.damage, backend.countdown = damage, 3
    check(corrupted=1)
    assert "a copy of blocks." in caplog.text
    assert streamer.snapshot().mode == "synchronous"
    streamer.drain()
    copies = streamer.site.weight_copies.copies(min(streamer.plan.packed))
    copies.packed.buffer[1000] ^= 4
    streamer.invalidate()
    with pytest.raises(CorruptionError, match="in RAM was damaged"):
        streamer.run(lambda: model(x))
    streamer.begin_prompt()
    streamer.load(streamer.plan_for(budget))
    check(corrupted=2)
    streamer.close()
    assert backend.allocated == 0
