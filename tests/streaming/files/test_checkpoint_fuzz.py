"""Valid, nearly valid and broken files: the engine accepts what the safetensors library or ComfyUI accepts, as they do.

A few seconds' worth; ``WEIGHTSTREAM_FUZZ_SECONDS`` sets another time, ``WEIGHTSTREAM_FUZZ_SEED`` another start.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from weightstream.streaming import CheckpointError, CheckpointFile

CASES = 1500
SECONDS = float(os.environ.get("WEIGHTSTREAM_FUZZ_SECONDS", "0"))
SEED = int(os.environ.get("WEIGHTSTREAM_FUZZ_SEED", "1"))

BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8}
BITS |= {"I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64}
BITS |= {"I64": 64, "U64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
# Torch's names of those that both know, in all ways of writing a file.
DTYPES = {"BOOL": "bool", "F8_E5M2": "float8_e5m2", "F8_E4M3": "float8_e4m3fn", "F8_E8M0": "float8_e8m0fnu"}
DTYPES |= {"F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz", "BF16": "bfloat16", "C64": "complex64"}
DTYPES |= {f"{sign}{bits}": f"{kind}{bits}" for sign, kind in (("U", "uint"), ("I", "int")) for bits in (8, 16, 32, 64)}
DTYPES |= {f"F{bits}": f"float{bits}" for bits in (16, 32, 64)}
NAMES = ["a", "b.weight", "b.bias", "", " ", "é", "\U0001f600", "\x7f", '"', "\\", "/", "\n", "__metadata", "x" * 300]
TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[-+0-9.eE]+|[a-z]+|\s+|.', re.DOTALL)
HUGE = ["18446744073709551615", "18446744073709551616", "9223372036854775807", "9223372036854775808", "4294967296"]
NUMBERS = ["0", "1", "2", "3", "4", "8", "16", "-0", "-1", "1.0", "1e0", "0e0", "01", "+1", ".5", "1.", "1e", "1E+1"]
NUMBERS += [*HUGE, "-9223372036854775809", "9" * 30, "9" * 400, "9" * 5000, "1e400", "1e-400", "0e9999999999", "-1e999"]
LITERALS = ["true", "false", "null", "NaN", "Infinity", "-Infinity", "nul", "True", '""', "[]", "{}", "[[]]", '{"a":1}']
STRINGS = ['"dtype"', '"shape"', '"data_offsets"', '"__metadata__"', '"F32"', '"F99"', '"f32"', '"F\\u0033\\u0032"']
STRINGS += ['"\\ud800"', '"\\udc00"', '"\\ud83d\\ude00"', '"\\ud83d\\u0041"', '"\\ud83dx"', '"\\x41"', '"\\u12"', "'a'"]
STRINGS += ['"\\/\\b\\f"', '"\t"', '"\x7f"', '"\x00"', '"é"', '"\\u0000"']
STRINGS += ['{"F32":null}', '{"F32":1}', '{"F32":null,"F32":null}', '{"F32":null,"F16":null}']
STRINGS += [f'"{dtype}"' for dtype in BITS]
NESTED = [f"{'[' * n}{']' * n}" for n in (1, 124, 125, 126, 127, 2000, 100_000)]
NESTED += [f"""{'{"a":' * n}1{"}" * n}""" for n in (1, 124, 125, 126, 127, 5000)]
SIGNS = [*'{}[],:"\\ \t\n\r\f\v\0', "\ufeff", "\u00a0", "//x\n", "/**/", ",,"]
EXTRAS = ["true", "1.5", "null", '"text"', "[1,{}]", '{"a":1,"a":2}', "1e999", "NaN", '"\\ud800"', *NESTED]

Read = tuple[dict[str, Any], dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]]


def test_random_files_are_accepted_and_read_as_others_do(tmp_path: Path) -> None:
    path = str(tmp_path / "case.safetensors")
    accepted = total = 0
    for seed in _seeds():
        raw = _make(random.Random(seed))
        Path(path).write_bytes(raw)
        expected, found = _read_by_others(path), _read_by_engine(path)
        assert type(found) is type(expected), f"seed {seed}: {raw[:2000]!r}: {found} where others have {expected}"
        if not isinstance(expected, str):
            assert found == expected, f"seed {seed}: {raw[:2000]!r}"
            accepted += 1
        total += 1
    assert total / 10 < accepted < total * 9 / 10, "the files try too little"


def _seeds() -> Iterator[int]:
    if not SECONDS:
        yield from range(SEED, SEED + CASES)
        return
    end, seed = time.monotonic() + SECONDS, SEED
    while time.monotonic() < end:
        yield seed
        seed += 1


def _bytes_of(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().flatten().view(torch.uint8).numpy()) if tensor.numel() else b""


def _read_by_library(path: str) -> Read | str:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 it is no dictionary
            metadata = file.metadata() or {}
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return metadata, {name: (t.dtype, tuple(t.shape), _bytes_of(t)) for name, t in tensors.items()}


def _read_by_others(path: str) -> Read | str:
    """As the library reads it; what that refuses, as ComfyUI's own parser does (since 0.33, which checks sizes)."""
    found = _read_by_library(path)
    if not isinstance(found, str):
        return found
    raw = Path(path).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    if len(raw) < 8 or length > 100_000_000 or length > len(raw) - 8:
        return "the length is no length"
    try:
        header = json.loads(raw[8 : 8 + length].decode())
        metadata = header.pop("__metadata__", {})
        tensors = {name: _view(info, raw[8 + length :]) for name, info in header.items()}
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return metadata if isinstance(metadata, dict) else {}, tensors


