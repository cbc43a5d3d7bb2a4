"""Names that users give devices: ``gpu:0``, ``cuda:0`` or ``0``, ``cpu``, ``default``; lists of GPUs, and of shares."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..errors import ConfigError

# The environment variable with the devices that a process uses where no others are named.
GPUS_VARIABLE = "WEIGHTSTREAM_GPUS"

CPU, DEFAULT = "cpu", "default"
# What may stand around the parts of a name: white space as Python has it, and as browsers do, which is not the same.
SPACES = "\t\n\v\f\r\x1c\x1d\x1e\x1f \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
SPACES += "\u2028\u2029\u202f\u205f\u3000\ufeff"
GPU = re.compile(rf"(?:(?:gpu|cuda)[{SPACES}]*:[{SPACES}]*)?([0-9]{{1,4}})")


def gpu_name(index: int) -> str:
    return f"gpu:{index}"


def parse_device(text: str, source: str = "device") -> str:
    """Return the one device that ``text`` names, in the form in which names are compared.

    Args:
        text: ``gpu:N``, ``cuda:N``, ``N``, ``cpu`` or ``default``, in any case, with spaces anywhere around its parts.
        source: the setting that has this value, for the error message.

    Raises:
        ConfigError: ``text`` names no device.
    """
    name = _one(text)
    if name is None:
        raise ConfigError(f"{source}={text!r}: expected default, cpu, or a GPU such as gpu:0")
    return name


def parse_gpus(text: str, source: str = "devices") -> tuple[str, ...]:
    """Return the GPUs that ``text`` names, in its order; none if it is empty or ``default``.

    Raises:
        ConfigError: ``text`` names something else, or a GPU twice.
    """
    if not text.strip(SPACES) or _one(text) == DEFAULT:
        return ()
    names = []
    for part in text.split(","):
        name = _one(part)
        if name is None or name in (CPU, DEFAULT):
            expected = "expected gpu:0, cuda:0 or 0, or a list such as gpu:0,gpu:1"
            raise ConfigError(f"{source}={text!r}: {part.strip(SPACES)!r} is no GPU; {expected}")
        if name in names:
            raise ConfigError(f"{source}={text!r}: {name} is there twice; name each GPU once")
        names.append(name)
    return tuple(names)


def parse_shares(text: str, source: str = "ratio") -> tuple[float, ...]:
    """Return the numbers of a list such as ``60,40``, divided by their sum.

    Raises:
        ConfigError: ``text`` is no list of numbers above 0.
    """
    shares = [_share(part) for part in text.split(",")]
    if not all(shares):
        raise ConfigError(f"{source}={text!r}: expected a number above 0 for each device, such as 60,40")
    return in_parts(shares)


def in_parts(shares: Sequence[float]) -> tuple[float, ...]:
    """Return ``shares`` divided by their sum."""
    return tuple(share / sum(shares) for share in shares)


def _one(text: object) -> str | None:
    name = str(text).strip(SPACES).lower()
    if match := GPU.fullmatch(name):
        return gpu_name(int(match[1]))
    return name if name in (CPU, DEFAULT) else None


def _share(text: str) -> float:
    """Return the number, or 0 if ``text`` is none."""
    match = re.fullmatch(r"\s*([0-9]{1,9}(?:\.[0-9]{0,9})?|\.[0-9]{1,9})\s*%?\s*", text)
    return float(match[1]) if match else 0.0
