"""One loaded model that streams: what all patchers of it share."""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import comfy.memory_management
import torch
from comfy.model_patcher import ModelPatcher
from torch.utils.hooks import RemovableHandle

from ...streaming import (
    Backend,
    BudgetError,
    Feeder,
    Line,
    Plan,
    Streamer,
    count_of,
    cut_model,
    format_bytes,
    gpu_name,
    listed,
)
from ...streaming.handoff.boundary import Boundary
from ...streaming.sharing.share import NoShare
from ..host.devices import evictable, local_share, make_backend, obtainable, pins, same_device
from ..host.generators import generators_kept
from ..host.noted_dtypes import noted_dtype
from ..state.step_state import StepModules
from ..tell import messages
from ..tell.names import without_folders
from ..tell.notices import keep_notice, withdraw_notice
from ..tell.progress import LoadingBar
from .measured import keep_measured
from .objections import keep_objection
from .offload import GIB, ROUND_GIB, OffloadSettings, host_config
from .shares import Shares

# What notices call work on several GPUs at the same time.
PARALLEL_NOTICE = "GPU Placement (parallel)"

# Where the shared model keeps the one object that holds everything about its streaming.
ATTRIBUTE = "weightstream"

# Where copies of the models that are made now come from, for several of one file in this process (docs/sharing.md).
_share: ContextVar[NoShare | None] = ContextVar("share", default=None)

_living: weakref.WeakSet[StreamedModel] = weakref.WeakSet()
# Routes answer on other threads while the worker loads models.
_watching = threading.Lock()


@contextmanager
def sharing_copies() -> Iterator[None]:
    """Models that are made to stream meanwhile, by whomever, share their copies; by the broker if one was named."""
    token = _share.set(None if pins.share.address else local_share)
    try:
        yield
    finally:
        _share.reset(token)


def streamed_models() -> list[StreamedModel]:
    """All streamed models that are alive, sorted by name."""
    with _watching:
        return sorted(_living, key=lambda model: (model.name, model.number))


