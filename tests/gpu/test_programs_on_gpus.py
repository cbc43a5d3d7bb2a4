"""The programs of this folder, in as few processes as there are hosts that differ in their flags (programs.py).

``WEIGHTSTREAM_SOAK_PROMPTS=200`` asks the soak for more. Where pytest has several workers, one must have this whole
file (``--dist loadfile``).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import programs
import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

Findings = dict[str, dict[str, dict[str, Any]]]


class Run(NamedTuple):
    """Programs in one host.

    Attributes:
        names: of the programs, in the order in which they run.
        flags: of the host.
        gpus: that it takes.
        variables: of the environment.
        alone: nothing else may run meanwhile, since it fills a GPU.
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
    "static": Run("host settings quantised encoders placement late", STATIC),
    "dynamic": Run("host settings quantised encoders placement recordings"),
    "one-stream": Run("host settings quantised", ("--async-offload", "1")),
    "soak-static": Run("soak", STATIC),
    "soak-dynamic": Run("soak"),
    "soak-static-2": Run("soak", STATIC, 2, (TWO,)),
    "soak-dynamic-2": Run("soak", (), 2, (TWO,)),
    **{f"families-{part}": Run("families", STATIC, 2, (("FAMILIES", f"{part}/4"),)) for part in range(1, 5)},
    "split-static": Run("split", STATIC, 2, alone=True),
    "split-dynamic": Run("split", (), 2, alone=True),
    "split-static-through-ram": Run("split", STATIC, 2, (THROUGH_RAM,), alone=True),
    "split-dynamic-through-ram": Run("split", (), 2, (THROUGH_RAM,), alone=True),
}
# Where the user says so, nothing goes straight.
EXPECTED = {"split-static-through-ram": ["links verified"], "split-dynamic-through-ram": ["links verified"]}
CASES = [(name, program) for name, run in RUNS.items() for program in run.names.split()]
MOST_AT_ONCE = 6


@pytest.fixture(scope="session")
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Findings]:
    """What those programs have found that tests of this session are about: all are run now, several hosts at once."""
    wanted: dict[str, list[str]] = {}
    for item in request.session.items:
        if isinstance(item, pytest.Function) and item.function is test_a_program_finds_no_difference:
            parameters = item.callspec.params
            if RUNS[parameters["run"]].gpus <= torch.cuda.device_count():
                wanted.setdefault(parameters["run"], []).append(parameters["program"])

    def start(name: str) -> dict[str, dict[str, Any]]:
        run = RUNS[name]
        folder = tmp_path_factory.mktemp(name)
        return programs.run_all(wanted[name], os.environ["COMFYUI_PATH"], folder, run.flags, **dict(run.variables))

    torch.cuda.empty_cache()
    at_once = min(MOST_AT_ONCE, max(1, (os.cpu_count() or 1) // 2))
    together, apart = ([name for name in wanted if RUNS[name].alone is alone] for alone in (False, True))
    with ThreadPoolExecutor(at_once) as pool:
        findings = dict(zip(together, pool.map(start, together), strict=True))
    findings |= {name: start(name) for name in apart}
    yield findings
    say_seconds(request.config, findings)


def say_seconds(config: pytest.Config, findings: Findings) -> None:
    """Which programs have taken how long, past what pytest captures."""
    plugin = config.pluginmanager.get_plugin
    with plugin("capturemanager").global_and_fixture_disabled():
        for name, by_program in findings.items():
            taken = ", ".join(f"{program} {found.get('seconds', '?')}" for program, found in by_program.items())
            plugin("terminalreporter").write_line(f"seconds of {name}: {taken}")


@pytest.mark.parametrize(("run", "program"), CASES, ids=["-".join(case) for case in CASES])
def test_a_program_finds_no_difference(found: Findings, run: str, program: str) -> None:
    if RUNS[run].gpus > torch.cuda.device_count():
        pytest.skip(f"needs {RUNS[run].gpus} CUDA GPUs")
    seen = found[run][program]
    print(seen.get("error", ""))
    differing = programs.differences(seen)
    assert differing == EXPECTED.get(run, []), "; ".join(differing)
    assert seen["agree"]
