"""``python -m fleet``: starts the ComfyUI in front, which starts its workers."""

from __future__ import annotations

import argparse
import importlib.util
import ipaddress
import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from .config import FRONT_VARIABLE, MOST_WAITING, NO_RAY, FleetConfig
from .errors import FleetConfigError, FleetError

PACK = Path(__file__).resolve().parent.parent
LOOPBACK = "127.0.0.1"
PORT = 8188
TOKEN_BYTES = 24
# Of ComfyUI's arguments those that the fleet says itself, and one with which it would not be there.
OURS = ("--port", "--listen", "--cuda-device", "--disable-all-custom-nodes")
# About the page, which workers have not; each has a value.
OF_FRONT = ("--tls-keyfile", "--tls-certfile")
# About the GPU, which the front has not.
OF_WORKERS = ("--gpu-only", "--highvram", "--normalvram", "--lowvram", "--novram")
BASE_DIRECTORY = "--base-directory"


def parser() -> argparse.ArgumentParser:
    program = argparse.ArgumentParser(
        prog="python -m fleet",
        description="One ComfyUI in front, and behind it one for each GPU: independent prompts run side by side.",
        epilog="What follows -- goes to ComfyUI's main.py, in front and in all workers.",
    )
    program.add_argument("--workers", type=int, default=0, metavar="N", help="default: one for each GPU")
    program.add_argument("--gpus", metavar="0,1", help="use these GPUs of this machine (default: all)")
    program.add_argument("--port", type=int, default=PORT, help=f"of the page (default: {PORT})")
    program.add_argument("--listen", default=LOOPBACK, metavar="IP", help=f"default: {LOOPBACK}, this machine alone")
    program.add_argument("--token", default="", help="what clients have to know; one is made up if others may connect")
    program.add_argument(
        "--address", default="", metavar="HOST:PORT", help="join this Ray cluster (default: this machine)"
    )
    program.add_argument(
        "--most-waiting",
        type=int,
        default=MOST_WAITING,
        metavar="N",
        help=f"refuse prompts beyond (default: {MOST_WAITING})",
    )
    program.add_argument(
        "--silent-minutes",
        type=float,
        default=0.0,
        metavar="N",
        help="end a worker that says nothing of its prompt for so long, and run that on another (default: 0, never)",
    )
    program.add_argument(
        "--no-share", dest="share", action="store_false", help="each worker page-locks weights for itself"
    )
    program.add_argument("--comfyui", metavar="DIR", help="ComfyUI's folder (default: the one that this pack is in)")
    return program


def make_config(arguments: argparse.Namespace, host_arguments: Sequence[str]) -> FleetConfig:
    """The settings that these arguments mean.

    Raises:
        FleetConfigError: one of them cannot be used.
    """
    taken = [name for name in OURS if any(each.split("=")[0] == name for each in host_arguments)]
    if taken:
        raise FleetConfigError(f"{', '.join(taken)} behind --: the fleet sets that itself; give it before the --")
    comfyui = _find_comfyui(arguments.comfyui)
    token = arguments.token
    if not token and not _is_loopback(arguments.listen):
        token = secrets.token_urlsafe(TOKEN_BYTES)
    config = FleetConfig(
        comfyui=os.fspath(comfyui),
        python=sys.executable,
        host_arguments=tuple(each for each in _without(OF_FRONT, host_arguments) if each not in OF_WORKERS),
        worker_arguments=tuple(each for each in host_arguments if each in OF_WORKERS),
        folder=os.getcwd(),
        workers=arguments.workers,
        address=arguments.address,
        most_waiting=arguments.most_waiting,
        silent_minutes=arguments.silent_minutes,
        token=token,
        pack=os.fspath(PACK),
        # Of one fleet: an abstract socket, which needs no folder and is gone with its owner.
        share=f"@weightstream-{secrets.token_hex(8)}" if arguments.share and sys.platform == "linux" else "",
    )
    _check_pack(comfyui, host_arguments)
    _check_port(arguments.listen, arguments.port)
    return config


