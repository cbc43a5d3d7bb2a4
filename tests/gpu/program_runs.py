"""Which programs of this folder run in which host, and when (programs.py)."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import programs

# A run and one of its programs.
Case = tuple[str, str]
MOST_AT_ONCE = 6


class Run(NamedTuple):
    """Programs in one host.

    Attributes:
        names: of the programs, in the order in which they run.
        flags: of the host.
        gpus: that it takes.
        variables: of the environment.
        alone: nothing else may run meanwhile, since it fills a GPU or keeps it busy.
    """

    names: str
    flags: tuple[str, ...] = ()
    gpus: int = 1
    variables: tuple[tuple[str, str], ...] = ()
    alone: bool = False


STATIC = ("--disable-dynamic-vram",)
TWO, THROUGH_RAM = ("WEIGHTSTREAM_SOAK_DEVICES", "2"), ("WEIGHTSTREAM_PEER", "0")
# Those that take the longest begin first. A host more takes as long as a program or two, on cores that are idle, so no
# host has all programs. The soak has faults planted in its host, which is why it has one of its own.
RUNS = {
    "dynamic": Run("host settings quantised sharing"),
    "one-stream": Run("host settings quantised", ("--async-offload", "1")),
    "static": Run("host settings quantised", STATIC),
    "dynamic-others": Run("encoders placement recordings"),
    "static-others": Run("encoders placement", STATIC),
    "soak-dynamic": Run("soak"),
    "soak-static": Run("soak", STATIC),
    "soak-dynamic-2": Run("soak", (), 2, (TWO,)),
    "soak-static-2": Run("soak", STATIC, 2, (TWO,)),
    **{f"families-{part}": Run("families", STATIC, 2, (("FAMILIES", f"{part}/4"),)) for part in range(1, 5)},
    "parallel-static": Run("parallel", STATIC, 2),
    "parallel-dynamic": Run("parallel", (), 2),
    "parallel-static-through-ram": Run("parallel", STATIC, 2, (THROUGH_RAM,)),
    # Processes take turns on a GPU, and one that waits for its own kernels would wait for all.
    "late": Run("late", STATIC, alone=True),
    "split-static": Run("split", STATIC, 2, alone=True),
    "split-dynamic": Run("split", (), 2, alone=True),
    "split-static-through-ram": Run("split", STATIC, 2, (THROUGH_RAM,), alone=True),
    "split-dynamic-through-ram": Run("split", (), 2, (THROUGH_RAM,), alone=True),
}
# Where the user says so, nothing goes straight.
EXPECTED = {"split-static-through-ram": ["links verified"], "split-dynamic-through-ram": ["links verified"]}
# In the order in which they end, about: a run's next program begins when the one before it has ended.
ROUNDS = zip_longest(
    *[[(name, program) for program in run.names.split()] for name, run in RUNS.items() if not run.alone]
)
CASES: list[Case] = [case for found in ROUNDS for case in found if case is not None]
CASES += [(name, program) for name, run in RUNS.items() if run.alone for program in run.names.split()]


class Findings:
    """What programs find.

    Args:
        wanted: the runs and their programs, in the order in which they begin.
    """

    def __init__(self, wanted: Iterable[Case]) -> None:
        self._futures: dict[Case, Future[dict[str, Any]]] = {case: Future() for case in wanted}
        self._quiet, self._began = threading.Event(), 0.0

    @property
    def runs(self) -> list[str]:
        """Their names."""
        return list(dict.fromkeys(name for name, _ in self._futures))

    def of(self, run: str, program: str) -> dict[str, Any]:
        """What the program has found, when it has ended. Who waits for one that runs alone does nothing else."""
        if RUNS[run].alone:
            self._quiet.set()
        return self._futures[run, program].result()

    def find(self, folders: dict[str, Path], over: threading.Event) -> None:
        """Run all of them in empty ``folders``, until it is ``over``. Each gets a result, or what has prevented it."""
        self._began = time.monotonic()
        try:
            self._run_all(folders, over)
        except BaseException as error:
            _fail(self._futures.values(), error)
            raise
        _fail(self._futures.values(), RuntimeError("the tests were stopped"))

    def _run_all(self, folders: dict[str, Path], over: threading.Event) -> None:
        """Several hosts at once. Those that are to be alone start meanwhile, and each waits for its turn."""
        at_once = min(MOST_AT_ONCE, max(1, (os.cpu_count() or 1) // 2))
        with ThreadPoolExecutor(at_once) as pool:
            together = [pool.submit(self._run, name, folders, over) for name in self.runs if not RUNS[name].alone]
            alone = []
            for name in self.runs:
                if RUNS[name].alone:
                    turn = threading.Event()
                    alone.append((turn, pool.submit(self._run, name, folders, over, turn)))
            wait(together)
            while alone and not over.is_set() and not self._quiet.wait(programs.LOOK_SECONDS):
                pass
            for turn, ended in alone:
                turn.set()
                ended.result()

    def _run(
        self, name: str, folders: dict[str, Path], over: threading.Event, turn: threading.Event | None = None
    ) -> None:
        run = RUNS[name]
        wanted = {program: future for (one, program), future in self._futures.items() if one == name}

        def tell(program: str, found: dict[str, Any]) -> None:
            wanted[program].set_result(found | {"at": time.monotonic() - self._began})

        try:
            programs.run_all(
                wanted,
                os.environ["COMFYUI_PATH"],
                folders[name],
                run.flags,
                tell,
                over,
                turn,
                **dict(run.variables),
            )
        except Exception as error:
            _fail(wanted.values(), error)


def _fail(futures: Iterable[Future[dict[str, Any]]], error: BaseException) -> None:
    for future in futures:
        if not future.done():
            future.set_exception(error)
