"""What a GPU says of this checkout: first tests/gpu, then benchmark cases, and how they differ from committed results.

    python3 dev.py gpu [--minutes N] [--out DIR]

Cases run in the order in which they are likely to show that something got slower (ORDER), as far as the time goes: one
is begun only if it can probably end. Each result is in DIR as soon as it is there, with the table of all so far in
DIR/table.txt. An exit status other than 0 is the sum of 1: a test failed or did not end; 4: a latent differs; 8: a
ratio is worse by more than 3 %; 16: a contender failed. 130: it was interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import comparison
import gpu_tests
import psutil
from cases import CASES, LIMITS, Case
from contenders import NAMES
from run import HERE, RESULTS, describe_machine, known_limits, limit_keys

ROOT = HERE.parent
TABLE = "table.txt"
FAILED_TESTS, DIFFERING, WORSE, FAILED = 1, 4, 8, 16
NO_GPU, INTERRUPTED = 2, 130

# The first is where plan, copies and compute all count, and its limits serve all of FLUX at 1024. With 16 GB a step is
# between bus and compute, and memory between enough and too little. "streamed" shows what a copy or a hook costs, 2048
# what activations leave of the memory. Two GPUs have code of their own. Then come other models, for whose checkpoints
# FLUX's may have to go, and last whatever is not named.
ORDER = (
    *("flux-1024-8gb", "flux-1024-16gb", "flux-1024-streamed", "flux-2048-4gb"),
    *("2gpus-flux-1024-streamed", "2gpus-flux-1024-8gb", "flux-1024-20gb", "flux-1024-12gb"),
    *("qwen-1328-24gb", "2gpus-qwen-1328-24gb", "qwen-1328-12gb"),
    *("wan-480p-8gb", "2gpus-wan-480p-12gb", "wan-480p-16gb", "sd35-1024-8gb"),
)
BY_WORTH = (*ORDER, *(name for name in CASES if name not in ORDER))
CONTENDERS = (*LIMITS, "weightstream", "comfy-dynamic")
# Of the time, where cases are to come too. On an H200 tests take four minutes.
SHARE_OF_TESTS = 0.5
# A contender that no committed result tells of, what comes between two, and a checkpoint that is to be written.
CONTENDER_S, BETWEEN_S, CHECKPOINT_S = 40, 3, 45
CHILD_TIMEOUT_S = 150


def main() -> int:
    args = parse_args()
    gpus = 0 if args.tiny else count_gpus()
    if not gpus and not args.tiny:
        print("torch sees no CUDA GPU; --tiny tries the command without one", file=sys.stderr)
        return NO_GPU
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    report = Report(args.out)
    deadline = time.monotonic() + 60 * args.minutes
    try:
        if args.only != "cases":
            run_tests(args, report, deadline)
        if args.only != "tests":
            measure_cases(args, gpus, report, deadline)
    except KeyboardInterrupt:
        report.interrupted = True
    report.write()
    print(report.text(), flush=True)
    return report.status()


# ------------------------------------------------------------------------------------------------------------ tests


def run_tests(args: argparse.Namespace, report: Report, deadline: float) -> None:
    left = deadline - time.monotonic()
    seconds = left if args.only == "tests" else left * SHARE_OF_TESTS
    command, path = [*json.loads(args.pytest), "tests/gpu", *gpu_tests.OPTIONS], args.out / gpu_tests.LOG
    # A line as soon as a test ends, and with CI as long a one as it takes to say what differs.
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "CI": "true"}
    print(f"tests/gpu (log: {path})", flush=True)
    started, status = time.monotonic(), None
    try:
        with open(path, "w", encoding="utf-8") as log:
            status = run_command(command, environment, seconds, log)
    finally:
        report.tests = gpu_tests.read(path.read_text("utf-8", "replace"), status, time.monotonic() - started)
        report.write()
    print(report.tests, flush=True)


# ------------------------------------------------------------------------------------------------------------ cases


def measure_cases(args: argparse.Namespace, gpus: int, report: Report, deadline: float) -> None:
    """Each in a call of run.py, which takes the limits that the ones before have left in their files."""
    pace = 1.0
    for case in chosen_cases(args, gpus):
        if args.go_on and is_measured(args, case):
            continue
        expected = expected_seconds(args, case) * pace
        left = deadline - time.monotonic()
        # With less than a third of a contender's time run.py would not begin it.
        if left < expected + CHILD_TIMEOUT_S / 3:
            report.notes.append(f"left out: {case.name}, which takes about {expected:.0f} s; {left:.0f} were left")
            continue
        started = time.monotonic()
        status = run_command(command_of(args, case, left), os.environ, left)
        if status != 0:
            report.unmeasured[case.name] = "run.py was stopped" if status is None else f"run.py ended with {status}"
        pace = max(1.0, pace * (time.monotonic() - started) / expected)
        report.write()


def chosen_cases(args: argparse.Namespace, gpus: int) -> Iterator[Case]:
    for name in args.cases or (BY_WORTH[:1] if args.tiny else BY_WORTH):
        if CASES[name].gpus <= gpus or args.tiny:
            yield CASES[name]


def count_gpus() -> int:
    count = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    return int(subprocess.run(count, capture_output=True, text=True, check=True).stdout)


def contenders_of(args: argparse.Namespace, case: Case) -> list[str]:
    """Those of the command line, or of the few usual ones those that take part in the case."""
    return args.contenders or [name for name in CONTENDERS if name in (*LIMITS, *case.contenders)]


def is_measured(args: argparse.Namespace, case: Case) -> bool:
    runs = read_result(args.out, case.name).get("runs", {})
    return all("step_s" in runs.get(name, {}) for name in contenders_of(args, case) if name not in LIMITS)


def expected_seconds(args: argparse.Namespace, case: Case) -> float:
    """By the committed result, with the time for limits that are not known and for a checkpoint that is not there."""
    committed = read_result(RESULTS, case.name)
    runs = {**committed.get("limits", {}), **committed.get("runs", {})}
    keys, known = limit_keys(case, args), known_limits(args, describe_machine())
    wanted = [name for name in contenders_of(args, case) if keys.get(name) not in known]
    seconds = sum(runs.get(name, {}).get("wall_s", CONTENDER_S) + BETWEEN_S for name in wanted)
    return seconds + (0 if (args.work / case.model.filename).exists() else CHECKPOINT_S)


def command_of(args: argparse.Namespace, case: Case, left: float) -> list[str]:
    command = [
        sys.executable,
        str(HERE / "run.py"),
        case.name,
        "--contenders",
        ",".join(contenders_of(args, case)),
        "--go-on",
    ]
    command += ["--out", str(args.out), "--work", str(args.work), "--logs", str(args.out / "logs")]
    command += ["--time-limit", str(left), "--child-timeout", str(CHILD_TIMEOUT_S)]
    command += [*(["--steps", str(args.steps)] if args.steps else []), *(["--tiny"] if args.tiny else [])]
    return command


def run_command(
    command: Sequence[str], environment: Mapping[str, str], seconds: float, output: IO[str] | None = None
) -> int | None:
    """Its status, or None if it had to be stopped.

    What it has started is stopped with it, also when this process is interrupted: a GPU that is to be measured is
    nobody else's.
    """
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
    )
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        kill_tree(process)


def kill_tree(process: subprocess.Popen) -> None:
    """End a process that runs, and all that it has started."""
    with suppress(psutil.NoSuchProcess):
        started = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        for child in started:
            with suppress(psutil.NoSuchProcess):
                child.kill()
    process.wait()


# ----------------------------------------------------------------------------------------------------------- report


@dataclass
class Report:
    """What is known so far.

    Attributes:
        out: the folder of result files.
        tests: how they ended, if they were run.
        unmeasured: why, by case, where run.py has not ended well.
        notes: what else people should know.
    """

    out: Path
    tests: gpu_tests.Tests | None = None
    unmeasured: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    interrupted: bool = False

    def rows(self) -> list[comparison.Row]:
        found = []
        for name in CASES:
            if result := read_result(self.out, name):
                committed = {} if result["tiny"] else read_result(RESULTS, name)
                found += comparison.rows_of(result, committed)
        return found

    def text(self) -> str:
        """The tests, the table, and what else there is to say."""
        tests = [str(self.tests)] if self.tests else []
        rows = ["", comparison.table(self.rows()), ""] if self.rows() else []
        broken = [f"could not measure {case}: {why}" for case, why in self.unmeasured.items()]
        return "\n".join([*tests, *rows, *broken, *self.notes, *(["interrupted"] if self.interrupted else [])])

    def write(self) -> None:
        (self.out / TABLE).write_text(self.text() + "\n", "utf-8")

    def status(self) -> int:
        if self.interrupted:
            return INTERRUPTED
        rows = self.rows()
        status = FAILED_TESTS if self.tests is not None and self.tests.failed else 0
        status |= DIFFERING if any(row.differs for row in rows) else 0
        status |= WORSE if any(row.worse for row in rows) else 0
        return status | (FAILED if self.unmeasured or any(row.failed for row in rows) else 0)


def read_result(folder: Path, case: str) -> dict[str, Any]:
    path = folder / f"{case}.json"
    return json.loads(path.read_text("utf-8")) if path.exists() else {}


# ----------------------------------------------------------------------------------------------------------- set-up


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="dev.py gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    temporary = Path(tempfile.gettempdir())
    replaced = (
        "folder of all results; without --go-on, those that it has are replaced (weightstream-gpu, for temporary files)"
    )
    parser.add_argument("--minutes", type=float, default=30, help="for everything (30)")
    parser.add_argument("--out", type=Path, default=temporary / "weightstream-gpu", metavar="DIR", help=replaced)
    parser.add_argument(
        "--go-on", action="store_true", help="keep the results that DIR has, and measure what is missing"
    )
    parser.add_argument("--only", choices=("tests", "cases"))
    parser.add_argument("--cases", type=some_of(CASES), help=f"with commas between ({','.join(BY_WORTH)})")
    parser.add_argument("--contenders", type=some_of(NAMES), help=f"with commas between ({','.join(CONTENDERS)})")
    parser.add_argument("--steps", type=int, help="as run.py has it")
    parser.add_argument(
        "--work", type=Path, default=temporary / "weightstream-benchmarks", help="folder of checkpoints"
    )
    parser.add_argument("--tiny", action="store_true", help="try the command on a CPU; the figures mean nothing")
    parser.add_argument("--pytest", default=json.dumps([sys.executable, "-m", "pytest"]), help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out = args.out.absolute()
    if args.out == RESULTS:
        parser.error("--out is what is compared with benchmarks/results, so it must be another folder")
    args.out.mkdir(parents=True, exist_ok=True)
    for name in [] if args.go_on else CASES:
        (args.out / f"{name}.json").unlink(missing_ok=True)
    return args


def some_of(known: Collection[str]) -> Callable[[str], list[str]]:
    """Reads names with commas between them."""

    def read(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"no {', '.join(unknown)}: choose from {', '.join(known)}")
        return names

    return read


if __name__ == "__main__":
    sys.exit(main())
