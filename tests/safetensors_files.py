"""Making safetensors files by hand, well-formed and not."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from surgery.checkpoint.dtypes import BITS
from surgery.checkpoint.header import Header, read_header

Tensors = Mapping[str, tuple[str, tuple[int, ...]]]


def blob(
    header: str | bytes | dict[str, Any], data: bytes = b"", length: int | None = None
) -> bytes:
    """A file with this header and data; `length` is what it claims, if not the truth."""
    if isinstance(header, dict):
        header = json.dumps(header)
    raw = header.encode() if isinstance(header, str) else header
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def entry(dtype: str, shape: list[Any], begin: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * BITS[dtype] // 8


def tiled(tensors: Tensors, metadata: Mapping[str, str] | None = None) -> bytes:
    """A well-formed file of `tensors` in order, its data the bytes 0, 1, 2, …"""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    position = 0
    for name, (dtype, shape) in tensors.items():
        end = position + nbytes(dtype, shape)
        header[name] = entry(dtype, list(shape), position, end)
        position = end
    return blob(header, bytes(i % 251 for i in range(position)))


@contextmanager
def opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def header_of(path: Path) -> Header:
    """The header of a file, read by the code under test; messages call it `FILE`."""
    with opened(path) as descriptor:
        return read_header(descriptor, "FILE")


NAMES = st.text(st.characters(categories=("L", "N", "P", "S")), min_size=1, max_size=12)
SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)


@st.composite
def tensor_sets(draw: st.DrawFn) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Names to (dtype, shape), each of a whole number of bytes."""
    found = draw(
        st.dictionaries(NAMES, st.tuples(st.sampled_from(sorted(BITS)), SHAPES), max_size=4)
    )
    whole = {n: t for n, t in found.items() if math.prod(t[1]) * BITS[t[0]] % 8 == 0}
    return {name: tensor for name, tensor in whole.items() if name != "__metadata__"}