@dataclass(eq=False)
class StreamedModel:
    """Everything about the streaming of one loaded model, shared by all patchers of it.

    Attributes:
        name: the checkpoint's file name, with the device behind it for a part on another one (parts.py).
        streamer: moves the weights.
        node_id: the node where the effective plan is shown; None outside of a prompt.
        bar: shows on it how far loading is.
        load_by_host: loads the same model ComfyUI's own way; None if there is no way.
        kind: the class of the patcher that the model came with; its way of patching weights is kept (patches.py).
        origin: returns the incoming patcher, for a model that another node has loaded.
        loaded: returns the patcher whose patches are in the weights.
        hooks: the group of the host's hooks that is in the weights too (hooked.py).
        exchanged: the names at which object patches came or went since that was last followed (following.py).
        step_hooks: the group of hooks with which the running step began.
        boundary: the hooks between devices, for a model whose blocks run on several (parts.py).
        shares: which device has which blocks, for such a model.
        placed: its blocks, each with the device on which it runs.
        fed: the device to which other devices bring weights, and these devices (twins/feeding.py).
        held: whether a part keeps its weights even if the host takes them away (parts.py, Note: held parts).
        leaves: whether the host asked to unload a held part, which is done when the step ends.
        title: the checkpoint's file name.
        number: tells models of a process apart; a part has that of its whole model, and so have models that work beside
            each other.
        beside: names of the GPUs that work on a step at the same time, its own included (nodes/parallel/copies.py).
        alone: why its last step ran on its own GPU alone all the same; empty where it did not.
        gave_up: why the steps of this run do so.
        together: how many steps of this run were computed by several GPUs at the same time.
        ended: whether the run for which it was loaded last has ended.
    """

    name: str
    streamer: Streamer
    node_id: str | None
    bar: LoadingBar
    load_by_host: Callable[[], ModelPatcher] | None = None
    kind: type[ModelPatcher] = ModelPatcher
    origin: Callable[[], ModelPatcher | None] = lambda: None
    loaded: Callable[[], ModelPatcher | None] = lambda: None
    hooks: Any = None
    exchanged: set[str] = field(default_factory=set)
    step_hooks: Any = None
    boundary: Boundary | None = None
    shares: Shares | None = None
    placed: Sequence[tuple[torch.nn.Module, torch.device]] = ()
    fed: tuple[torch.device, Sequence[torch.device]] | None = None
    held: bool = False
    leaves: bool = False
    title: str = ""
    number: int = field(default_factory=count(1).__next__)
    ended: bool = False
    beside: Sequence[str] = ()
    alone: str = ""
    gave_up: str = ""
    together: int = 0
    _native: ModelPatcher | None = None
    _step_modules: tuple[int, StepModules] | None = None
    _guard: RemovableHandle | None = None
    _told_of_hooks: bool = False
    _announced: object = None
    _shown: tuple[Plan | None, bool, bool, int] = (None, False, False, 0)

    def __post_init__(self) -> None:
        self.title = self.title or self.name
        with _watching:
            _living.add(self)

    @property
    def gpu(self) -> str:
        """The name of its device, as nodes show it."""
        return gpu_name(self.streamer.backend.device.index or 0)

    def feed(self, home: torch.device, helpers: Sequence[torch.device]) -> None:
        """From the next backend for ``home`` on, ``helpers`` bring weights to it."""
        self.fed = home, tuple(helpers)

    def backend_on(self, device: torch.device) -> Backend:
        """Make a backend for this model on ``device``, with the feeders that bring weights to it."""
        backend = make_backend(device)
        if self.fed is not None and same_device(self.fed[0], device):
            backend.feeders += [Feeder(make_backend(helper)) for helper in self.fed[1]]
        return backend

    def place_blocks(self, devices: Sequence[torch.device]) -> None:
        """From the next load on, blocks run on these devices, as the shares assign them."""
        assert self.boundary is not None
        assert self.shares is not None
        self.boundary.detach()
        self.placed = self.shares.placed_on(devices)

    def step_modules(self, root: torch.nn.Module) -> StepModules:
        """The modules below ``root``, which run in steps, collected once for each load by the host."""
        run = self.streamer.counters.runs
        if self._step_modules is None or self._step_modules[0] != run:
            self._step_modules = run, StepModules(root)
        return self._step_modules[1]

    def announce_changes(self) -> None:
        """After a step: announce what it has changed or measured, and that everything is page-locked now."""
        plan, *shown = self._shown
        now = [self.streamer.building, self.streamer.config.synchronous, len(self.streamer.never_entered)]
        if self.streamer.plan is not plan or now != shown or self.bar.wrote:
            self.announce()

    def announce(self) -> None:
        """Say which plan is in effect: in the log when it is another than before, and in a line on the node."""
        plan, building = self.streamer.plan, self.streamer.building
        synchronous, never_entered = self.streamer.config.synchronous, len(self.streamer.never_entered)
        timed = plan is not None and plan.forecast is not None
        now = (plan, building, synchronous, self.streamer.state, timed, never_entered)
        messages.log(self._log_name, self.streamer.explain(), again=now == self._announced)
        self._show_line()
        if self._is_alone:
            keep_measured(self.title, self.gpu, self.streamer.snapshot())
        self._announced, self._shown = now, (plan, building, synchronous, never_entered)
        self.bar.wrote = False

    @property
    def _log_name(self) -> str:
        """Its name, with the device behind it where the model has parts on others, as their names have."""
        return self.name if self.boundary is None else f"{self.name} on {self.streamer.backend.name}"

    def begin_run(self) -> None:
        """The host is about to load it, for steps that are counted apart from those before."""
        self.ended, self.gave_up, self.together = False, "", 0
        self.streamer.begin_run()

    def end_run(self) -> None:
        """The run is over, and its figures are whole; of each device that this is a part on, before it is told."""
        self.ended = True
        self.streamer.end_run()

    def tell_of_run(self) -> None:
        """Have the line on the node say what was measured in the run that has ended, if there were steps."""
        if self.streamer.snapshot().run.counters.steps:
            self._show_line()

    @property
    def _is_alone(self) -> bool:
        """Whether all of the model is on one device, which alone brings its weights."""
        return self.shares is None and self.fed is None and self.name == self.title

    def _show_line(self) -> None:
        """Show the line of the whole model on the node, of which this may be the part on one of several devices."""
        if self.node_id is None:
            return
        models = [model for model in streamed_models() if model.number == self.number]
        loaded = [part for model in models if (part := model.streamer.snapshot()).mode != "off"]
        details = [f"{part.device}: {without_folders(part.explain)}" for part in loaded]
        line = Line.of(loaded, all(model.ended for model in models), parallel=bool(self.beside) and not self.alone)
        messages.show_line(line, details, self.node_id)

    def tell_of_parallel(self, alone: str, about: object) -> None:
        """Say on how many GPUs it works, where that has changed: ``alone`` says why on its own one; empty if on all."""
        keep_objection(self.title, alone)
        if alone == self.alone:
            return
        for model in streamed_models():
            if model.number == self.number:
                model.alone = alone
        if not alone:
            messages.announce(self.title, f"works on {listed(self.beside)} at the same time", self.node_id)
            return withdraw_notice(PARALLEL_NOTICE, self.node_id)
        text = f"{self.title} works on {self.gpu} alone, not in parallel: {alone}"
        messages.announce(PARALLEL_NOTICE, text, self.node_id)
        keep_notice("fallback", PARALLEL_NOTICE, text, self.node_id, about)

    def tell_of_hooks(self) -> None:
        """Say once that weights change within steps, and what that costs."""
        if not self._told_of_hooks:
            self._told_of_hooks = True
            text = (
                "a LoRA that hangs on conditioning changes weights between steps, ComfyUI's own way, which takes time"
            )
            messages.announce(self.name, text, self.node_id)

    def set_loaded(self, patcher: ModelPatcher) -> None:
        """``patcher`` has put its patches into the weights; its node shows what is in effect."""
        self.loaded = weakref.ref(patcher)
        self.guard(None)

    def guard(self, handle: RemovableHandle | None) -> None:
        """Keep ``handle``, whose hook sees to calls of the root while the model is unloaded; remove the last one."""
        if self._guard is not None:
            self._guard.remove()
        self._guard = handle

    def show_on(self, node_id: str | None) -> None:
        """From now on this node shows plan and progress."""
        self.node_id = self.bar.node_id = node_id

    def load_native(self) -> ModelPatcher | None:
        """Return a patcher of the same model that the host moves; None if there is no way to load it.

        A patcher with dynamic VRAM takes no memory while it is not loaded, so it is kept for the next time.
        """
        if self._native is not None:
            return self._native.clone()
        if self.load_by_host is None:
            return None
        with generators_kept():
            native = self.load_by_host()
        if native.is_dynamic():
            self._native = native
        return native


