"""A step of a MODEL whose tokens are divided among its GPUs.

[Note: every GPU runs the step]
Each GPU has the whole model (nodes/parallel/copies.py), and runs all of the host's code for the step with arguments of
its own: the time embedding, the blocks, what is before and behind them. Blocks of known kinds (families.py) get the
tokens of their GPU alone, which is nearly all of the work. The rest is done by each GPU again, and costs little. What
the first GPU gives is the result.

What other nodes have put into a step would run once on each GPU, with tokens that are not all there. So a step is
divided only where nothing of that kind is in it; :func:`why_whole` names what is.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from ...streaming import Backend
from ...streaming.parallel.exchange import Exchange, Wires
from ...streaming.parallel.relay import Relay, Workers
from ...streaming.parallel.tokens import TokenPart
from ...streaming.parallel.turns import Turns
from ...streaming.split.links import Links
from ..host.hosts import COMPILE_KEY, WrappersMP
from ..model.parts import links
from ..model.patcher import StreamedModelPatcher
from ..model.streamed_model import ATTRIBUTE
from .families import lists_of_blocks

OVERRIDE = "optimized_attention_override"
# Wrappers of what is around a step or in it, by the host's names for their places.
AROUND_STEPS = (WrappersMP.APPLY_MODEL, WrappersMP.DIFFUSION_MODEL)

_workers = Workers()
# The wires between GPUs, by the model on the first and the names of all.
_wires: weakref.WeakKeyDictionary[torch.nn.Module, dict[tuple[str, ...], Wires]] = weakref.WeakKeyDictionary()


class Team(NamedTuple):
    """GPUs that divide the tokens of the prompts that the first of them is given.

    Attributes:
        patchers: of the MODEL on each.
        shares: of each in the tokens.
    """

    patchers: Sequence[StreamedModelPatcher]
    shares: Sequence[float]


def why_whole(patchers: Sequence[StreamedModelPatcher], options: Mapping[str, Any]) -> str:
    """Why the tokens of a step cannot be divided; empty where they can.

    Args:
        patchers: of the MODEL on each GPU.
        options: the host's ``model_options``.
    """
    model = patchers[0].model
    inner = options.get("transformer_options", {})
    if not any(True for _ in lists_of_blocks(model.diffusion_model)):
        return f"nothing is known of what {type(model).__name__} does with tokens"
    for name in ("patches", "patches_replace"):
        if found := [key for key, value in inner.get(name, {}).items() if value]:
            return f"a node has put {', '.join(map(str, found))} into its blocks, which would see a part of the tokens"
    for place in AROUND_STEPS:
        if theirs := [
            key for key, value in inner.get("wrappers", {}).get(place, {}).items() if value and key != ATTRIBUTE
        ]:
            return f"a node ({', '.join(map(str, theirs))}) runs code around its steps, which would run on each GPU"
    if any(COMPILE_KEY in each for each in inner.get("wrappers", {}).values()):
        return "it is compiled"
    return ""


def divided(teams: Sequence[Team], options: Mapping[str, Any]) -> dict[str, Any]:
    """``options``, the host's ``model_options``, with which the tokens of a step are divided among the GPUs of each
    team."""
    wrappers = options.get("transformer_options", {}).get("wrappers", {})
    return _around_calls(options, "weightstream_tokens", partial(_run, teams, wrappers))


def in_turns(options: Mapping[str, Any]) -> dict[str, Any]:
    """``options``, the host's ``model_options``, with which the GPUs that it gives prompts, or the teams, run by
    turns (turns.py)."""
    return _around_calls(options, "weightstream_turns", partial(_run_in_turns, Turns()))


def _around_calls(options: Mapping[str, Any], name: str, wrapper: Callable[..., Any]) -> dict[str, Any]:
    """``options`` with which the host calls ``wrapper`` around each call of the model, and of its copies."""
    inner = dict(options.get("transformer_options", {}))
    wrappers = {place: dict(found) for place, found in inner.get("wrappers", {}).items()}
    # In front of the wrapper that streams the first GPU's part.
    wrappers[WrappersMP.APPLY_MODEL] = {name: [wrapper], **wrappers.get(WrappersMP.APPLY_MODEL, {})}
    inner["wrappers"] = wrappers
    return {**options, "transformer_options": inner}


def _run_in_turns(turns: Turns, executor: Any, *args: Any, **kwargs: Any) -> Any:
    patcher = getattr(executor.class_obj, "current_patcher", None)
    # A compiled model would be compiled anew for hooks on its blocks: it has one turn for all of them.
    streamer = patcher.streamer if isinstance(patcher, StreamedModelPatcher) else None
    blocks = [] if streamer is None or streamer.planner.compiled else streamer.blocks.blocks
    return turns.run(partial(executor, *args, **kwargs), [block.module for block in blocks])


def _run(
    teams: Sequence[Team],
    wrappers: Mapping[str, Any],
    executor: Any,
    x: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> torch.Tensor:
    """One call of the model. The host calls this with the arguments of its ``apply_model``."""
    patchers, shares = next(team for team in teams if team.patchers[0].model is executor.class_obj)
    backends = [patcher.streamer.backend for patcher in patchers]
    relay = Relay([backend.name for backend in backends])
    exchange = Exchange(_wires_of(patchers[0].model, backends), relay)
    parts = [TokenPart(number, shares, exchange) for number in range(len(patchers))]
    calls = []
    for patcher, backend, part in zip(patchers, backends, parts, strict=True):
        # Before anything is queued on the first GPU: copies out of it wait for that.
        given = (x, args, kwargs) if part is parts[0] else moved((x, args, kwargs), backend.device)
        run = executor if part is parts[0] else patcher.model.apply_model
        calls.append(partial(_run_part, part, patcher, run, given, wrappers))
    return relay.run(calls, _workers)[0]


def _run_part(
    part: TokenPart,
    patcher: StreamedModelPatcher,
    run: Callable[..., torch.Tensor],
    given: tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]],
    wrappers: Mapping[str, Any],
) -> torch.Tensor:
    x, args, kwargs = given
    args = tuple(_of_part(value, part, wrappers) for value in args)
    kwargs = {name: _of_part(value, part, wrappers) for name, value in kwargs.items()}
    root = patcher.model.diffusion_model
    with patcher.streamer.backend.current(), part.watching(root, list(lists_of_blocks(root))):
        return run(x, *args, **kwargs)


def _of_part(value: Any, part: TokenPart, wrappers: Mapping[str, Any]) -> Any:
    """The transformer's options for one GPU, without the wrapper that divides; another argument as it is."""
    if not (isinstance(value, dict) and "wrappers" in value):
        return value
    theirs = value.get(OVERRIDE)
    attention = part.attention if theirs is None else partial(_attend_with, part, theirs)
    return {**value, "wrappers": dict(wrappers), OVERRIDE: attention}


def _attend_with(part: TokenPart, theirs: Callable[..., Any], attend: Callable[..., Any], *args: Any, **kw: Any) -> Any:
    """Attention by the function that another node has put in the place of the host's."""
    return part.attention(partial(theirs, attend), *args, **kw)


def _wires_of(model: torch.nn.Module, backends: list[Backend]) -> Wires:
    known, names = _wires.setdefault(model, {}), tuple(backend.name for backend in backends)
    found = known.get(names)
    if found is None or list(found.backends) != backends:
        found = known[names] = Wires(backends, links)
    return found


def moved(value: Any, device: torch.device, links: Links = links) -> Any:
    """``value`` with its tensors on ``device``, in containers of its own; what else it holds is the same."""
    if isinstance(value, torch.Tensor):
        return links.move(value, device)
    if type(value) is dict:
        return {name: moved(each, device, links) for name, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(moved(each, device, links) for each in value)
    return value