def _view(info: Any, data: bytes) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    if isinstance(
        info, list
    ):  # The library's other ways to write a description and a dtype, with something odd beside.
        info = dict(zip(("dtype", "shape", "data_offsets"), info, strict=True))
    if isinstance(info["dtype"], dict) and list(info["dtype"].values()) == [None]:
        info = {**info, "dtype": next(iter(info["dtype"]))}
    if info["dtype"] == "F4" and info["shape"]:  # So does what ComfyUI knows no dtype for.
        info = {**info, "dtype": "U8", "shape": [*info["shape"][:-1], info["shape"][-1] / 2]}
        info["shape"][-1] = int(info["shape"][-1]) if info["shape"][-1].is_integer() else None
        dtype, shape, raw = _view(info, data)
        return torch.float4_e2m1fn_x2, shape, raw
    dtype, shape, (begin, end) = getattr(torch, DTYPES[info["dtype"]]), info["shape"], info["data_offsets"]
    if {type(begin), type(end)} != {int} or not 0 <= begin <= end or math.prod(shape) * dtype.itemsize != end - begin:
        raise ValueError("sizes do not agree")
    if begin == end:
        return dtype, tuple(torch.empty(shape, dtype=dtype).shape), b""
    return dtype, tuple(torch.frombuffer(bytearray(data[begin:end]), dtype=dtype).view(shape).shape), data[begin:end]


def _read_by_engine(path: str) -> Read | str:
    try:
        file = CheckpointFile(path)
    except CheckpointError as error:
        return str(error)
    views = file.views()
    tensors = {}
    for name, entry in file.entries.items():
        target = bytearray(entry.end - entry.begin)
        file.read_into(memoryview(target), entry.begin)
        assert bytes(target) == _bytes_of(views[name])
        assert (views[name].dtype, tuple(views[name].shape)) == (entry.dtype, entry.shape)
        tensors[name] = (entry.dtype, entry.shape, bytes(target))
    file.close()
    return file.metadata, tensors


def _make(choose: random.Random) -> bytes:
    """A file: half of them with a fault or two, which may be harmless."""
    header, data = _make_valid(choose)
    faults = [] if choose.random() < 0.15 else choose.choices(FAULTS, k=choose.choice([1, 1, 1, 2, 3]))
    for fault in faults:
        header, data = fault(choose, header, data)
    text = header.encode("utf-8", "surrogatepass")
    raw = len(text).to_bytes(8, "little") + text + data
    return choose.choice(BYTE_FAULTS)(choose, raw) if choose.random() < 0.1 else raw


