"""Compiles CUDA C++ on the user's machine with NVRTC, the compiler that torch's CUDA builds bring along."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable, Iterator, Mapping
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_void_p
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any

PROTOTYPES: dict[str, list[Any]] = {
    "nvrtcCreateProgram": [POINTER(c_void_p), c_char_p, c_char_p, c_int, POINTER(c_char_p), POINTER(c_char_p)],
    "nvrtcCompileProgram": [c_void_p, c_int, POINTER(c_char_p)],
    "nvrtcGetProgramLogSize": [c_void_p, POINTER(c_size_t)],
    "nvrtcGetProgramLog": [c_void_p, c_char_p],
    "nvrtcGetCUBINSize": [c_void_p, POINTER(c_size_t)],
    "nvrtcGetCUBIN": [c_void_p, c_char_p],
    "nvrtcDestroyProgram": [POINTER(c_void_p)],
}


class CompilerError(Exception):
    """There is no compiler, or it has refused the source."""


def compile_source(
    source: str, name: str, capability: tuple[int, int], headers: Mapping[str, str] = MappingProxyType({})
) -> bytes:
    """Return the machine code (a cubin) of ``source`` for devices of this compute capability.

    Args:
        source: CUDA C++ that includes nothing but ``headers``.
        name: of the program, for messages.
        capability: major and minor number, as torch.cuda.get_device_capability gives them.
        headers: their texts by the names that the source has for them.

    Raises:
        CompilerError: says why there is no code, with the compiler's messages.
    """
    library = open_library()
    program = c_void_p()
    texts, names = _strings(headers.values()), _strings(headers)
    _check(library, "nvrtcCreateProgram", byref(program), source.encode(), name.encode(), len(headers), texts, names)
    try:
        options = _strings([f"--gpu-architecture=sm_{capability[0]}{capability[1]}"])
        if library.nvrtcCompileProgram(program, len(options), options):
            messages = _read(library, program, "nvrtcGetProgramLogSize", "nvrtcGetProgramLog")
            raise CompilerError(f"{name} was not compiled: {messages.decode(errors='replace').strip()}")
        return _read(library, program, "nvrtcGetCUBINSize", "nvrtcGetCUBIN")
    finally:
        library.nvrtcDestroyProgram(byref(program))


def open_library() -> Any:
    """Load NVRTC, with the functions above.

    Raises:
        CompilerError: it is not there.
    """
    tried = []
    for candidate in _candidates():
        try:
            library = ctypes.CDLL(candidate)
            for name, arguments in PROTOTYPES.items():
                function = getattr(library, name)
                function.argtypes, function.restype = arguments, c_int
        except (OSError, AttributeError) as error:
            tried.append(str(error))
        else:
            return library
    raise CompilerError(f"NVRTC is not there ({'; '.join(tried) or 'torch is not built for CUDA'})")


def _candidates() -> Iterator[str]:
    """Where torch's CUDA builds have NVRTC: beside torch, in NVIDIA's packages, or where the system finds it."""
    import torch

    if torch.version.cuda is None:
        return
    major, minor = torch.version.cuda.split(".")[:2]
    if sys.platform == "win32":
        # In the folder that torch has added to where libraries are looked for.
        names = [f"nvrtc64_{major}0_0.dll", f"nvrtc64_{major}{minor}_0.dll"]
    else:
        names = [f"libnvrtc.so.{major}", f"libnvrtc.so.{major}.{minor}"]
    folders = [Path(torch.__file__).parent / "lib"]
    spec = find_spec("nvidia")
    for root in spec.submodule_search_locations or () if spec is not None else ():
        folders += sorted(Path(root).glob("*/lib")) + sorted(Path(root).glob("*/bin"))
    yield from (str(folder / name) for name in names for folder in folders if (folder / name).is_file())
    yield from names


def _strings(texts: Iterable[str]) -> Any:
    """An array of C's strings."""
    encoded = [text.encode() for text in texts]
    return (c_char_p * len(encoded))(*encoded)


def _read(library: Any, program: c_void_p, size_of: str, read: str) -> bytes:
    size = c_size_t()
    _check(library, size_of, program, byref(size))
    data = ctypes.create_string_buffer(size.value)
    _check(library, read, program, data)
    return data.raw


def _check(library: Any, name: str, *arguments: Any) -> None:
    if code := getattr(library, name)(*arguments):
        raise CompilerError(f"{name} failed with {code}")
