"""Runs a step so that it can be run again with the result that it would have had the first time.

[Note: a step that runs again]
A step runs again when it was out of memory, and when weights turned out to be needed elsewhere (streaming/runner.py,
model/sharing.py). Nodes keep state from step to step: caches that skip steps, counters, schedules, random generators,
keys and values of earlier frames. A second run must find all of that as the first one did. So before each step
everything that its code can get hold of is kept (reach.py, Note: what is reached), and put back as soon as the step has
failed, before memory is freed or weights move. Keeping takes about a millisecond of the CPU for a model of a thousand
modules, and no wait for a device.

Small tensors are copied, among them registered buffers of the model, which always lie on a device (model/blocks.py).
Large ones on a device that the model runs on get a fingerprint, which costs one reading of them; those in host memory
count how often they were written to, or are read as well. If one has changed, the step is not run again. The same holds
for weights that a block has written to, and for whatever else cannot be put back: the prompt fails with the reason.
What torch's hooks on modules have counted is not put back.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Generic, TypeVar

import torch

from ...streaming import StepNotRepeatedError, is_shown
from ...streaming.devices.backend import is_out_of_memory
from ...streaming.handoff.away import Away
from ...streaming.runner import may_be_mended
from ..host.generators import GeneratorStates
from .comparing import has_changed
from .kinds import Kind
from .reach import ATTRIBUTES, BUFFERS, MODULE, SMALL_BUFFER_BYTES, kind_of, telling_attributes
from .step_memory import Memory

T = TypeVar("T")

# An object, its kind, what was in it, and the name that has led to it.
Kept = tuple[Any, Kind, Any, str]

# A state of more objects than this is not looked through for each step.
MOST_OBJECTS = 20_000

# What to do about a step that cannot be run again, where it was out of memory and where it was not.
WITH_MEMORY = "More memory is free now, so queue the prompt once more."
AS_IT_IS = "Queue the prompt once more."


class RepeatableStep(Generic[T]):
    """One step, which may be called again when it has failed (Note: a step that runs again).

    Args:
        forward: runs the step.
        before: what it can get hold of, as it was before the step.
        name: of the model, for people.
    """

    def __init__(self, forward: Callable[[], T], before: StepState, name: str = "") -> None:
        self._forward = forward
        self._before = before
        self._name = name
        self._hint: str | None = None

    def __call__(self) -> T:
        """Run it.

        Raises:
            StepNotRepeatedError: it has run before, and has changed what cannot be put back; the message says what.
        """
        if self._hint is not None and (obstacle := self._before.obstacle()):
            raise StepNotRepeatedError(
                f"{self._name}: a step failed (the log says why) and cannot be run again, because {obstacle}. "
                f"{self._hint}"
            )
        try:
            return self._forward()
        except Exception as error:
            if may_be_mended(error):  # Other errors are not ours; their source may want the state as it is.
                self._hint = WITH_MEMORY if is_out_of_memory(error) else AS_IT_IS
                self._before.put_back()
            raise


class StepState:
    """What can be reached from ``roots`` and ``modules``, as it is now.

    Args:
        roots: objects, by names for people.
        modules: those of the model.
        devices: that the model runs on (step_memory.py).
        written: names of weights that somebody has written to since the model was loaded.
    """

    def __init__(
        self,
        roots: Mapping[str, Any],
        modules: StepModules,
        devices: Sequence[torch.device],
        written: Callable[[], Collection[str]] = frozenset,
    ) -> None:
        self._obstacle = ""
        self._memory = Memory(devices)
        self._generators = GeneratorStates()
        self._modules, self._written = modules, written
        if modules.written_before is None:
            modules.written_before = frozenset(written())
        self._kept, values = modules.keep()
        self._seen = modules.identities.copy()
        with torch.inference_mode():
            for buffer in modules.buffers():
                self._keep_buffer(buffer)
            for name, root in roots.items():
                self._keep(name, [root])
            self._keep("a module of the model", values)

    def _keep_buffer(self, buffer: torch.Tensor) -> None:
        self._seen.add(id(buffer))
        if buffer.nbytes <= SMALL_BUFFER_BYTES:
            self._memory.keep(buffer, "a buffer of the model")
        elif type(buffer) is torch.Tensor:
            self._memory.count(buffer, "a buffer of the model")

    def _keep(self, name: str, left: list[Any]) -> None:
        """Keep what can be reached from ``left``. A kept object stays alive, so that no other gets its identity."""
        seen = self._seen
        while left:
            value = left.pop()
            if id(value) in seen:
                continue
            if isinstance(value, torch.Tensor):
                seen.add(id(value))
                self._keep_tensor(value, name, left)
            elif (kind := kind_of(value)) is not None:
                seen.add(id(value))
                try:
                    self._kept.append((value, kind, kind.keep(value), name))
                    left.extend(kind.parts(value))
                    if kind is MODULE:
                        self._count(value, name)
                except Exception as error:  # Reading attributes may run code of others.
                    self._note(f"a {type(value).__name__} that {name} leads to cannot be kept ({error!r})")
            if len(seen) > MOST_OBJECTS:
                self._note(f"more hangs on {name} than can be put back")
                return

    def _keep_tensor(self, tensor: torch.Tensor, name: str, left: list[Any]) -> None:
        if isinstance(tensor, torch.nn.Parameter) and id(tensor) in self._modules.weights():
            return
        try:
            self._memory.keep(tensor, name)
        except Exception as error:
            self._note(f"a {type(tensor).__name__} that {name} leads to cannot be kept ({error!r})")
        if not isinstance(tensor, Away):
            left.append(vars(tensor))

    def _count(self, module: torch.nn.Module, name: str) -> None:
        """Weights of a module that somebody has added to the model are not copied: note how often they were written."""
        for parameter in module._parameters.values():
            if parameter is not None and not is_shown(parameter):
                self._seen.add(id(parameter))
                self._memory.count(parameter, name)

    def _note(self, obstacle: str) -> None:
        self._obstacle = self._obstacle or obstacle

    def put_back(self) -> None:
        """Put everything back as it was; :meth:`obstacle` returns what cannot be put back."""
        written = sorted(set(self._written()) - (self._modules.written_before or frozenset()))
        if written:
            self._note(f"{written[0]}, a weight of the model, was written to in it")
        with torch.inference_mode():
            self._memory.put_back()
            for value, kind, kept, name in self._kept:
                try:
                    kind.put_back(value, kept)
                except Exception as error:
                    self._note(f"a {type(value).__name__} that {name} leads to cannot be put back ({error})")
            self._generators.restore()

    def changed(self) -> str:
        """What is not as it was, which is left as it is; empty where everything is. Waits for the devices."""
        if self._obstacle:
            return self._obstacle
        written = sorted(set(self._written()) - (self._modules.written_before or frozenset()))
        if written:
            return f"{written[0]}, a weight of the model, was written to"
        for value, kind, kept, name in self._kept:
            try:
                if has_changed(value, kind, kept):
                    return f"a {type(value).__name__} that {name} leads to has changed"
            except Exception as error:  # Reading attributes may run code of others.
                return f"a {type(value).__name__} that {name} leads to cannot be compared ({error!r})"
        if self._generators.drawn():
            return "it has drawn random numbers"
        return self._memory.written() or self._memory.changed()

    def obstacle(self) -> str:
        """What is not as it was; empty where everything is. Waits for the devices."""
        return self._obstacle or self._memory.changed()


class StepModules:
    """The modules below ``root``, collected once for all steps for which a MODEL is loaded.

    Attributes:
        identities: of the modules.
        written_before: weights that somebody had written to before the first step; None before that.
    """

    def __init__(self, root: torch.nn.Module) -> None:
        modules = tuple(root.modules())
        self.identities = {*map(id, modules)}
        self.written_before: frozenset[str] | None = None
        self._modules = [(module, vars(module), module._buffers) for module in modules]
        self._known = [(-1, ())] * len(modules)
        self._kinds = [*{type(module) for module in modules}]
        self._weights: set[int] = set()

    def keep(self) -> tuple[list[Kept], list[Any]]:
        """What the modules' attributes are now, and what these lead to."""
        kept, values = [], self._kinds.copy()
        self._weights.clear()
        for number, (module, attributes, buffers) in enumerate(self._modules):
            size, names = self._known[number]
            if len(attributes) != size:
                names = telling_attributes(module)
                self._known[number] = len(attributes), names
            kept.append((module, ATTRIBUTES, attributes.copy(), "the model"))
            if buffers:
                kept.append((module, BUFFERS, buffers.copy(), "the model"))
            if names:
                values.extend([value for name in names if (value := attributes.get(name)) is not None])
        return kept, values

    def buffers(self) -> list[torch.Tensor]:
        """All that are registered now."""
        return [one for _, _, buffers in self._modules if buffers for one in buffers.values() if one is not None]

    def weights(self) -> set[int]:
        """Identities of the model's parameters."""
        if not self._weights:
            self._weights = {id(one) for module, _, _ in self._modules for one in module._parameters.values()}
        return self._weights