def _make_valid(choose: random.Random) -> tuple[str, bytes]:
    infos, position = [], 0
    for name in choose.sample(NAMES, choose.choice([0, 1, 1, 2, 3, 5])):
        dtype = choose.choice(list(BITS)[:-2] if choose.random() < 0.98 else list(BITS))
        shape = [choose.choice([0, 1, 1, 2, 2, 3, 4]) for _ in range(choose.choice([0, 1, 1, 2, 2, 3, 5]))]
        if dtype.startswith(("F4", "F6")):
            shape = [*shape, choose.choice([2, 4, 8])]
        bits = BITS[dtype]
        for size in shape:
            bits *= size
        info = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + bits // 8]}
        fields = choose.sample(list(info.items()), 3)
        infos.append((name, dict(fields)))
        position += bits // 8
    if choose.random() < 0.7:
        choose.shuffle(infos)
    if choose.random() < 0.3:
        texts = dict.fromkeys(choose.sample(NAMES, choose.randrange(3)), "text")
        infos.insert(choose.randrange(len(infos) + 1), ("__metadata__", texts))
    separators = choose.choice([(",", ":"), (", ", ": "), (" ,\n", "\t:\r")])
    text = json.dumps(dict(infos), ensure_ascii=choose.random() < 0.5, separators=separators)
    return text + " " * choose.choice([0, 0, 3, 7]), choose.randbytes(position)


def _replace_token(choose: random.Random, header: str, data: bytes) -> tuple[str, bytes]:
    tokens = TOKEN.findall(header)
    at = choose.randrange(len(tokens))
    if choose.random() < 0.6:  # a value for one of its kind, which gets further into the reader
        kind = choose.choice(["string", "number"])
        wanted = [
            i for i, token in enumerate(tokens) if (token[0] == '"') == (kind == "string") and token[0] in '"0123456789'
        ]
        at = choose.choice(wanted) if wanted else at
        pool = STRINGS if kind == "string" else NUMBERS
    else:
        pool = choose.choice([NUMBERS, LITERALS, STRINGS, SIGNS, NESTED, [""]])
    tokens[at] = choose.choice(pool)
    return "".join(tokens), data


def _insert_token(choose: random.Random, header: str, data: bytes) -> tuple[str, bytes]:
    tokens = TOKEN.findall(header)
    tokens.insert(choose.randrange(len(tokens) + 1), choose.choice(choose.choice([SIGNS, SIGNS, LITERALS, NUMBERS])))
    return "".join(tokens), data


def _swap_tokens(choose: random.Random, header: str, data: bytes) -> tuple[str, bytes]:
    tokens = TOKEN.findall(header)
    one, two = choose.randrange(len(tokens)), choose.randrange(len(tokens))
    tokens[one], tokens[two] = tokens[two], tokens[one]
    return "".join(tokens), data


def _change_number(choose: random.Random, header: str, data: bytes) -> tuple[str, bytes]:
    """Offsets and sizes that lie."""
    numbers = list(re.finditer(r"(?<![\w\"])\d+(?![\w\"])", header))
    if numbers:
        match = choose.choice(numbers)
        value = int(match[0][:30]) + choose.choice([-8, -4, -1, 1, 2, 4, 8, 2**32, 2**63, 2**64])
        header = header[: match.start()] + str(value) + header[match.end() :]
    return header, data


def _add_sizes(choose: random.Random, header: str, data: bytes) -> tuple[str, bytes]:
    """A shape's product that overflows, or would but for a zero."""
    sizes = ",".join(
        choose.choice(["0", "0", "1", "2", "4294967296", "2147483648", *HUGE]) for _ in range(choose.randrange(4))
    )
    shape = choose.choice([f"[{sizes}]", f"[0,{sizes}]", f"[{sizes},0]", "[" + "1," * 80 + "0]"]).replace(",]", "]")
    dtype = choose.choice(list(BITS))
    at = choose.choice([0, 0, len(data), len(data), 1])
    entry = f'"added":{{"dtype":"{dtype}","shape":{shape.replace("[,", "[")},"data_offsets":[{at},{at}]}}'
    return _add(header, entry), data


