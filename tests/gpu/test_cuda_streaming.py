"""The engine on a real GPU: many repeats, checksums, and nothing on the hot path that waits."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from models import Transformer, make_transformer
from weightstream.streaming import Checkpoint, CudaBackend, PinBudget, Streamer, StreamingConfig, cut_model
from weightstream.streaming.memory.arena import Arena

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

DEPTH, WIDTH, TOKENS = 12, 1024, 256
# Where a model is read from its file again and again.
NARROW = WIDTH // 2
# Of a block's four units: the layer behind attention, whose weight is square.
OUT = 1


@pytest.fixture(scope="module")
def reference() -> tuple[torch.Tensor, torch.Tensor]:
    """An input, and what the model makes of it when it is an ordinary model on the GPU."""
    model = make_transformer(DEPTH, WIDTH).cuda()
    x = torch.randn(1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1)).cuda()
    model(x)
    return x, model(x)


@pytest.fixture(scope="module")
def in_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor, torch.Tensor]:
    """The file of a narrow model, an input, and what the model makes of it."""
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    model = make_transformer(DEPTH, NARROW)
    safetensors.torch.save_model(model, str(path))
    x = torch.randn(1, TOKENS, NARROW, generator=torch.Generator().manual_seed(1)).cuda()
    model.cuda()(x)
    return path, x, model(x)


def from_file(checkpoint: Checkpoint) -> Transformer:
    """A model whose weights are views of the file."""
    with torch.device("meta"):
        model = make_transformer(DEPTH, NARROW)
    model.load_state_dict(checkpoint.state_dict(), assign=True)
    return model


def make_streamer(model: Transformer, **settings: int) -> Streamer:
    return Streamer(model, cut_model(model), CudaBackend(torch.device("cuda:0")), StreamingConfig(**settings))


@pytest.mark.beside
@pytest.mark.parametrize("copy_streams", [0, 1, 2, 3])
def test_hundreds_of_steps_at_changing_budgets(reference: tuple[torch.Tensor, torch.Tensor], copy_streams: int) -> None:
    x, expected = reference
    model = make_transformer(DEPTH, WIDTH)
    streamer = make_streamer(model, copy_streams=copy_streams)
    chance = random.Random(copy_streams)
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(12):
        streamer.load(streamer.plan_for(chance.randint(streamer.minimum_bytes, streamer.model_bytes)))
        for _ in range(20):
            # Counted on the device: comparing on the host would let every copy finish first.
            wrong += (model(x) != expected).sum()
    assert int(wrong) == 0
    assert streamer.counters.steps == 240
    streamer.close()
    assert streamer.backend.allocated == 0


@pytest.mark.beside
def test_random_orders_of_blocks_never_use_a_wrong_weight(reference: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, _ = reference
    chance = random.Random(7)
    orders = [[chance.randrange(DEPTH) for _ in range(chance.randint(1, 20))] for _ in range(40)]
    resident = make_transformer(DEPTH, WIDTH).cuda()
    expected = [resident(x, order) for order in orders]
    model = make_transformer(DEPTH, WIDTH)
    streamer = make_streamer(model, slots=3)
    streamer.load(streamer.plan_for(streamer.minimum_bytes * 2))
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(5):
        for order, result in zip(orders, expected, strict=True):
            wrong += (model(x, order) != result).sum()
    assert int(wrong) == 0
    assert streamer.counters.misses > 0


def test_slow_compute_never_sees_the_next_block(reference: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Kernels that start late: the copy into their slot must wait for them (the ``free`` event)."""
    x, expected = reference
    model = make_transformer(DEPTH, WIDTH)
    streamer = make_streamer(model)
    streamer.load(streamer.plan_for(streamer.minimum_bytes))
    for block in model.blocks:
        block.norm.register_forward_pre_hook(lambda *_: torch.cuda._sleep(2_000_000))
    for _ in range(5):
        assert torch.equal(model(x), expected)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_a_step_never_waits_on_the_host(reference: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, _ = reference
    model = make_transformer(DEPTH, WIDTH)
    streamer = make_streamer(model)
    streamer.load(streamer.plan_for(streamer.minimum_bytes * 3))
    streamer.finish_building()
    model(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            model(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_streaming_overlaps_compute(reference: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Against the synchronous run of the same model in the same process, never against a clock alone."""
    x = reference[0].expand(1, TOKENS, WIDTH).repeat(8, 8, 1)

    def seconds(copy_streams: int) -> float:
        model = make_transformer(DEPTH, WIDTH)
        streamer = make_streamer(model, copy_streams=copy_streams)
        streamer.load(streamer.plan_for(streamer.minimum_bytes + streamer.outline.block_bytes(0)))
        streamer.finish_building()
        times = []
        for _ in range(8):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            model(x)
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        return min(times)

    assert seconds(2) < seconds(0)


def test_masters_are_page_locked_for_every_device_and_let_go_of() -> None:
    model = make_transformer(4, WIDTH)
    streamer = make_streamer(model)
    streamer.load(streamer.plan_for(streamer.minimum_bytes))
    streamer.finish_building()
    model(torch.zeros(1, 4, WIDTH, device="cuda"))
    weights = [block.qkv.weight for block in model.blocks]
    assert all(weight.is_pinned() for weight in weights)
    snapshot = streamer.snapshot()
    assert snapshot.pinned_bytes == sum(streamer.outline.unit_bytes) + snapshot.ring_bytes
    del model, streamer  # Dropped, not closed, with copies for the next step under way.
    gc.collect()
    assert not any(weight.is_pinned() for weight in weights)


@pytest.mark.beside
@pytest.mark.parametrize("limit", [0, 30_000_000, None])
def test_steps_are_right_while_masters_are_built_from_a_file(
    in_file: tuple[Path, torch.Tensor, torch.Tensor], limit: int | None
) -> None:
    """Staged for ever, in part, and until everything is page-locked; loaded anew with other residents in between."""
    path, x, expected = in_file
    checkpoint = Checkpoint.open(path)
    chance = random.Random(3)
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(4):
        model = from_file(checkpoint)
        backend = CudaBackend(torch.device("cuda:0"))
        blocks = cut_model(model, locate=checkpoint.locate)
        assert all(spec.source is not None for spec in blocks.specs)
        config = StreamingConfig(chunk_bytes=chance.choice([1 << 19, 1 << 21]), chunks=chance.choice([1, 3, 16]))
        streamer = Streamer(model, blocks, backend, config, PinBudget(limit))
        for _ in range(4):
            streamer.load(streamer.plan_for(chance.randint(streamer.minimum_bytes, streamer.model_bytes)))
            for _ in range(5):
                wrong += (model(x) != expected).sum()
        streamer.finish_building()
        for _ in range(5):
            wrong += (model(x) != expected).sum()
        assert int(wrong) == 0
        streamer.close()
        assert backend.allocated == 0


def test_a_failed_registration_is_explained_and_leaves_no_error_behind() -> None:
    backend = CudaBackend(torch.device("cuda:0"))
    arena = Arena(backend)
    buffer = arena.allocate(1 << 20)
    arena.lock(buffer)
    assert buffer.pinned
    twice = arena.allocate(1 << 20)
    twice.memory = buffer.memory
    arena.lock(twice)
    assert not twice.pinned
    assert "page-locked by somebody else" in str(arena.reason)
    # Straight to the driver, past our own check: it refuses, and the next kernel must not hear of it.
    code = int(torch.cuda.cudart().cudaHostRegister(buffer.memory.data_ptr(), buffer.nbytes, 1))
    assert code != 0
    backend._drain_error()
    assert float(torch.ones(4, device="cuda").sum()) == 4


def test_out_of_memory_gives_everything_back(reference: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, expected = reference
    model = make_transformer(DEPTH, WIDTH)
    streamer = make_streamer(model)
    free = torch.cuda.mem_get_info()[0]
    used = torch.cuda.memory_allocated()
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + streamer.minimum_bytes * 2) / total)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            streamer.load(streamer.plan_for(free))
        assert streamer.backend.allocated == 0
        assert torch.cuda.memory_allocated() == used
        streamer.load(streamer.plan_for(streamer.minimum_bytes))
        assert torch.equal(model(x), expected)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_step_that_runs_out_of_memory_runs_again_with_less(reference: tuple[torch.Tensor, torch.Tensor]) -> None:
    x = reference[0].repeat(16, 4, 1)
    resident = make_transformer(DEPTH, WIDTH).cuda()
    expected = resident(x)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    resident(x)
    activations = torch.cuda.max_memory_allocated() - before
    del resident
    model = make_transformer(DEPTH, WIDTH)
    streamer = make_streamer(model, headroom_bytes=20_000_000)
    gc.collect()
    torch.cuda.empty_cache()
    # Room for a small plan and what a step needs beside it, and not for all weights.
    allowed = torch.cuda.memory_allocated() + 2 * streamer.minimum_bytes + activations * 5 // 4
    assert allowed < torch.cuda.memory_allocated() + streamer.model_bytes + activations
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(0.99)  # Weights come from torch then, and count towards it.
    try:
        streamer.load(streamer.plan_for(streamer.model_bytes))
        torch.cuda.set_per_process_memory_fraction(allowed / total)
        for _ in range(6):
            assert torch.equal(streamer.run(lambda: model(x), shape=tuple(x.shape)), expected)
        assert streamer.plan is not None
        assert streamer.plan.segments
        assert streamer.counters.steps == 6
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_times_that_were_measured_predict_a_step(reference: tuple[torch.Tensor, torch.Tensor]) -> None:
    """The prediction against the step that follows it, for a bus-bound and a compute-bound model."""
    for repeats in (1, 64):
        x = reference[0].repeat(repeats, 4, 1)
        model = make_transformer(DEPTH, 2 * WIDTH if repeats == 1 else WIDTH)
        if repeats == 1:
            x = torch.randn(1, TOKENS, 2 * WIDTH, device="cuda")
        streamer = make_streamer(model, adaptive=False)
        streamer.load(streamer.plan_for(streamer.minimum_bytes * 2))
        for _ in range(10):
            streamer.run(lambda x=x, model=model: model(x), shape=tuple(x.shape))
            torch.cuda.synchronize()
        streamer.run(lambda x=x, model=model: model(x), shape=tuple(x.shape))
        snapshot = streamer.snapshot()
        assert snapshot.predicted_step_seconds == pytest.approx(snapshot.step_seconds, rel=0.25)
        assert snapshot.limited_by == ("bus" if repeats == 1 else "compute")
        streamer.close()


def test_a_weight_that_a_later_step_reads_directly_is_there(reference: tuple[torch.Tensor, torch.Tensor]) -> None:
    """torch refuses a tensor in host memory, and the block is streamed as a whole from then on."""
    x, expected = reference
    model = make_transformer(DEPTH, WIDTH)
    streamer = make_streamer(model, adaptive=False)
    streamer.load(streamer.plan_for(streamer.minimum_bytes * 2))
    for _ in range(4):
        assert torch.equal(streamer.run(lambda: model(x)), expected)
    for block in model.blocks:
        block.forward = lambda y, block=block: direct(block, y)
    for _ in range(4):
        assert torch.equal(streamer.run(lambda: model(x)), expected)


@pytest.mark.parametrize(
    "use",
    [
        lambda x, weight: torch.cat((x, weight)),
        lambda x, weight: x[0] + weight[0],
        lambda x, weight: x @ weight.T,
        lambda x, weight: torch.nn.functional.conv1d(x.T[None], weight[:, :, None]),
    ],
    ids=["cat", "add", "matmul", "conv"],
)
def test_a_resident_that_is_read_before_it_has_arrived_is_waited_for(
    in_file: tuple[Path, torch.Tensor, torch.Tensor], use: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> None:
    path, x, expected = in_file
    checkpoint = Checkpoint.open(path)
    model = from_file(checkpoint)
    blocks = cut_model(model, locate=checkpoint.locate)
    streamer = Streamer(model, blocks, CudaBackend(torch.device("cuda:0")), StreamingConfig(read_threads=1, chunks=1))
    streamer.load(streamer.plan_for(streamer.minimum_bytes + 6 * streamer.outline.block_bytes(0)))
    assert streamer.plan is not None
    resident = streamer.plan.resident
    last = next(block for block in reversed(range(DEPTH)) if 4 * block + OUT in resident)
    forward, tries = model.forward, []

    def read_ahead(x: torch.Tensor) -> torch.Tensor:
        tries.append(len(tries))
        use(x[0], model.blocks[last].out.weight)
        return forward(x)

    model.forward = read_ahead
    assert torch.equal(streamer.run(lambda: model(x)), expected)
    assert len(tries) == 2
    streamer.close()


def direct(block: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The block's forward, with the weights of one layer read without running it."""
    q, k, v = torch.nn.functional.linear(block.norm(x), block.qkv.weight, block.qkv.bias).chunk(3, dim=-1)
    x = x + block.out(torch.nn.functional.scaled_dot_product_attention(q, k, v)) * block.scale
    return x + block.mlp(x)
