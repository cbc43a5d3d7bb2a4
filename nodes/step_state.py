"""Runs a step so that it can be run again, and gives what it would have given the first time.

[Note: a step that runs again]
A step runs again when it was out of memory, and when weights turned out to be needed elsewhere (streaming/runner.py,
shares.py). Nodes keep a state from step to step: caches that skip steps, counters, schedules, random generators, keys
and values of frames before. A second run must find all of that as the first one did. So before each step everything
that its code can get hold of is kept (reach.py, Note: what is reached), and put back as soon as the step has failed,
before memory is made or weights move. Keeping takes under a millisecond of the CPU for a model of a thousand modules,
and no wait for a device.

Of small tensors there is a copy. Of large ones on a device that the model runs on there is a fingerprint, which costs
one reading of them; if it has changed, the step is not run again. The same goes for whatever else cannot be put back:
the prompt fails with the reason, and the next one finds the room that was made. Large tensors in host memory are taken
to be unchanged while a model runs on a GPU, and what hooks of torch on modules have counted stays counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import torch

from ..streaming import StepNotRepeatedError
from ..streaming.runner import may_be_mended
from .generators import GeneratorStates
from .reach import MODULE, Kind, kind_of, telling_attributes
from .step_memory import Memory

T = TypeVar("T")

# An object, what it is, what was in it, and what has led to it.
Kept = tuple[Any, Kind, Any, str]

# A state of more objects than this is not looked through for each step.
MOST_OBJECTS = 20_000


class RepeatableStep(Generic[T]):
    """One step, which may be called again when it has failed (Note: a step that runs again).

    Args:
        forward: runs the step.
        before: what it can get hold of.
    """

    def __init__(self, forward: Callable[[], T], before: StepState) -> None:
        self._forward = forward
        self._before = before
        self._failed = False

    def __call__(self) -> T:
        """Run it.

        Raises:
            StepNotRepeatedError: it has run before, and has changed what cannot be put back; the message says what.
        """
        if self._failed:
            self._before.check()
        try:
            return self._forward()
        except Exception as error:
            if may_be_mended(error):  # Others are not for us, and who has raised them may want what they leave.
                self._failed = True
                self._before.put_back()
            raise


class StepState:
    """What can be reached from ``roots`` and ``modules``, as it is now.

    Args:
        roots: objects, by names for people.
        modules: those of the model.
        devices: of large tensors on these there are fingerprints.
    """

    def __init__(self, roots: Mapping[str, Any], modules: StepModules, devices: Sequence[torch.device]) -> None:
        self._obstacle = ""
        self._memory = Memory(devices)
        self._generators = GeneratorStates()
        self._kept, values = modules.keep()
        self._seen = modules.identities.copy()
        with torch.inference_mode():
            for name, root in roots.items():
                self._keep(name, [root])
            self._keep("a module of the model", values)

    def _keep(self, name: str, left: list[Any]) -> None:
        """Keep what can be reached from ``left``. Who is kept stays alive, so that no other has its identity."""
        seen = self._seen
        while left:
            value = left.pop()
            if id(value) in seen:
                continue
            if isinstance(value, torch.Tensor):
                seen.add(id(value))
                self._memory.keep(value, name)
            elif (kind := kind_of(value)) is not None:
                seen.add(id(value))
                try:
                    self._kept.append((value, kind, kind.keep(value), name))
                    left.extend(kind.parts(value))
                except Exception as error:  # Code of others, which runs where attributes are asked for.
                    self._obstacle = f"a {type(value).__name__} that {name} leads to cannot be kept ({error!r})"
            if len(seen) > MOST_OBJECTS:
                self._obstacle = f"more hangs on {name} than can be put back"
                return

    def put_back(self) -> None:
        """Have everything as it was; what cannot be had so is said by :meth:`check`."""
        with torch.inference_mode():
            for value, kind, kept, name in self._kept:
                try:
                    kind.put_back(value, kept)
                except Exception as error:
                    self._obstacle = f"a {type(value).__name__} that {name} leads to cannot be put back ({error})"
            self._memory.put_back()
            self._generators.restore()

    def check(self) -> None:
        """Raise :class:`StepNotRepeatedError` if not everything is as it was. Waits for the devices."""
        obstacle = self._obstacle or self._memory.changed()
        if obstacle:
            raise StepNotRepeatedError(
                f"a step failed, which the log tells of, and it cannot be run again: {obstacle}. There is more free "
                "memory now, so queue the prompt once more"
            )


class StepModules:
    """The modules below ``root``, which is looked through once for all steps that a MODEL is loaded for.

    Attributes:
        identities: of the modules.
    """

    def __init__(self, root: torch.nn.Module) -> None:
        modules = tuple(root.modules())
        self.identities = {*map(id, modules)}
        self._modules = [(module, vars(module)) for module in modules]
        self._known = [(-1, ())] * len(modules)

    def keep(self) -> tuple[list[Kept], list[Any]]:
        """What the modules' attributes are now, and what these lead to."""
        kept, values = [], []
        for number, (module, attributes) in enumerate(self._modules):
            size, names = self._known[number]
            if len(attributes) != size:
                names = telling_attributes(module)
                self._known[number] = len(attributes), names
            kept.append((module, MODULE, attributes.copy(), "the model"))
            if names:
                values.extend([value for name in names if (value := attributes.get(name)) is not None])
        return kept, values