def _add_field(choose: random.Random, header: str, data: bytes) -> tuple[str, bytes]:
    """A field that the format does not know, or one once more, first or last in a random object."""
    name = choose.choice(
        ['"extra"', '"\\ud800"', '"dtype"', '"shape"', '"data_offsets"', '"__metadata__"', '"a"', '""']
    )
    field = f"{name}:{choose.choice(EXTRAS)}"
    ends = [match.start() for match in re.finditer(r"(?<=[\]\"}])\s*}", header)]
    if not ends:
        return _add(header, field), data
    at = choose.choice(ends)
    return f"{header[:at]},{field}{header[at:]}", data


def _repeat_entry(choose: random.Random, header: str, data: bytes) -> tuple[str, bytes]:
    """A name twice, with the same or another description; the last is meant to count."""
    try:
        tree = json.loads(header)
        name = choose.choice(list(tree))
        value = dict(tree[name])
    except (ValueError, IndexError, TypeError, AttributeError, RecursionError):
        return header, data
    if choose.random() < 0.5 and value:
        value[choose.choice(list(value))] = choose.choice([[0], [0, 0], "F32", "XX", [], None, [0, 4]])
    try:
        return _add(header, f"{json.dumps(name)}:{json.dumps(value)}", choose.random() < 0.5), data
    except RecursionError:
        return header, data


def _as_list(choose: random.Random, header: str, data: bytes) -> tuple[str, bytes]:
    """A description as the list of its values, in an order that may be the fields' own."""
    try:
        tree = json.loads(header)
        name = choose.choice([name for name in tree if name != "__metadata__"])
        info = tree[name]
        order = choose.choice([("dtype", "shape", "data_offsets"), list(info), ("dtype", "shape")])
        tree[name] = [info[field] for field in order] + choose.choice([[], [], [1]])
        return json.dumps(tree), data
    except (ValueError, IndexError, TypeError, KeyError, AttributeError, RecursionError):
        return header, data


def _pad(choose: random.Random, header: str, data: bytes) -> tuple[str, bytes]:
    pad = choose.choice([" ", "\n", "\t", "\r", "\0", "\f", "\u00a0", "x", "}", ""])
    return (header + pad * 4, data) if choose.random() < 0.7 else (pad + header, data)


