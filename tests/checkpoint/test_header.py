"""The header reader refuses malformed files at once and agrees with the library on the rest."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import safetensors
from hypothesis import given
from hypothesis import strategies as st
from safetensors_files import blob, entry, header_of, tensor_sets, tiled

from surgery.checkpoint.dtypes import BITS
from surgery.checkpoint.header import parse_header
from surgery.errors import CheckpointError

U8 = entry("U8", [2], 0, 2)
TEXT_U8 = json.dumps(U8)


def one(dtype: Any, shape: Any, begin: Any, end: Any, size: int = 8) -> bytes:
    return blob({"a": entry(dtype, shape, begin, end)}, bytes(size))


LENGTHS = {
    "empty file": b"",
    "seven bytes": bytes(7),
    "header of nothing": blob(""),
    "header length 2**63": blob("{}", length=2**63),
    "header length 2**64-1": blob("{}", length=2**64 - 1),
    "header length over the bound": blob("{}", length=100_000_001),
    "header past the file": blob("{}", length=3),
    "one byte short": tiled({"a": ("U8", (4,))})[:-1],
    "one byte long": tiled({"a": ("U8", (4,))}) + b"\0",
}
RANGES = {
    "hole": blob({"a": U8, "b": entry("U8", [1], 3, 4)}, bytes(4)),
    "hole at the start": blob({"a": entry("U8", [1], 1, 2)}, bytes(2)),
    "overlap": blob({"a": U8, "b": entry("U8", [2], 1, 3)}, bytes(3)),
    "aliased range": blob({"a": U8, "b": U8}, bytes(2)),
    "zero-size inside another": blob({"a": U8, "b": entry("U8", [0], 1, 1)}, bytes(2)),
    "backwards": one("U8", [0], 4, 2),
    "duplicate key": blob(f'{{"a":{TEXT_U8},"a":{TEXT_U8}}}', bytes(2)),
    "duplicate field": blob(
        '{"a":{"dtype":"U8","dtype":"U8","shape":[2],"data_offsets":[0,2]}}', b"ab"
    ),
    "duplicate metadata": blob('{"__metadata__":{"x":"1","x":"1"}}'),
    "metadata of numbers": blob('{"__metadata__":{"x":1}}'),
    "metadata of objects": blob('{"__metadata__":{"x":{}}}'),
    "metadata a list": blob('{"__metadata__":[]}'),
    "metadata with a lone surrogate": blob('{"__metadata__":{"x":"\\ud800"}}'),
    "metadata key a lone surrogate": blob('{"__metadata__":{"\\udfff":"x"}}'),
}
SHAPES = {
    "too few bytes": one("F32", [3], 0, 8),
    "too many bytes": one("F32", [1], 0, 8),
    "overflow": one("F32", [2**62, 2], 0, 8),
    "overflow behind a zero": one("F32", [2**62, 4, 0], 0, 0, 0),
    "wrap to the right size": one("U8", [2**32, 2**32, 8], 0, 8),
    "a dimension of 2**64": one("U8", [2**64], 0, 8),
    "negative": one("U8", [-8], 0, 8),
    "two negatives": one("U8", [-2, -4], 0, 8),
    "float": one("U8", [8.0], 0, 8),
    "exponent": blob('{"a":{"dtype":"U8","shape":[8e0],"data_offsets":[0,8]}}', bytes(8)),
    "minus zero": blob('{"a":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}'),
    "true": one("U8", [True, 8], 0, 8),
    "text": one("U8", ["8"], 0, 8),
    "NaN": blob('{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,8]}}', bytes(8)),
    "not a list": one("U8", 8, 0, 8),
    "65 axes": one("U8", [1] * 65, 0, 1, 1),
    "offset past the end": one("U8", [9], 0, 9),
    "negative offset": one("U8", [8], -8, 0),
    "float offset": one("U8", [8], 0, 8.0),
    "offset of 2**64": one("U8", [8], 2**64, 2**64 + 8),
    "three offsets": blob('{"a":{"dtype":"U8","shape":[8],"data_offsets":[0,4,8]}}', bytes(8)),
    "unknown dtype": one("F7", [8], 0, 8),
    "dtype a number": one(8, [8], 0, 8),
    "odd number of half bytes": one("F4", [3], 0, 1, 1),
    "three sixes of a byte": one("F6_E2M3", [3], 0, 2, 2),
    "no shape": blob('{"a":{"dtype":"U8","data_offsets":[0,0]}}'),
    "more than asked": blob('{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0],"x":1}}'),
    "tensor a list": blob('{"a":[]}'),
}
TEXTS = {
    "leading space": blob(" {}"),
    "byte order mark": blob(b"\xef\xbb\xbf{}"),
    "invalid UTF-8": blob(b'{"\xff":1}'),
    "UTF-16": blob("{}".encode("utf-16-le")),
    "deep nesting": blob('{"a":' + "[" * 100_000 + "]" * 100_000 + "}"),
    "deep objects": blob('{"a":' * 50_000 + "1" + "}" * 50_000),
    "array": blob("[]"),
    "text": blob('"{}"'),
    "cut off": blob('{"a":'),
    "two objects": blob("{}{}"),
    "a number of 5,000 digits": blob('{"a":' + "1" * 5000 + "}"),
    "name with NUL": blob('{"a\\u0000b":' + TEXT_U8 + "}", bytes(2)),
    "name with an escape": blob('{"\\u001b[2J":' + TEXT_U8 + "}", bytes(2)),
    "name a lone surrogate": blob('{"\\ud800":' + TEXT_U8 + "}", bytes(2)),
    "name with a line break": blob('{"a\\nb":' + TEXT_U8 + "}", bytes(2)),
    "no name": blob('{"":' + TEXT_U8 + "}", bytes(2)),
}
MALFORMED = LENGTHS | RANGES | SHAPES | TEXTS


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_file_is_refused_in_one_line(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        header_of(path)
    message = str(caught.value)
    assert message.startswith("FILE: ")
    assert message.isprintable()
    assert len(message) < 1000


@pytest.mark.parametrize("length", [2**63, 100_000_001, 2**40])
def test_a_claimed_length_is_checked_before_it_is_allocated(length: int, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(blob("{}", length=length))
    with path.open("r+b") as file:
        file.truncate(1 << 42)  # sparse: the file is really that large
    assert peak_of(path) < 100_000


@pytest.mark.parametrize("shape", [[2**40], [2**62, 0]])
def test_a_claimed_shape_is_checked_before_it_is_allocated(
    shape: list[int], tmp_path: Path
) -> None:
    path = tmp_path / "file"
    path.write_bytes(one("U8", shape, 0, 8))
    assert peak_of(path) < 100_000


def peak_of(path: Path) -> int:
    """Bytes allocated at once while the header of `path` is refused."""
    tracemalloc.start()
    with pytest.raises(CheckpointError):
        header_of(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


@pytest.mark.parametrize("name", ["../../x", "<script>alert(1)</script>", "/etc/passwd", "C:\\x"])
def test_a_name_is_never_a_path(name: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(blob({name: U8}, b"ab"))
    assert header_of(path).tensors[name].nbytes == 2


def test_a_name_of_a_megabyte_is_read_but_never_repeated(tmp_path: Path) -> None:
    name, path = "n" * 1_000_000, tmp_path / "file"
    path.write_bytes(blob({name: U8}, b"ab"))
    assert list(header_of(path).tensors) == [name]
    path.write_bytes(blob({name: entry("U8", [3], 0, 2)}, b"ab"))
    with pytest.raises(CheckpointError) as caught:
        header_of(path)
    assert len(str(caught.value)) < 300


def test_many_keys_with_a_duplicate_at_the_end_are_refused_in_linear_time(tmp_path: Path) -> None:
    keys = ",".join(f'"k{i}":0' for i in range(100_000))
    with pytest.raises(CheckpointError, match="duplicate key 'k99999'"):
        parse_header(f'{{{keys},"k99999":0}}'.encode(), 10**9, "FILE")


@given(
    tensors=tensor_sets(), metadata=st.none() | st.dictionaries(st.text(), st.text(), max_size=3)
)
def test_valid_files_are_read_as_the_library_reads_them(
    tensors: dict[str, Any], metadata: dict[str, str] | None
) -> None:
    data = tiled(tensors, metadata)
    header = parse(data)
    assert header.metadata == (metadata or {})
    found = {
        name: (info.dtype, list(info.shape), data[info.begin : info.end])
        for name, info in header.tensors.items()
    }
    assert found == by_library(data)


@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("shape", [(8,), (0, 3), (2, 4)])
def test_every_element_type_has_the_width_the_library_gives_it(
    dtype: str, shape: tuple[int, ...]
) -> None:
    data = tiled({"a": (dtype, shape)})
    assert list(parse(data).tensors) == list(by_library(data))


@pytest.mark.parametrize("dtype", [dtype for dtype, bits in BITS.items() if bits >= 8])
def test_a_scalar_has_no_axes(dtype: str) -> None:
    data = tiled({"a": (dtype, ())})
    assert parse(data).tensors["a"].shape == ()
    assert by_library(data)["a"][1] == []


JUNK = st.sampled_from([b"-", b"0", b"9", b".", b"e", b'"', b"{", b"[", b",", b"\\ud800", b"\xff"])


@given(
    tensors=tensor_sets().filter(bool),
    position=st.floats(0, 1, exclude_max=True),
    length=st.integers(0, 3),
    junk=st.lists(JUNK, max_size=2).map(b"".join),
)
def test_what_the_library_refuses_is_refused(
    tensors: dict[str, Any], position: float, length: int, junk: bytes
) -> None:
    """A few bytes of a valid header are replaced; its stated length follows."""
    whole = tiled(tensors, {"x": "y"})
    size = int.from_bytes(whole[:8], "little")
    raw, data = whole[8 : 8 + size], whole[8 + size :]
    start = int(position * size)
    assert_no_more_lenient(blob(raw[:start] + junk + raw[start + length :], data))


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED)
def test_the_library_is_nowhere_stricter(data: bytes) -> None:
    assert_no_more_lenient(data)


def assert_no_more_lenient(data: bytes) -> None:
    try:
        header = parse(data)
    except CheckpointError:
        return
    assert set(header.tensors) == set(by_library(data))


def parse(data: bytes) -> Any:
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or 8 + size > len(data):
        raise CheckpointError("the stated length is the business of other tests")
    return parse_header(data[8 : 8 + size], len(data), "FILE")


def by_library(data: bytes) -> dict[str, tuple[str, list[int], bytes]]:
    return {
        name: (tensor["dtype"], tensor["shape"], bytes(tensor["data"]))
        for name, tensor in safetensors.deserialize(data)
    }
