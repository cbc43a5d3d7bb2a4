"""Steps in parallel that give the bits of one GPU, or do not run in parallel (copies.py).

[Note: verified, not believed]
Two GPUs with a prompt each compute a batch of one where one GPU computes a batch of two. On GPUs the products of most
models come out the same, to the bit; on others, and on CPUs, they do not, and nobody promises it. ComfyUI also adds
up the regions of a prompt in another order. So the first step of each kind runs both ways: on the first GPU alone,
which is the truth, and on all of them. A kind is what decides which kernels run: the model, dtypes, shapes, which
prompts are in effect, the GPUs, and what is attached. If all bits are the same, later steps of this kind run in
parallel; else on one GPU, and the node says so. What was found out is kept for the process. Bits that differ are looked
at twice: the first attention that an H200 computes in a process gives other bits than any later one, in ComfyUI too.

A step runs a second time only if the first one has left everything that it can reach as it was (state/comparing.py).
If not, some node keeps state from step to step, as caches that skip steps do. Two threads would share it, in no
certain order, so that later steps could differ where the first did not: such a MODEL works on one GPU. Some begin to
keep state in a later step than the first, or to act at all. So where another node has attached something, steps are
verified at each sigma, and each later one is looked at in this way; one that has changed anything is taken back, and
runs on one GPU.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping
from enum import Enum
from functools import cached_property
from typing import Any

import torch
from comfy.controlnet import ControlBase

from ...streaming import BudgetError, StepNotRepeatedError, StreamingError
from ...streaming.devices.backend import is_out_of_memory
from ...streaming.parallel.cut import cut
from ...streaming.parallel.relay import HeldUpError
from ...streaming.parallel.tokens import UndividedError
from ..host.hosts import WrappersMP
from ..model.patcher import PARALLEL, StreamedModelPatcher
from ..model.streamed_model import ATTRIBUTE
from ..state.step_state import AS_IT_IS, StepState
from ..twins.takeover import refer_to_its_modules
from .dividing import Team, divided, why_whole
from .host_threads import POOL, settled
from .step_kinds import describe, is_data, is_in_effect, make_of, names
from .verdicts import verdicts

logger = logging.getLogger(__name__)

CLONES = "multigpu_clones"
# The host's own, which change with the sigma; it tells all GPUs of that.
HOOKS = "registered_hooks"
# GPUs that share the prompts of a step in teams: fewer than two make none.
LEAST_TEAM = 2
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
KEEPS_STATE = "some node keeps state from step to step"
OTHER_BITS = "a step gave other bits than on one GPU"

# Of a step: the model, conds, latents and sigma, as the host gives them, without its options.
Arguments = tuple[Any, list[Any], torch.Tensor, torch.Tensor]
Options = dict[str, Any]
Outputs = list[torch.Tensor]
Shares = tuple[float, ...]


def prepare(executor: Callable[..., Any], model: Any, *arguments: Any, **named: Any) -> Any:
    """Before a run: leave the other GPUs out where they cannot have what the run needs. The host calls this."""
    copies = model.get_additional_models_with_key(PARALLEL)
    if not (copies and isinstance(model, StreamedModelPatcher) and model.streamed.beside):
        return executor(model, *arguments, **named)
    if not (reason := _why_alone(model, *arguments)):
        try:
            return executor(model, *arguments, **named)
        except Exception as error:
            if not _has_no_room(error):
                raise
            reason = _no_room(model, error)
    copies = model.get_additional_models_with_key(PARALLEL)
    model.remove_additional_models(PARALLEL)
    try:
        model.streamed.tell_of_parallel(reason, model.model)
        return executor(model, *arguments, **named)
    finally:
        model.set_additional_models(PARALLEL, copies)


def _no_room(patcher: StreamedModelPatcher, error: Exception) -> str:
    logger.warning("[WeightStream] %s: %s", patcher.streamed.title, str(error))
    return f"there is no room for it on all of {', '.join(patcher.streamed.beside)}"


def _why_alone(model: StreamedModelPatcher, noise_shape: Any, conds: Mapping[str, Any], *_: Any) -> str:
    controls = [entry["control"] for entries in conds.values() for entry in entries or () if "control" in entry]
    while controls:
        control = controls.pop()
        if getattr(type(control), "deepclone_multigpu", None) in (None, ControlBase.deepclone_multigpu):
            return f"{type(control).__name__}, which its prompts use, cannot be had on another GPU"
        controls += filter(None, [getattr(control, "previous_controlnet", None)])
    # The host puts these into the models of the other GPUs too.
    exchanged = {"object_patches": model.object_patches, "injections": model.injections}
    if found := refer_to_its_modules(model, exchanged):
        return f"what a node has attached to it ({', '.join(found)}) refers to the modules of the first GPU's model"
    try:
        model.match_multigpu_clones()
    except Exception as error:  # Whatever loaders of other packs do.
        return f"what is attached to it cannot be had on another GPU ({type(error).__name__}: {error})"
    return ""


def run_exact(shares: Shares, executor: Callable[..., Outputs], *arguments: Any) -> Outputs:
    """A step on several GPUs at the same time if its bits are those of one GPU; else on one. The host calls this, but
    for ``shares``: of each GPU in the tokens."""
    *given, options = arguments
    step = _Step(executor, tuple(given), options, shares)
    if not step.is_ours:
        return executor(*arguments)
    if reason := verdicts.of(step.kind(None)):
        return step.alone_because(reason)
    ways, reason = step.ways()
    for way in ways:
        verdict = verdicts.of(step.kind(way))
        if verdict is None:
            return step.first(way, reason, is_last=way is ways[-1])
        if not verdict:
            return step.together_or_alone(way)
        reason = reason or verdict
    return step.alone_because(reason)


def run_close(shares: Shares, executor: Callable[..., Outputs], *arguments: Any) -> Outputs:
    """A step on several GPUs at the same time, whatever its bits. The host calls this, but for ``shares``."""
    *given, options = arguments
    step = _Step(executor, tuple(given), options, shares)
    if not step.is_ours:
        return executor(*arguments)
    ways, reason = step.ways()
    return step.together_or_alone(ways[0], is_verified=False) if ways else step.alone_because(reason)


class Way(Enum):
    """How a step is divided, the best way first: GPUs in teams compute prompts, and divide their tokens; each GPU
    computes prompts; or each a part of the tokens of all prompts."""

    TEAMS = "teams"
    PROMPTS = "prompts"
    TOKENS = "tokens"


class _Step:
    """One step of a MODEL, to run on its GPUs at the same time or on the first of them."""

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

    # -- both ways -----------------------------------------------------------------------------------------------------

    def alone(self) -> Outputs:
        """On the first GPU."""
        outputs = self._executor(*self._arguments, self._options_of_one)
        if any("hooks" in entry for _, entry in self._entries):
            self._forget_hooks()
        return outputs

    def alone_because(self, reason: str) -> Outputs:
        """On the first GPU, which is said unless other steps of this run have more to do."""
        if not self._patcher.streamed.together:
            self.tell(reason)
        return self.alone()

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
                outputs = self._executor(*self._arguments, options if way is Way.PROMPTS else self._in_teams(options))
        self._patcher.streamed.together += 1
        return outputs

    def _in_teams(self, options: Options) -> Options:
        """With which the host gives prompts to the first GPU of each team."""
        teams = self._teams(Way.TEAMS)
        first = [team.patchers[0] for team in teams]
        clones = {device: clone for device, clone in self._clones.items() if any(clone is one for one in first)}
        return divided(teams, {**options, CLONES: clones})

    def together_or_alone(self, way: Way, is_verified: bool = True) -> Outputs:
        """On all of them; if that fails, for lack of memory say, on the first until the MODEL is loaded for the next
        run. A step of a kind that was not verified may have changed what it can reach: then its failure is raised."""
        before = None if is_verified and not self._has_others else self._state()
        outputs: Outputs | None
        try:
            outputs = self.together(way)
        except Exception as error:
            if (reason := self._why_given_up(error)) is None or (before is not None and before.changed()):
                raise
            self._give_up(error, reason)
            outputs = None
        if outputs is None:
            return self.alone()  # Out here: the error, which is gone now, has kept what the GPUs had computed.
        if is_verified and before is not None and (changed := before.changed()):
            return self._taken_back(before, changed)
        self.tell("")
        return outputs

    def _taken_back(self, before: StepState, changed: str) -> Outputs:
        """What one GPU gives, for a step in which GPUs have shared what a node keeps: none of that is left."""
        before.put_back()
        if obstacle := before.obstacle():
            raise StepNotRepeatedError(
                f"{self._patcher.streamed.title}: {_shared(changed)}. The step cannot be run again on one "
                f"GPU, because {obstacle}. {AS_IT_IS}"
            )
        reason = _shared(changed)
        verdicts.keep(self.kind(None), reason)
        self.tell(reason)
        return self.alone()

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

    def first(self, way: Way, reason: str, is_last: bool) -> Outputs:
        """The first step of its kind, both ways. ``reason``: why it was not divided in a better way; ``is_last``: there
        is none that is not so good."""
        outputs, verdict = self._verify(way)
        if verdict is not None:
            keeps_state = verdict.startswith(KEEPS_STATE)
            verdicts.keep(self.kind(None if keeps_state else way), verdict)
            if is_last or keeps_state or not verdict:
                self.tell(verdict and (reason or verdict))
        return outputs

    def _why_given_up(self, error: Exception) -> str | None:
        """Why a step that failed with this is run on one GPU; None where it would fail there too."""
        if isinstance(error, (HeldUpError, UndividedError)):
            return f"its tokens cannot be divided ({error})"
        if _has_no_room(error):
            return f"there is no room for it on all of {', '.join(self._patcher.streamed.beside)}"
        return None

    def _give_up(self, error: Exception, reason: str) -> None:
        logger.warning("[WeightStream] %s: %s", self._patcher.streamed.title, str(error))
        self._patcher.streamed.gave_up = reason
        self.tell(reason)

    def _verify(self, way: Way) -> tuple[Outputs, str | None]:
        """Run it both ways; returns what one GPU gives, and a verdict, or None where there is none for next time."""
        outputs, verdict = self._compare(way)
        if verdict is not None and verdict.startswith(OTHER_BITS) and not self._has_others:
            _, verdict = self._compare(way)  # What a GPU computes first may differ from all that it computes later.
        return outputs, verdict

    def _compare(self, way: Way) -> tuple[Outputs, str | None]:
        before = self._state()
        expected = self.alone()
        if changed := before.changed():
            return expected, _shared(changed)
        try:
            found = self.together(way)
        except Exception as error:
            if (reason := self._why_given_up(error)) is None:
                raise
            before.put_back()
            if isinstance(error, UndividedError):
                return expected, reason
            self._give_up(error, reason)
            return expected, None
        if changed := before.changed():
            before.put_back()
            return expected, _shared(changed)
        if all(map(_same_bits, found, expected)):
            return expected, ""
        most = max(float((one - other).abs().max()) for one, other in zip(found, expected, strict=True))
        return expected, f"{OTHER_BITS} (by {most:.1e} at most)"

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


def _shared(what: str) -> str:
    return f"{KEEPS_STATE} ({what}), which GPUs would share"


def _has_no_room(error: Exception) -> bool:
    return is_out_of_memory(error) or isinstance(error, BudgetError) or _is_for_lack_of_room(error)


def _is_for_lack_of_room(error: BaseException | None) -> bool:
    """Whether one of our errors follows from a lack of memory."""
    while isinstance(error, StreamingError):
        error = error.__cause__
        if error is not None and is_out_of_memory(error):
            return True
    return False


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
