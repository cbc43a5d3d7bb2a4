"""Prompts at random on two models that pack and share page-locked memory: each step has the plain model's output."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from models import SETTINGS, PinningBackend
from packed_models import X, make_model
from weightstream.streaming import Streamer, StreamingConfig, cut_model
from weightstream.streaming.config import PackingMode
from weightstream.streaming.memory.host_memory import PinBudget

NAMES = [f"blocks.{block}.{part}.weight" for block in range(4) for part in ("qkv", "out", "mlp.0", "mlp.2")]
# Those of the first block are exchanged, those of the others are patched.
EXCHANGED, PATCHED = NAMES[:4], NAMES[4:]
BUDGETS = [450_000, 500_000, 700_000, 10**7]
# These take every path through the engine that the first twelve take.
SEEDS = [0, 2, 3, 4, 8, 10]
LIMITS = [None, 700_000, 1_200_000, 2_500_000]


class Scaled:
    """Patches that scale weights by a factor for each, and add noise."""

    def __init__(self, factors: dict[str, float]) -> None:
        self.factors = factors

    def signature(self, name: str) -> object | None:
        return self.factors.get(name)

    def compute(self, name: str, original: torch.Tensor) -> torch.Tensor:
        noise = torch.Generator().manual_seed(int(self.factors[name] * 16))
        values = original.float() * self.factors[name] + torch.randn(original.shape, generator=noise) * 0.01
        return values.to(original.dtype)


class CancelledError(Exception):
    """Somebody has pressed Cancel."""


class Prompts:
    """A model, and what comes to it."""

    def __init__(self, seed: int, pins: PinBudget) -> None:
        self.model, self.reference = make_model(seed), make_model(seed)
        with torch.no_grad():  # Packed they take less than usual.
            self.model.blocks[2].out.weight.zero_()
            self.model.blocks[3].qkv.weight[:64] = 0
        self.loaded = {name: self.model.get_parameter(name).detach().clone() for name in NAMES}
        self.patches = Scaled({})
        self.ticks: int | None = None
        settings = {**SETTINGS, "packing": PackingMode.ON, "stream_all": False, "adaptive": False}
        config = StreamingConfig(**{**settings, "chunk_bytes": 4096, "chunks": 3})
        self.backend = PinningBackend()
        cut = cut_model(self.model)
        self.streamer = Streamer(self.model, cut, self.backend, config, pins=pins, watch=self.watch)

    def watch(self, progress: object) -> None:
        if self.ticks is not None:
            self.ticks -= 1
            if self.ticks < 0:
                self.ticks = None
                raise CancelledError

    def expected(self) -> torch.Tensor:
        with torch.no_grad():
            for name, weight in self.loaded.items():
                patched = self.patches.compute(name, weight) if name in self.patches.factors else weight
                self.reference.get_parameter(name).copy_(patched)
        return self.reference(X)

    def prompt(self, chance: random.Random) -> None:
        """Something happens to the model, and then it runs, unless somebody interrupts that."""
        events = [self.patch, self.unload, self.give_up, self.exchange, self.do_nothing]
        chance.choices(events, [5, 1, 1, 1, 2])[0](chance)
        streamer = self.streamer
        self.ticks = chance.randrange(25) if chance.random() < 0.35 else None
        try:
            streamer.begin_run()
            plan = streamer.next_plan(chance.choice(BUDGETS))
            streamer.load_within(plan, self.load)
            streamer.begin_prompt()
            expected = self.expected()
            for _ in range(chance.choice([1, 2, 4])):
                assert torch.equal(streamer.run(lambda: self.model(X), shape="x", reload=self.load), expected)
        except CancelledError:
            pass
        self.ticks = None

    def load(self, plan: object) -> None:
        self.streamer.load(plan, self.patches)

    def patch(self, chance: random.Random) -> None:
        names = chance.sample(PATCHED, chance.choice([0, 1, 3, 12]))
        self.patches = Scaled({name: chance.choice([0.5, 2.0, 3.0, 0.0]) for name in names})

    def unload(self, chance: random.Random) -> None:
        self.streamer.unload()

    def give_up(self, chance: random.Random) -> None:
        self.streamer.give_up_masters(chance.choice([1, 300_000, 1 << 40]))

    def exchange(self, chance: random.Random) -> None:
        name = chance.choice(EXCHANGED)
        self.loaded[name] = self.loaded[name] * chance.choice([1.25, 0.75])
        layer = self.model.get_submodule(name.rpartition(".")[0])
        layer.weight = torch.nn.Parameter(self.loaded[name].clone(), requires_grad=False)
        if changes := self.streamer.changes():
            self.streamer.show(changes)
            self.streamer.take_up(cut_model(self.model), changes)

    def do_nothing(self, chance: random.Random) -> None:
        pass

    def close(self) -> None:
        self.streamer.close()
        arena = self.streamer.site.supply.arena
        assert self.backend.allocated == arena.pinned_bytes == arena.pageable_bytes == 0
        assert self.backend.registered == {}


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_two_models_in_turn(seed: int) -> None:
    chance = random.Random(seed)
    pins = PinBudget(limit=chance.choice(LIMITS))
    models = [Prompts(number, pins) for number in range(2)]
    for _ in range(14):
        chance.choice(models).prompt(chance)
    for model in models:
        model.close()
    assert (pins.used, pins.locked) == (0, 0)


@pytest.mark.slow
def test_two_models_on_two_threads() -> None:
    pins = PinBudget(limit=1_500_000)
    models = [Prompts(number, pins) for number in range(2)]
    stopped = threading.Event()

    def run(model: Prompts, seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(12):
            if not stopped.is_set():
                model.prompt(chance)

    with ThreadPoolExecutor(2) as threads:
        runs = [threads.submit(run, model, seed) for seed, model in enumerate(models)]
        try:
            for done in runs:
                done.result(60)
        finally:
            stopped.set()
    for model in models:
        model.close()
    assert (pins.used, pins.locked) == (0, 0)
