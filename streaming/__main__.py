"""The command line, run from the pack's folder: ``python -m streaming gpus``, ``python -m streaming status``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from .errors import StreamingError
from .machine.gpus import as_table, list_gpus
from .machine.server_status import DEFAULT_URL, as_text, ask

NONE = "no GPU that torch can use through CUDA or ROCm"


def gpus(arguments: argparse.Namespace) -> None:
    found = list_gpus()
    if arguments.json:
        print(json.dumps({"gpus": [gpu.as_dict() for gpu in found]}, indent=2))
    else:
        print(as_table(found) if found else NONE)


def status(arguments: argparse.Namespace) -> None:
    found = ask(arguments.url)
    print(json.dumps(found, indent=2) if arguments.json else as_text(found))


def parser() -> argparse.ArgumentParser:
    program = argparse.ArgumentParser(prog="python -m streaming", description="WeightStream, outside of ComfyUI.")
    commands = program.add_subparsers(required=True, metavar="COMMAND")
    listing = commands.add_parser("gpus", help="list the GPUs: memory, PCIe link, and which reach each other")
    listing.add_argument("--json", action="store_true", help="for programs; sizes in bytes, null for what is not known")
    listing.set_defaults(run=gpus)
    telling = commands.add_parser("status", help="how a running ComfyUI streams: devices, models, plans")
    telling.add_argument("--url", default=DEFAULT_URL, help="the address of its page (default: %(default)s)")
    telling.add_argument("--json", action="store_true", help="for programs; sizes in bytes, null for what is not known")
    telling.set_defaults(run=status)
    return program


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except StreamingError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
