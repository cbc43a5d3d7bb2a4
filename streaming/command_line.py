"""What the command line can do. Each command imports what it needs; none needs torch."""

from __future__ import annotations

import argparse
import codecs
import contextlib
import io
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from .config import plain
from .errors import OutputError, StreamingError, UnsupportedModelError, WorkflowError

if TYPE_CHECKING:
    from .estimating.cards import Card

NO_TORCH = "this Python has no torch: GPUs are numbered as nvidia-smi does, which may not be ComfyUI's order"
NOT_LOOKED = (
    "this Python has neither torch nor nvidia-ml-py, so it could not look for GPUs: use the one that runs ComfyUI"
)
NO_GPU = "no GPU that torch can use through CUDA or ROCm"
NO_NVIDIA_GPU = "no GPU that NVIDIA's driver knows"
ENDING = "_streamed"
STANDARD_OUTPUT = "-"
# GB/s. One lane of PCIe 1.0 has 0.25.
LEAST_LINK = 0.001


def gpus(arguments: argparse.Namespace) -> None:
    from .machine.gpus import as_table, has_nvml, has_torch, list_gpus

    found = list_gpus()
    looked = bool(found) or has_torch() or has_nvml()
    if not has_torch():
        print(NO_TORCH if looked else NOT_LOOKED, file=sys.stderr)
    if arguments.json:
        print(json.dumps({"gpus": [gpu.as_dict() for gpu in found]}, indent=2))
    elif looked:
        print(as_table(found) if found else NO_GPU if has_torch() else NO_NVIDIA_GPU)


def status(arguments: argparse.Namespace) -> None:
    from .machine.server_status import as_text, ask

    found = ask(arguments.url)
    print(json.dumps(found, indent=2) if arguments.json else as_text(found))


