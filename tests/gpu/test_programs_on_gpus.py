"""The programs of this folder, in as few processes as there are hosts that differ in their flags (programs.py).

``WEIGHTSTREAM_SOAK_PROMPTS=200`` asks the soak for more. Where pytest has several workers, one must have this whole
file (``--dist loadfile``).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import programs
import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

# By run and program.
Findings = dict[tuple[str, str], "Future[dict[str, Any]]"]


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
# The soak has faults planted in its host, which is why it has one of its own.
RUNS = {
    "static": Run("host settings quantised encoders placement", STATIC),
    "dynamic": Run("host settings quantised encoders placement recordings"),
    "one-stream": Run("host settings quantised", ("--async-offload", "1")),
    "soak-static": Run("soak", STATIC),
    "soak-dynamic": Run("soak"),
    "soak-static-2": Run("soak", STATIC, 2, (TWO,)),
    "soak-dynamic-2": Run("soak", (), 2, (TWO,)),
    **{f"families-{part}": Run("families", STATIC, 2, (("FAMILIES", f"{part}/4"),)) for part in range(1, 5)},
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
CASES = [case for found in ROUNDS for case in found if case is not None]
CASES += [(name, program) for name, run in RUNS.items() if run.alone for program in run.names.split()]
MOST_AT_ONCE = 6


@pytest.fixture(scope="session")
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Findings]:
    """What those programs find that tests of this session are about: all run from now on, several hosts at once."""
    findings: Findings = {}
    for item in request.session.items:
        if isinstance(item, pytest.Function) and item.function is test_a_program_finds_no_difference:
            name, program = item.callspec.params["run"], item.callspec.params["program"]
            if RUNS[name].gpus <= torch.cuda.device_count():
                findings[name, program] = Future()
    folders = {name: tmp_path_factory.mktemp(name) for name, _ in findings}
    torch.cuda.empty_cache()
    over = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(_run_all, findings, folders, over)
        try:
            yield findings
        finally:
            over.set()  # Whatever still runs is wanted no more.


def _run_all(findings: Findings, folders: dict[str, Path], over: threading.Event) -> None:
    """Give each of the ``findings`` its result, or the error that has prevented it."""
    try:
        _start_all(findings, folders, over)
    except BaseException as error:
        _fail(findings.values(), error)
        raise
    _fail(findings.values(), RuntimeError("the tests were stopped"))


def _fail(futures: Iterable[Future[dict[str, Any]]], error: BaseException) -> None:
    for future in futures:
        if not future.done():
            future.set_exception(error)


def _start_all(findings: Findings, folders: dict[str, Path], over: threading.Event) -> None:
    def start(name: str) -> None:
        run = RUNS[name]
        wanted = {program: future for (one, program), future in findings.items() if one == name}
        try:
            programs.run_all(
                wanted,
                os.environ["COMFYUI_PATH"],
                folders[name],
                run.flags,
                lambda program, what: wanted[program].set_result(what),
                over,
                **dict(run.variables),
            )
        except Exception as error:
            _fail(wanted.values(), error)

    at_once = min(MOST_AT_ONCE, max(1, (os.cpu_count() or 1) // 2))
    together, apart = ([name for name in folders if RUNS[name].alone is alone] for alone in (False, True))
    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(start, together))
    for name in apart:
        start(name)


@pytest.mark.parametrize(("run", "program"), CASES, ids=["-".join(case) for case in CASES])
def test_a_program_finds_no_difference(
    found: Findings, run: str, program: str, record_property: Callable[[str, object], None]
) -> None:
    if RUNS[run].gpus > torch.cuda.device_count():
        pytest.skip(f"needs {RUNS[run].gpus} CUDA GPUs")
    seen = found[run, program].result()
    record_property("seconds", seen.get("seconds"))
    print(seen.get("error", ""))
    differing = programs.differences(seen)
    assert differing == EXPECTED.get(run, []), "; ".join(differing)
    assert seen["agree"]
