"""safetensors files as headers alone: damaged in every way we thought of, and judged.

The files here are `HeaderFile`s: the length they claim, their JSON and how many zero bytes
follow, so that a header of a 2 GB shard costs its own few kilobytes. `judge` is the law that the
fuzzer and the campaign of mutations share.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fuzzing import Violation, check_message

_NUMBER = re.compile(rb"-?\d+")
_ENTRY = re.compile(rb'"[^"]*":\{[^{}]*\}')
_FIELD = re.compile(rb'"(?:dtype|shape|data_offsets)":(?:"[^"]*"|\[[^\]]*\])')
_DTYPE = re.compile(rb'"dtype":"[^"]*"')
_KEY = re.compile(rb'"[^"]*":')

WIDTHS = {"BOOL": 8, "U8": 8, "F4": 4, "F6_E2M3": 6, "F8_E8M0": 8, "BF16": 16, "F16": 16,
          "F32": 32, "F64": 64, "C64": 64}  # fmt: skip
"""Bits of the dtypes that files here get; a list of its own, so that ours is checked too."""
DTYPES = tuple(name.encode() for name in WIDTHS)
NUMBERS = (
    b"0", b"-0", b"-1", b"1.0", b"1e2", b"00", b"true", b"null", b'"1"', b"[]", b"NaN", b"1e999",
    b"2147483648", b"4294967296", b"9223372036854775807", b"9223372036854775808",
    b"18446744073709551615", b"18446744073709551616", b"1" * 40, b"1" * 5000,
)  # fmt: skip
NAMES = (
    b"", b"__metadata__", b"../../x", b"\\u0000", b"\\ud800", b"\\ud83d\\ude00", b"<script>",
    b"\\n\\u001b[2J", b"\x00", b"\xff", b"a" * 100_000, b"dtype",
)  # fmt: skip


@dataclass(frozen=True)
class HeaderFile:
    """A file that claims a header of `length`, holds `raw` and `data` zero bytes after it."""

    length: int
    raw: bytes
    data: int

    @classmethod
    def read(cls, path: Path) -> HeaderFile:
        """The header of the safetensors file `path`."""
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            return cls(length, file.read(length), path.stat().st_size - 8 - length)

    @classmethod
    def split(cls, data: bytes) -> HeaderFile:
        """Any bytes as a header file, as well as they can be taken for one."""
        length = int.from_bytes(data[:8], "little")
        raw = data[8 : 8 + length]
        return cls(length, raw, max(len(data) - 8 - len(raw), 0))

    @property
    def head(self) -> bytes:
        return (self.length % 2**64).to_bytes(8, "little") + self.raw

    @property
    def size(self) -> int:
        return len(self.head) + self.data

    def text(self, raw: bytes) -> HeaderFile:
        """The file with `raw` for a header, its length told truly."""
        return replace(self, length=len(raw), raw=raw)

    @contextmanager
    def opened(self) -> Iterator[int]:
        """A descriptor of the file, in memory and sparse."""
        descriptor = os.memfd_create("header")
        try:
            os.write(descriptor, self.head)
            os.ftruncate(descriptor, self.size)
            yield descriptor
        finally:
            os.close(descriptor)


Mutation = Callable[[HeaderFile, random.Random], HeaderFile]


def flip_bit(file: HeaderFile, rng: random.Random) -> HeaderFile:
    head = bytearray(file.head)
    head[rng.randrange(len(head))] ^= 1 << rng.randrange(8)
    return replace(file, length=int.from_bytes(head[:8], "little"), raw=bytes(head[8:]))


def truncate(file: HeaderFile, rng: random.Random) -> HeaderFile:
    """Ends the file within the header, or within the data; the length stays a claim."""
    if rng.random() < 0.5:
        return replace(file, raw=file.raw[: rng.randrange(len(file.raw) + 1)], data=0)
    return replace(file, data=rng.randrange(file.data + 1))


def splice(file: HeaderFile, rng: random.Random) -> HeaderFile:
    """Puts a slice of the header at another place of it, over what is there or between."""
    raw, size = file.raw, len(file.raw)
    begin, place = rng.randrange(size + 1), rng.randrange(size + 1)
    piece = raw[begin : begin + rng.randrange(64)]
    over = len(piece) if rng.random() < 0.5 else 0
    return file.text(raw[:place] + piece + raw[place + over :])


def edit_number(file: HeaderFile, rng: random.Random) -> HeaderFile:
    return _substitute(file, rng, _NUMBER, lambda old: _other_number(old, rng))


def _other_number(old: bytes, rng: random.Random) -> bytes:
    draw = rng.random()
    if draw < 0.3:
        # The same number to Python, but no integer, or no JSON, to the format.
        return rng.choice((old + b".0", old + b"e0", b"0" + old, b"+" + old, b"-" + old))
    if draw < 0.6 and len(old) <= 40:
        return b"%d" % (int(old) + rng.choice((-8, -4, -2, -1, 1, 2, 4, 8)))
    return rng.choice(NUMBERS)


def duplicate_key(file: HeaderFile, rng: random.Random) -> HeaderFile:
    """Says an entry, or a field of one, twice."""
    pattern = rng.choice((_ENTRY, _FIELD))
    return _substitute(file, rng, pattern, lambda old: old + b"," + old)


def change_dtype(file: HeaderFile, rng: random.Random) -> HeaderFile:
    return _substitute(file, rng, _DTYPE, lambda _: b'"dtype":"%s"' % rng.choice(DTYPES))


def rename(file: HeaderFile, rng: random.Random) -> HeaderFile:
    return _substitute(file, rng, _KEY, lambda _: b'"%s":' % rng.choice(NAMES))


def claim_length(file: HeaderFile, rng: random.Random) -> HeaderFile:
    lengths = (0, 1, 2**31, 2**63, 2**64 - 1, 100_000_001, file.size, file.size - 8)
    near = file.length + rng.choice((-8, -1, 1, 8))
    return replace(file, length=rng.choice((*lengths, near)))


def resize_data(file: HeaderFile, rng: random.Random) -> HeaderFile:
    return replace(file, data=max(file.data + rng.choice((-8, -2, -1, 1, 2, 8)), 0))


def wrap(file: HeaderFile, rng: random.Random) -> HeaderFile:
    """Something before, after or around the JSON."""
    around = (
        (b" ", b""), (b"\xef\xbb\xbf", b""), (b"[", b"]"), (b'{"a":' * 3000, b"}" * 3000),
        (b"", b"\x00"), (b"", b"}"), (b"", b" \t\n"), (b"", b"x"),
    )  # fmt: skip
    before, after = rng.choice(around)
    return file.text(before + file.raw + after)


def add_metadata(file: HeaderFile, rng: random.Random) -> HeaderFile:
    values = (b'"a":"b"', b'"a":1', b'"a":"b","a":"c"', b'"a":null', b'"\\ud800":"x"', b'"a":{}')
    entry = b'"__metadata__":{%s},' % rng.choice(values)
    return file.text(file.raw[:1] + entry + file.raw[1:])


def shrink(file: HeaderFile) -> HeaderFile:
    """The file with every dimension cut to at most 2: a real header over a handful of bytes."""
    entries = json.loads(file.raw)
    for name, entry in entries.items():
        if name != "__metadata__":
            entry["shape"] = [min(size, 2) for size in entry["shape"]]
    return retile(file.text(json.dumps(entries).encode()), random.Random(0))


def retile(file: HeaderFile, rng: random.Random) -> HeaderFile:
    """Gives the entries the offsets and the file the data that their shapes ask for.

    Other damage is refused at the first contradiction; this is the way past it.
    """
    try:
        entries = json.loads(file.raw)
        position = _lay_out(entries, rng)
        raw = json.dumps(entries, ensure_ascii=rng.random() < 0.5).encode()
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return file
    whole = isinstance(position, int) and 0 <= position < 2**40
    return replace(file.text(raw), data=position if whole else file.data)


def _lay_out(entries: dict[str, Any], rng: random.Random) -> int:
    names = [name for name in entries if name != "__metadata__"]
    rng.shuffle(names)
    position = 0
    for name in names:
        entry = entries[name]
        if not all(type(size) is int for size in entry["shape"]):
            raise ValueError("a list times a number would be a list as long as the number")
        end = position + math.prod(entry["shape"]) * WIDTHS.get(entry["dtype"], 8) // 8
        entry["data_offsets"], position = [position, end], end
    return position


MUTATIONS: dict[str, Mutation] = {
    "bit flip": flip_bit,
    "truncation": truncate,
    "splice": splice,
    "number": edit_number,
    "duplicate key": duplicate_key,
    "dtype": change_dtype,
    "rename": rename,
    "length": claim_length,
    "data size": resize_data,
    "wrap": wrap,
    "metadata": add_metadata,
    "retile": retile,
}


def _substitute(
    file: HeaderFile, rng: random.Random, pattern: re.Pattern[bytes], new: Callable[[bytes], bytes]
) -> HeaderFile:
    """Replaces one match of `pattern`, drawn at random; nothing where there is none."""
    found = list(pattern.finditer(file.raw))
    if not found:
        return file
    match = rng.choice(found)
    return file.text(file.raw[: match.start()] + new(match[0]) + file.raw[match.end() :])


Tensors = dict[str, tuple[str, tuple[int, ...]]]


def judge(read: Callable[[int, str], Any], refusal: type[Exception], file: HeaderFile) -> str:
    """ "accepted" or "refused" by `read`, our reader; raises `Violation` where the law is broken.

    The law: a refusal is one printable line; what is accepted holds no key twice, and the
    reference library accepts it too and sees the same names, dtypes and shapes.
    """
    with file.opened() as descriptor:
        try:
            header = read(descriptor, "FILE")
        except refusal as error:
            return check_message(error)
        json.loads(file.raw[: file.length], object_pairs_hook=_unique)
        ours = {name: (info.dtype, info.shape) for name, info in header.tensors.items()}
        theirs = _reference(descriptor)
    if ours != theirs:
        raise Violation(f"wrong accept: we read {ours!r:.200}, the library {theirs!r:.200}")
    return "accepted"


def _unique(pairs: list[tuple[str, Any]]) -> None:
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise Violation(f"wrong accept: a key is there twice among {names!r:.200}")


def _reference(descriptor: int) -> Tensors:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(f"/proc/self/fd/{descriptor}", "np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {n: (s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}
    except SafetensorError as error:
        raise Violation(f"wrong accept: the library says {error}") from None
