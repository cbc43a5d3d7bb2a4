"""A step of a MODEL on several GPUs: how it can be divided, what decides which kernels run, and the ways to run it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from enum import Enum
from functools import cached_property
from typing import Any

import torch

from ...streaming.parallel.cut import cut
from ..host.hosts import WrappersMP
from ..model.patcher import StreamedModelPatcher
from ..model.streamed_model import ATTRIBUTE
from ..state.step_state import StepState
from .dividing import Team, divided, in_turns, why_whole
from .host_threads import POOL, settled
from .pace import Pace, StepClock, clock_of, pace_of
from .step_kinds import describe, is_data, is_in_effect, make_of, names

CLONES = "multigpu_clones"
# The host's own, which change with the sigma; it tells all GPUs of that.
HOOKS = "registered_hooks"
# GPUs that share the prompts of a step in teams: fewer than two make none.
LEAST_TEAM = 2
GB = 1_000_000_000
# Our wrappers of what the host does in a run.
WRAPPER = "weightstream_parallel"
# Options that hold nothing which runs in a step, or which are looked at by themselves.
NOT_IN_STEPS = {
    *("transformer_options", "wrappers", "callbacks", HOOKS, "to_load_options", "multigpu_options"),
    "denoise_mask_function",
    *("sampler_cfg_function", "sampler_pre_cfg_function", "sampler_post_cfg_function"),
}
# Code of other nodes that the host calls in a step, by its names for their places.
PLACES_IN_STEPS = (WrappersMP.CALC_COND_BATCH, WrappersMP.APPLY_MODEL, WrappersMP.DIFFUSION_MODEL)

# Of a step: the model, conds, latents and sigma, as the host gives them, without its options.
Arguments = tuple[Any, list[Any], torch.Tensor, torch.Tensor]
Options = dict[str, Any]
Outputs = list[torch.Tensor]
Shares = tuple[float, ...]


class Way(Enum):
    """How a step is divided, the best way first: GPUs in teams compute prompts, and divide their tokens; each GPU
    computes prompts; or each a part of the tokens of all prompts."""

    TEAMS = "teams"
    PROMPTS = "prompts"
    TOKENS = "tokens"


class Step:
    """One step of a MODEL, to run on its GPUs at the same time or on the first of them.

    Args:
        executor: the host's function for a step.
        arguments, options: that the host calls it with.
        shares: of each GPU in the tokens.
    """

    def __init__(
        self, executor: Callable[..., Outputs], arguments: Arguments, options: Options, shares: Shares
    ) -> None:
        self._shares = shares
        self._executor = executor
        self._arguments = arguments
        self._options = options
        self._clones: Mapping[torch.device, Any] = options.get(CLONES) or {}
        self._patcher = getattr(arguments[0], "current_patcher", None)

    @property
    def is_ours(self) -> bool:
        """Whether there are several GPUs on which we have put the model."""
        ours = isinstance(self._patcher, StreamedModelPatcher) and bool(self._patcher.streamed.beside)
        return ours and len(self._clones) > 1

    def ways(self) -> tuple[list[Way], str]:
        """How this step can be divided, the best way first; if in none, why not."""
        if gave_up := self._patcher.streamed.gave_up:
            return [], gave_up
        whole = self._why_whole()
        possible = {
            Way.TEAMS: self._prompts > 1 and len(self._gpus) >= 2 * LEAST_TEAM and not whole,
            Way.PROMPTS: self._prompts > 1,
            Way.TOKENS: not whole,
        }
        ways = [way for way in Way if possible[way]]
        return ways, "" if ways else whole

    def _why_whole(self) -> str:
        if any(entry.get("hooks") is not None for _, entry in self._entries):
            return "a LoRA hangs on its conditioning"  # The host puts it on the first GPU alone.
        return why_whole(self._gpus, self._options)

    @property
    def _prompts(self) -> int:
        """How many prompts there are to compute, those of regions included."""
        return len(self._entries)

    def _teams(self, way: Way) -> list[Team]:
        """GPUs that divide tokens among them."""
        gpus = self._gpus
        count = min(self._prompts, len(gpus) // LEAST_TEAM) if way is Way.TEAMS else 1
        places = cut(len(gpus), [1.0] * count)
        return [Team([gpus[place] for place in team], [self._shares[place] for place in team]) for team in places]

    @property
    def _gpus(self) -> list[StreamedModelPatcher]:
        return [self._patcher, *(clone for clone in self._clones.values() if clone is not self._patcher)]

    @property
    def _options_of_one(self) -> Options:
        """With which the host computes all prompts itself."""
        return {name: value for name, value in self._options.items() if name not in (CLONES, POOL)}

    @cached_property
    def _entries(self) -> list[tuple[int, Mapping[str, Any]]]:
        """The prompts that are in effect at this step, those of regions included, with the number of their list. It is
        asked once: a sigma is on the GPU, and whether it is within a range waits for that."""
        _, conds, _, sigma = self._arguments
        all_entries = [(number, entry) for number, entries in enumerate(conds) for entry in entries or ()]
        return [(number, entry) for number, entry in all_entries if is_in_effect(entry, sigma)]

    def kind(self, way: Way | None) -> Hashable:
        """What decides which kernels run (Note: verified, not believed). None: of steps at all sigmas, in any way."""
        parts = self._shares if way is not Way.PROMPTS else ()
        # What another node has attached may do something else at each.
        moment = tuple(self._arguments[-1].tolist()) if way is not None and self._has_others else None
        return way, parts, moment, self._kind_in_any_way

    @cached_property
    def _kind_in_any_way(self) -> Hashable:
        model, _, x, sigma = self._arguments
        patcher = self._patcher
        entries = tuple((number, *describe(entry, sigma)) for number, entry in self._entries)
        devices = tuple(map(str, self._clones))
        about = (patcher.streamed.title, type(model).__qualname__, model.get_dtype_inference(), devices, make_of(model))
        attached = names(patcher.object_patches), names(patcher.injections), names(self._options_of_one)
        return about, tuple(x.shape), x.dtype, entries, attached

    @cached_property
    def _has_others(self) -> bool:
        """Whether another node has attached something that runs in a step."""
        options, patcher = self._options_of_one, self._patcher
        inner = options.get("transformer_options", {})
        attached = [value for each in (options, inner) for name, value in each.items() if name not in NOT_IN_STEPS]
        for wrappers in (options.get("wrappers", {}), inner.get("wrappers", {})):
            for place in PLACES_IN_STEPS:
                attached += [value for key, value in wrappers.get(place, {}).items() if key not in (ATTRIBUTE, WRAPPER)]
        attached += [value for name, value in patcher.object_patches.items() if name.startswith("diffusion_model.")]
        return bool(patcher.injections) or not is_data(attached)

    @property
    def clock(self) -> StepClock:
        return clock_of(self._patcher.model, self._patcher.streamer.backend)

    def pace(self, way: Way) -> Pace:
        """How fast steps of this kind are, with as many gigabytes of weights that stream to each GPU."""
        plans = [gpu.streamer.plan for gpu in self._gpus]
        streamed = tuple(plan and round(plan.streamed_bytes / GB) for plan in plans)
        return pace_of((way, self._shares if way is not Way.PROMPTS else (), streamed, self._kind_in_any_way))

    def course(self) -> list[tuple[object, object, int]]:
        """Of each GPU: its plan, what measures its step, and how often it has run one again."""
        streamers = [gpu.streamer for gpu in self._gpus]
        return [(one.plan, one.measuring.recorder, one.counters.reruns) for one in streamers]

    def alone(self) -> Outputs:
        """On the first GPU."""
        outputs = self._executor(*self._arguments, self._options_of_one)
        if any("hooks" in entry for _, entry in self._entries):
            self._forget_hooks()
        return outputs

    def _forget_hooks(self) -> None:
        """The host tells the MODEL alone when a LoRA on conditioning changes its strength: the others compute anew."""
        for clone in self._gpus[1:]:
            clone.cached_hook_patches.clear()
        self._take_hooks_off()

    def _take_hooks_off(self) -> None:
        """Another step may have left a LoRA on other GPUs: the host takes it off only where it gives them a prompt."""
        for clone in self._gpus[1:]:
            if clone.current_hooks is not None:
                clone.patch_hooks(None)

    def together(self, way: Way) -> Outputs:
        """On all of them."""
        if way is not Way.PROMPTS:
            self._take_hooks_off()
        if way is Way.TOKENS:
            outputs = self._executor(*self._arguments, divided(self._teams(way), self._options_of_one))
        else:
            with settled(self._options) as options:
                given = options if way is Way.PROMPTS else self._in_teams(options)
                outputs = self._executor(*self._arguments, in_turns(given))
        self._patcher.streamed.together += 1
        return outputs

    def _in_teams(self, options: Options) -> Options:
        """With which the host gives prompts to the first GPU of each team."""
        teams = self._teams(Way.TEAMS)
        first = [team.patchers[0] for team in teams]
        clones = {device: clone for device, clone in self._clones.items() if any(clone is one for one in first)}
        return divided(teams, {**options, CLONES: clones})

    def _state(self) -> StepState:
        """What others have attached, as it is now."""
        options = {name: value for name, value in self._options_of_one.items() if name != HOOKS}
        attached = options.pop("transformer_options", {})
        roots = options | {f"transformer_options[{name!r}]": value for name, value in attached.items()}
        patcher = self._patcher
        modules = patcher.streamed.step_modules(getattr(patcher.model, "diffusion_model", patcher.model))
        with patcher.streamer.backend.record.paused():
            wrappers = getattr(self._executor, "wrappers", None)
            return StepState({**roots, "a wrapper": wrappers}, modules, [patcher.load_device], patcher.streamer.written)

    def tell(self, alone: str) -> None:
        self._patcher.streamed.tell_of_parallel(alone, self._patcher.model)
