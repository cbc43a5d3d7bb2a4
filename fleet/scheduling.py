"""Which prompt a GPU takes next. Pure: states come in as values.

[Note: homes]
Each waiting prompt has a home: the worker that has most of its models loaded, and of those with as much, the one that
would have least to unload. A worker that is free takes the first waiting prompt whose home it is. So the prompts of a
home run in the order of the queue, which has priorities as ComfyUI has them, and no prompt waits for ever: it is the
first of its home's at some time, whatever comes behind it.

A free worker for which nothing waits may take the first prompt of another's, though that costs it a change of models.
It does where what waits for the other takes clearly longer than the change. So GPUs do not idle beside a long queue,
and two models that do not fit together are not exchanged for the sake of a few seconds.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

# Until it was measured: how fast models are loaded, and how long a prompt takes.
LOAD_BYTES_PER_SECOND = 2e9
PROMPT_SECONDS = 10.0
# What a worker drops for a stranger's prompt it may have to load again.
CHANGES = 2


class ModelFile(NamedTuple):
    """A file that a prompt loads: the kind of folder, its name there, and its size."""

    folder: str
    name: str
    nbytes: int


@dataclass(frozen=True)
class Waiting:
    """A prompt that waits.

    Attributes:
        id: the prompt's.
        files: the models that it loads.
        excluded: workers that must not run it: it died with them, or they refused it.
    """

    id: str
    files: frozenset[ModelFile] = frozenset()
    excluded: frozenset[str] = frozenset()


@dataclass(frozen=True)
class WorkerView:
    """What is known of a worker that is up.

    Attributes:
        busy_seconds: for how long its prompt runs; None where it is free.
        loaded: the models of its last prompt.
        missing: models that its host does not have.
        prompt_seconds: how long its prompts took lately.
        load_rate: bytes per second at which it loaded models lately.
    """

    name: str
    busy_seconds: float | None = None
    loaded: frozenset[ModelFile] = frozenset()
    missing: frozenset[tuple[str, str]] = frozenset()
    prompt_seconds: float = PROMPT_SECONDS
    load_rate: float = LOAD_BYTES_PER_SECOND

    @property
    def free(self) -> bool:
        return self.busy_seconds is None

    @property
    def seconds_left(self) -> float:
        """Of its prompt. One that takes longer than usual is expected to take as long again."""
        busy = self.busy_seconds or 0.0
        return self.prompt_seconds - busy if busy < self.prompt_seconds else busy

    def can_run(self, prompt: Waiting) -> bool:
        has_all = not any((file.folder, file.name) in self.missing for file in prompt.files)
        return has_all and self.name not in prompt.excluded


def total(files: Collection[ModelFile]) -> int:
    return sum(file.nbytes for file in files)


def home_of(prompt: Waiting, workers: Sequence[WorkerView]) -> WorkerView | None:
    """The worker that a prompt belongs to; None where none of them can run it (Note: homes)."""
    able = [worker for worker in workers if worker.can_run(prompt)]
    if not able:
        return None
    return min(
        able,
        key=lambda worker: (
            -total(worker.loaded & prompt.files),
            total(worker.loaded - prompt.files),
            not worker.free,
            worker.name,
        ),
    )


def choose(worker: WorkerView, workers: Sequence[WorkerView], waiting: Sequence[Waiting]) -> Waiting | None:
    """What a free worker takes next; None where it is better off waiting.

    Args:
        worker: one of ``workers``, which are all that are up.
        waiting: in the order of the queue.
    """
    homes = [home_of(prompt, workers) for prompt in waiting]
    for prompt, home in zip(waiting, homes, strict=True):
        if home is worker:
            return prompt
    for prompt, home in zip(waiting, homes, strict=True):
        if home is None or home.free or not worker.can_run(prompt):
            continue
        backlog = sum(other is home for other in homes) * home.prompt_seconds
        backlog += home.seconds_left
        if backlog > CHANGES * total(prompt.files - worker.loaded) / worker.load_rate:
            return prompt
    return None