def convert(arguments: argparse.Namespace) -> None:
    from .workflows.convert import convert
    from .workflows.notes import as_lines
    from .workflows.reading import read_workflow

    source = Path(arguments.input)
    try:
        conversion = convert(read_workflow(source.read_text("utf-8-sig")))
    except OSError as error:
        raise WorkflowError(f"{source} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # No JSON, no UTF-8, nested too deeply, or no workflow.
        raise WorkflowError(f"{source}: {error}") from error
    target = arguments.output or os.fspath(source.with_name(f"{source.stem}{ENDING}.json"))
    to_terminal = target == STANDARD_OUTPUT
    if conversion.changed and not arguments.output and Path(target).exists():
        raise WorkflowError(f"{target} is there already; to write over it, name it behind {source}")
    said = sys.stderr if to_terminal else sys.stdout
    if conversion.notes and said is not None:
        print(as_lines(conversion.notes), file=said)
    text = json.dumps(conversion.workflow, indent=2, ensure_ascii=False)
    encoding = (_output().encoding or "ascii") if to_terminal else "utf-8"
    if codecs.lookup(encoding).name != "utf-8" or not _is_unicode(text):
        text = json.dumps(conversion.workflow, indent=2)  # Escaped: the same in any encoding.
    if to_terminal:
        print(text)
    elif conversion.changed or arguments.output:
        _write(Path(target), text)
        print(f"written to {target}")
    else:
        print("there is nothing to change; no file is written")


def plan(arguments: argparse.Namespace) -> None:
    from .config import format_bytes
    from .estimating.cards import known_model
    from .estimating.cutting import cut
    from .estimating.estimate import ASSUMED_LINK, CARDS, Machine, describe_model, describe_plan
    from .estimating.tensors import missing_bytes, read_tensors

    path, card = Path(arguments.model), arguments.card
    try:
        found = cut(read_tensors(path))
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{path}: {error}") from error
    _print_lines(describe_model(path.name, found))
    if missing := missing_bytes(path):
        print(f"  {format_bytes(missing)} of it are not there: a file did not come whole")
    compute, source = arguments.compute, ""
    if compute is None and card is None:
        compute = _measured_compute(arguments.url, path, found.outline.model_bytes)
    elif compute is None and (known := known_model(found)) is not None:
        compute = card.compute_seconds(known.h200_seconds)
        source = f", estimated from an H200's for {known.name}, {known.size}, cfg 1: wrong by up to a factor of two"
    if card is not None:
        print(f"\n{card.name}, PCIe {card.generation} x{card.lanes}, by its data; nobody has measured it:")
    sizes = [arguments.vram] if arguments.vram else CARDS if card is None else [card.vram_gib]
    link = arguments.link or (ASSUMED_LINK if card is None else round(card.bandwidth / 1e9, 1))
    for vram in sizes:
        machine = Machine(
            vram, arguments.reserve, arguments.ram, link, compute, os.name, source, limit=arguments.limit or None
        )
        _print_lines([*([""] if card is None else []), *describe_plan(found, machine)])
    print("\nBy the names in the file's header; the pack itself plans by the model that ComfyUI builds of it.")


def _measured_compute(url: str | None, path: Path, model_bytes: int) -> float | None:
    """What a running ComfyUI has measured of a file; without ``url`` there need not be one."""
    from .errors import ServerError
    from .estimating.estimate import measured_by
    from .machine.server_status import ask

    try:
        return measured_by(ask(url), path, model_bytes)
    except ServerError:
        if url:
            raise
        return None


def share(arguments: argparse.Namespace) -> None:
    from .errors import SharingError
    from .sharing.pages import why_not_here

    if (reason := why_not_here()) is not None:
        raise SharingError(f"copies of weights cannot be shared: {reason}")
    from .sharing.broker import serve  # It needs modules that other systems lack.

    try:
        serve(arguments.socket)
    except OSError as error:  # Else it would be taken for one of the output.
        raise SharingError(f"copies of weights are not shared any more: {error}") from error


def _print_lines(lines: Iterable[str]) -> None:
    print("\n".join(map(plain, lines)))


def _output() -> TextIO:
    """Where the terminal reads.

    Raises:
        OutputError: it was closed.
    """
    if sys.stdout is None:
        raise OutputError("there is no output to write to: it was closed")
    return sys.stdout


def _is_unicode(text: str) -> bool:
    """Whether a text can be written: half of a pair of surrogates cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _write(path: Path, text: str) -> None:
    """Write the whole file or leave what is there."""
    if not path.name:
        raise WorkflowError(f"{path} cannot be written: it names no file")
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text + "\n", "utf-8")
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise WorkflowError(f"{path} cannot be written: {error.strerror}") from error


def parser() -> argparse.ArgumentParser:
    program = argparse.ArgumentParser(prog="python -m streaming", description="WeightStream, outside of ComfyUI.")
    commands = program.add_subparsers(required=True, metavar="COMMAND")
    listing = commands.add_parser("gpus", help="list the GPUs: memory, PCIe link, and which reach each other")
    _add_json(listing)
    listing.set_defaults(run=gpus)
    telling = commands.add_parser("status", help="how a running ComfyUI streams: devices, models, plans")
    telling.add_argument("--url", help="the address of its page (default: http://127.0.0.1:8188)")
    _add_json(telling)
    telling.set_defaults(run=status)
    converting = commands.add_parser("convert", help="make the models of a workflow or API prompt stream")
    converting.add_argument("input", metavar="IN.json", help="as ComfyUI's page saves or exports it")
    converting.add_argument(
        "output", metavar="OUT.json", nargs="?", help=f"default: IN{ENDING}.json beside it; - is the terminal"
    )
    converting.set_defaults(run=convert)
    planning = commands.add_parser("plan", help="what of a model will stream on a card, and what that takes")
    planning.add_argument("model", metavar="MODEL.safetensors", help="any file of the model, or its index")
    planning.add_argument("--card", type=_card, help='a card by its name, as "RTX 4060": its VRAM, link and compute')
    planning.add_argument("--vram", type=_positive, help="GiB of the card (default: several cards)")
    planning.add_argument("--ram", type=_positive, default=0.0, help="GiB of the machine")
    planning.add_argument("--link", type=_rate, help="GB/s from RAM to the card (default: the card's, or 25)")
    planning.add_argument(
        "--reserve", type=_not_negative, default=2.5, help="GiB of VRAM for activations and others (default: 2.5)"
    )
    planning.add_argument(
        "--limit", type=_not_negative, default=0.0, help="GiB for weights, as vram_limit_gb of the loader (0: no limit)"
    )
    planning.add_argument("--compute", type=_positive, help="seconds of a step with all weights in VRAM, if known")
    planning.add_argument("--url", help="a running ComfyUI that may have measured that (default: the usual address)")
    planning.set_defaults(run=plan)
    sharing = commands.add_parser("share", help="keep copies of weights that the processes of this machine share")
    sharing.add_argument("socket", metavar="SOCKET", help="@NAME, or a path in a folder of mode 0700")
    sharing.set_defaults(run=share)
    return program


def _card(text: str) -> Card:
    from .estimating.cards import CARDS, card_named

    if (card := card_named(text)) is None:
        raise argparse.ArgumentTypeError(
            f"{text} is none of {', '.join(card.name for card in CARDS)}; give --vram and --link"
        )
    return card


def _positive(text: str) -> float:
    number = _not_negative(text)
    if not number:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def _rate(text: str) -> float:
    number = _not_negative(text)
    if number < LEAST_LINK:
        raise argparse.ArgumentTypeError(f"{text} is below {LEAST_LINK}")
    return number


def _not_negative(text: str) -> float:
    number = float(text)
    if not 0 <= number < 1e6:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to 1000000")
    return number


def _add_json(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="for programs; sizes in bytes, null for what is not known")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # Names that the console's encoding does not have.
    try:
        code = _run(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:  # Of the output alone: what reads and writes files says which one it was.
        _give_up_output()
        if not isinstance(error, BrokenPipeError):  # Who reads has read enough.
            print(f"the output cannot be written: {error.strerror}", file=sys.stderr)
        return 1
    return code


def _run(arguments: argparse.Namespace) -> int:
    try:
        arguments.run(arguments)
    except StreamingError as error:
        print(plain(str(error)), file=sys.stderr)
        return 2
    return 0


def _give_up_output() -> None:
    """Send what is left in the output's buffer nowhere: Python would try to write it once more when it ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    with contextlib.suppress(OSError, ValueError):  # An output that is no file needs nothing.
        os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