def _resize_data(choose: random.Random, header: str, data: bytes) -> tuple[str, bytes]:
    return header, choose.choice([data[:-1], data[: len(data) // 2], data + b"\0", b"", data + bytes(4096)])


def _add(header: str, entry: str, first: bool = False) -> str:
    body = header.strip()
    if not body.endswith("}") or not body.startswith("{"):
        return header
    inner = body[1:-1]
    if not inner.strip():
        return f"{{{entry}}}"
    return f"{{{entry},{inner}}}" if first else f"{{{inner},{entry}}}"


def _flip_bytes(choose: random.Random, raw: bytes) -> bytes:
    changed = bytearray(raw)
    for _ in range(choose.choice([1, 1, 2, 5])):
        changed[choose.randrange(len(changed))] = choose.choice(
            [0, 0x20, 0x7F, 0x80, 0xC0, 0xED, 0xFF, choose.randrange(256)]
        )
    return bytes(changed)


def _truncate(choose: random.Random, raw: bytes) -> bytes:
    return raw[: choose.choice([0, 7, 8, 9, choose.randrange(len(raw)), len(raw) - 1])]


def _lie_about_length(choose: random.Random, raw: bytes) -> bytes:
    length = int.from_bytes(raw[:8], "little")
    lies = [
        0,
        1,
        length - 1,
        length + 1,
        len(raw) - 8,
        len(raw) - 7,
        100_000_000,
        100_000_001,
        2**63,
        2**64 - 1,
        2**64 - 8,
    ]
    return max(0, choose.choice(lies)).to_bytes(8, "little") + raw[8:]


FAULTS = [_replace_token, _replace_token, _insert_token, _swap_tokens, _change_number, _add_sizes, _add_field]
FAULTS += [_repeat_entry, _as_list, _pad, _resize_data]
BYTE_FAULTS = [_flip_bytes, _truncate, _lie_about_length]


def _tensor(dtype: str = '"F32"', shape: str = "[2]", offsets: str = "[0,8]", more: str = "") -> str:
    return f'{{"a":{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}{more}}}}}'


SPECIAL = [_tensor(more=f',"x":{extra}') for extra in [*EXTRAS, *NUMBERS, *STRINGS, *LITERALS]]
SPECIAL += [_tensor(dtype=text) for text in [*STRINGS, *LITERALS, '{"F32":null,"F32":0}', '{"F32":{}}', '["F32"]']]
SPECIAL += [_tensor(f'"{dtype}"', f"[{64 // bits}]") for dtype, bits in BITS.items()]
SPECIAL += [_tensor('"F4"', shape) for shape in ("[16]", "[15]", "[17]", "[2,8]", "[16,1]", "[0,16]", "[]")]
SPECIAL += [_tensor('"F4"', shape, "[0,0]") for shape in ("[0]", "[0,2]", "[0,1]", "[1,0]", "[]", "[1]")]
SPECIAL += [_tensor(shape=f"[{size}]") for size in [*NUMBERS, *LITERALS, "2.0", "2e0", "20e-1", '"2"', "[2]"]]
SPECIAL += [_tensor(shape=f"[true,{size}]") for size in ("2", "false", "null")]
SPECIAL += [_tensor(shape=shape) for shape in ("[1,2]", "[2,1,1]", "[2,]", "[,2]", "[1 2]", "2", "{}", '"2"', "null")]
SPECIAL += [_tensor(shape=f"[0,{size}]", offsets="[0,0]") for size in HUGE]
SPECIAL += [_tensor('"F32"', f"[{first},{second},0]", "[0,0]") for first in HUGE for second in ("2", "4294967296", "0")]
SPECIAL += [_tensor(offsets=f"[0,{end}]") for end in [*NUMBERS, *LITERALS, "8.0", "8e0", '"8"', "8,8", "8,"]]
SPECIAL += [_tensor(offsets=f"[{begin},8]") for begin in ("-0", "0.0", "0e0", "00", "false", "null", "4", "8", "16")]
SPECIAL += [_tensor(offsets=text) for text in ("[]", "[8]", "[8,0]", "{}", "null", '{"0":0,"1":8}', '"08"')]
SPECIAL += [_tensor(more=f",{name}:{value}") for name in ('"dtype"', '"\\u0064type"') for value in ('"F32"', "1")]
SPECIAL += [f'{{"a":["F32",[2],[0,8]{more}]}}' for more in ("", ",1", ",")]
SPECIAL += [f'{{"a":{value}}}' for value in ("1", "null", "[]", "{}", '""', '["F32",[2]]', '[[2],"F32",[0,8]]')]
SPECIAL += [_tensor()[:-1] + f',"a":{value}}}' for value in ("null", "{}", '["F32",[2],[0,8]]', '["F32",[2],[0,4]]')]
SPECIAL += [
    _tensor()[:-1] + f',"__metadata__":{value}}}'
    for value in ("null", "{}", "[]", "1", '""', '{"a":1}', '{"a":null}', '{"a":"1","a":"2"}', '{"a":"1","a":2}')
]
SPECIAL += [
    _tensor()[:-1] + f',"__metadata__":{one},"__metadata__":{two}}}' for one in ("null", "{}") for two in ("{}",)
]
SPECIAL += [before + _tensor() + after for before in ("", " ", "\ufeff", "\0") for after in ("", " \t\r\n", "\0", "{}")]


@pytest.mark.parametrize("nbytes", [0, 8])
def test_special_headers_have_the_verdict_of_others(tmp_path: Path, nbytes: int) -> None:
    path = tmp_path / "special.safetensors"
    for header in SPECIAL:
        text = header.encode("utf-8", "surrogatepass")
        path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(range(nbytes)))
        expected, found = _read_by_others(str(path)), _read_by_engine(str(path))
        same = found == expected or {type(found), type(expected)} == {str}
        assert same, f"{text[:300]!r}: {found} where others have {expected}"


@pytest.mark.parametrize("length", [99_999_999, 100_000_000, 100_000_001])
def test_the_longest_header_is_the_librarys(tmp_path: Path, length: int) -> None:
    path = tmp_path / "long.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{}".ljust(length))
    assert type(_read_by_engine(str(path))) is type(_read_by_library(str(path)))