def make_streamed(
    model: torch.nn.Module,
    root: torch.nn.Module,
    load_device: torch.device,
    name: str,
    locate: Callable[[torch.Tensor], Any],
    settings: OffloadSettings,
    node_id: str | None,
) -> StreamedModel:
    """Make ``model`` stream, which the host has just built and which nothing else uses.

    Args:
        model: what a patcher holds.
        root: the module whose forward is one step.
        load_device: where the host wants it.
        name: for people.
        locate: finds the part of a file that a tensor maps.
        settings: of the node that asks.
        node_id: that node.

    Raises:
        UnsupportedModelError: it cannot stream, or not to this device.
        BudgetError: the limit has no room for the largest block.
    """
    backend = make_backend(load_device)
    blocks = cut_model(model, model_dtype, locate, shown_dtype=dtype_by_host)
    bar = LoadingBar(node_id)
    streamer = Streamer(root, blocks, backend, host_config(settings, backend), pins, evictable, bar, share=_share.get())
    check_limit(settings.vram_limit, streamer, name)
    streamed = StreamedModel(name, streamer, node_id, bar)
    setattr(model, ATTRIBUTE, streamed)
    size = f"{count_of(len(blocks.blocks), 'block')}, {format_bytes(streamer.model_bytes)}"
    messages.announce(name, f"{size}, ready to stream to {backend.name}", node_id)
    streamer.prepare(obtainable(backend))
    return streamed


def check_limit(vram_limit: int | None, streamer: Streamer, name: str) -> None:
    """Raise :class:`BudgetError` if ``vram_limit`` bytes have no room for the least that must be there."""
    least = streamer.least_limit_bytes
    if vram_limit is not None and vram_limit < least:
        # Rounded up to what the input takes, so that the value in the message works when typed in.
        gib = math.ceil(least / GIB / ROUND_GIB) * ROUND_GIB
        raise BudgetError(
            f"vram_limit_gb={vram_limit / GIB:.3g} is too small for {name}: its largest block and what lies outside of "
            f"blocks need at least {gib:.2f} (GiB). Set vram_limit_gb to that or more, or to 0 for automatic.",
            least,
        )


def model_dtype(module: torch.nn.Module, attribute: str, tensor: torch.Tensor) -> torch.dtype:
    """The dtype that the host built this tensor with, which a file's tensor that was only mapped may not have."""
    return noted_dtype(module, attribute) or tensor.dtype


def dtype_by_host(module: torch.nn.Module, attribute: str, tensor: torch.Tensor) -> torch.dtype:
    """The dtype in which the host's own loader leaves this tensor: with dynamic VRAM the file's, else the model's."""
    dynamic = comfy.memory_management.aimdo_enabled
    return tensor.dtype if dynamic else model_dtype(module, attribute, tensor)