def command(config: FleetConfig, arguments: argparse.Namespace, host_arguments: Sequence[str]) -> list[str]:
    """How the ComfyUI in front is started. It computes nothing, and leaves the GPUs to the workers."""
    of_front = list(host_arguments)
    for each in _without(OF_FRONT, host_arguments):
        of_front.remove(each)
    return [
        config.python,
        "-s",
        os.fspath(config.main),
        *config.host_arguments,
        *of_front,
        *("--cpu", "--port", str(arguments.port), "--listen", arguments.listen),
        "--disable-auto-launch",
    ]


def main(argv: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    # Here and not in argparse, whose treatment of -- differs between versions of Python.
    end = given.index("--") if "--" in given else len(given)
    arguments = parser().parse_args(given[:end])
    try:
        if importlib.util.find_spec("ray") is None:
            raise FleetConfigError(NO_RAY)
        config = make_config(arguments, given[end + 1 :])
    except FleetError as error:
        print(error, file=sys.stderr)
        return 2
    environ = {**os.environ, FRONT_VARIABLE: config.to_json()}
    if arguments.gpus:
        environ["CUDA_VISIBLE_DEVICES"] = arguments.gpus
    shown = "127.0.0.1" if _is_loopback(arguments.listen) else socket.gethostname()
    query = f"?token={config.token}" if config.token else ""
    program = command(config, arguments, given[end + 1 :])
    scheme = "https" if any(each.startswith("--tls-certfile") for each in program) else "http"
    print(f"the page: {scheme}://{shown}:{arguments.port}/{query}", flush=True)
    return _become(program, environ)


def _become(program: list[str], environ: dict[str, str]) -> int:
    """Run it in the place of this process, so that what ends this one ends it."""
    if os.name != "nt":
        os.execve(program[0], program, environ)
    try:
        return subprocess.call(program, env=environ)
    except KeyboardInterrupt:  # It got that too, and ends by itself.
        return 130


def _find_comfyui(given: str | None) -> Path:
    found = Path(given).resolve() if given else PACK.parent.parent
    if not (found / "main.py").is_file():
        raise FleetConfigError(f"{found} is no folder of ComfyUI: it has no main.py; say --comfyui DIR")
    return found


def _check_pack(comfyui: Path, host_arguments: Sequence[str]) -> None:
    """See to it that ComfyUI will load this pack: without it there would be a ComfyUI, and no fleet and no token."""
    base = comfyui
    for place, each in enumerate(host_arguments):
        name, _, value = each.partition("=")
        if name == BASE_DIRECTORY:
            base = Path(value or (host_arguments[place + 1] if place + 1 < len(host_arguments) else ""))
    folder = base / "custom_nodes"
    there = [each for each in folder.iterdir() if each.is_dir()] if folder.is_dir() else []
    if not any(each.samefile(PACK) for each in there):
        raise FleetConfigError(f"{folder.resolve()} does not hold this pack ({PACK}): run the one that lies there")


def _without(names: Sequence[str], arguments: Sequence[str]) -> list[str]:
    """Arguments without those of these names, each with its value."""
    left, skip = list[str](), False
    for each in arguments:
        name, equals, _ = each.partition("=")
        if not skip and name not in names:
            left.append(each)
        skip = not skip and name in names and not equals
    return left


def _is_loopback(listen: str) -> bool:
    try:
        return all(ipaddress.ip_address(each.strip()).is_loopback for each in listen.split(","))
    except ValueError:
        return listen == "localhost"


def _check_port(listen: str, port: int) -> None:
    for address in listen.split(","):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(family) as probe:
            if os.name != "nt":  # There it would let two programs have one port.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address.strip(), port))
            except OSError as error:
                text = f"{address}:{port} cannot be listened on ({error.strerror}); choose another --port or --listen"
                raise FleetConfigError(text) from None
