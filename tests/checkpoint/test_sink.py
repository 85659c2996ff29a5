"""Whichever way the file system takes its bytes, a copy holds the same ones."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery.checkpoint import sink
from surgery.checkpoint.sink import BUFFER
from surgery.checkpoint.stream import PART, Copied, Patch, copy
from surgery.errors import CheckpointError

SIZES = [
    0, 1, 511, 512, 4095, 4096, 4097, PART - 1, PART + 1,
    BUFFER - 4096, BUFFER - 1, BUFFER, BUFFER + 1, BUFFER + 4096, 2 * BUFFER, 2 * BUFFER + 4097,
]  # fmt: skip
Ways = Callable[[str], None]


@pytest.fixture
def take(monkeypatch: pytest.MonkeyPatch) -> Ways:
    """`take(way)`: how the file system answers direct writes from now on."""
    real_fcntl, real_pwrite = fcntl.fcntl, os.pwrite

    def direct(descriptor: int) -> int:
        return real_fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT

    def no_flag(descriptor: int, command: int, argument: int = 0) -> int:
        if command == fcntl.F_SETFL and argument & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no direct writes here")
        return real_fcntl(descriptor, command, argument)

    def no_write(descriptor: int, data: Any, offset: int) -> int:
        if direct(descriptor):
            raise OSError(errno.EINVAL, "the flag was taken, the write is not")
        return real_pwrite(descriptor, data, offset)

    def short(descriptor: int, data: Any, offset: int) -> int:
        """What the kernel may do with any write: the rest is not aligned any more."""
        if direct(descriptor) and (offset % 512 or len(data) % 512):
            raise OSError(errno.EINVAL, "not aligned")
        flags = real_fcntl(descriptor, fcntl.F_GETFL)
        real_fcntl(descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        try:
            return real_pwrite(descriptor, data[: max(1, len(data) * 2 // 3)], offset)
        finally:
            real_fcntl(descriptor, fcntl.F_SETFL, flags)

    def choose(way: str) -> None:
        if way == "flag refused":
            monkeypatch.setattr(fcntl, "fcntl", no_flag)
        elif way == "write refused":
            monkeypatch.setattr(os, "pwrite", no_write)
        elif way == "short writes":
            monkeypatch.setattr(os, "pwrite", short)

    return choose


WAYS = ("as it is", "flag refused", "write refused", "short writes")


def content(size: int) -> bytes:
    return bytes(bytearray(i * 131 % 251 for i in range(4099)) * (size // 4099 + 1))[:size]


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("way", WAYS)
def test_a_copy_of_any_size_is_the_same_bytes(
    way: str, size: int, take: Ways, tmp_path: Path
) -> None:
    source, data = tmp_path / "source", content(size)
    source.write_bytes(data)
    take(way)
    # Without its first byte no file system can share blocks: this is written.
    copied = copy(source, tmp_path / "target", head=b"<", skip=min(1, size))
    expected = b"<" + data[1:]
    assert (tmp_path / "target").read_bytes() == expected
    assert copied == Copied(digest(data), digest(expected))


@given(
    size=st.integers(0, 70_000),
    cuts=st.lists(st.integers(0, 70_000), max_size=8),
    head=st.binary(max_size=40),
    tail=st.lists(st.binary(max_size=9000), max_size=3),
)
def test_head_patches_and_tail_are_put_where_they_belong(
    size: int,
    cuts: list[int],
    head: bytes,
    tail: list[bytes],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Against slices of the whole, with a buffer so small that every part straddles its ends."""
    folder = tmp_path_factory.mktemp("copy")
    source, data = folder / "source", content(size)
    source.write_bytes(data)
    skip = min(8, size)
    places = sorted({skip, *(cut for cut in cuts if skip <= cut <= size)})
    spans = list(zip(places[::2], places[1::2], strict=False))
    patches = [Patch(begin, end, lambda old: bytes(255 - b for b in old)) for begin, end in spans]
    stop = max([skip, *(end for _, end in spans)], default=size)
    expected = bytearray(data)
    for begin, end in spans:
        expected[begin:end] = bytes(255 - b for b in data[begin:end])
    with pytest.MonkeyPatch.context() as patching:
        patching.setattr(sink, "BUFFER", 8192)
        copied = copy(
            source, folder / "target", head=head, skip=skip, patches=patches, stop=stop, tail=tail
        )
    whole = head + bytes(expected[skip:stop]) + b"".join(tail)
    assert (folder / "target").read_bytes() == whole
    assert copied == Copied(digest(data), digest(whole))


def test_direct_writes_are_tried_and_given_up_for_the_last_odd_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, told = os.pwrite, []

    def pwrite(descriptor: int, data: Any, offset: int) -> int:
        told.append((bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT), len(data)))
        return real(descriptor, data, offset)

    with (tmp_path / "probe").open("wb") as probe:
        if not sink._bypass_cache(probe.fileno(), True):
            pytest.skip("no direct writes on this file system")
    source = tmp_path / "source"
    source.write_bytes(content(2 * BUFFER + 5))
    monkeypatch.setattr(os, "pwrite", pwrite)
    copy(source, tmp_path / "target", head=b"x", skip=1)
    assert told == [(True, BUFFER), (True, BUFFER), (False, 5)]


@pytest.mark.parametrize("at", [1, PART, BUFFER, 2 * BUFFER])
def test_a_source_cut_short_while_it_is_copied_is_an_error_and_no_signal(
    at: int, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.write_bytes(content(2 * BUFFER + PART))

    def cut(done: int) -> None:
        os.truncate(source, at)

    with pytest.raises(CheckpointError, match=r"source: truncated at byte \d+ while it was read"):
        copy(source, tmp_path / "target", head=b"x", skip=1, advance=cut)


def test_a_clone_is_written_only_where_it_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a file system that shares blocks, which a copy beforehand stands for here."""
    data = os.urandom(3 * PART + 17)
    written: list[tuple[int, int]] = []
    real = os.pwrite

    def share(descriptor: int, source: int) -> bool:
        return real(descriptor, os.pread(source, len(data), 0), 0) == len(data)

    def note(descriptor: int, part: Any, offset: int) -> int:
        written.append((offset, len(part)))
        return real(descriptor, part, offset)

    monkeypatch.setattr(sink, "_clone", lambda source, target: share(target, source))
    monkeypatch.setattr(os, "pwrite", note)
    (tmp_path / "source").write_bytes(data)
    patch = Patch(PART - 3, PART + 5, lambda old: bytes(8))
    expected = data[: PART - 3] + bytes(8) + data[PART + 5 :]
    copied = copy(tmp_path / "source", tmp_path / "patched", patches=[patch])
    assert (tmp_path / "patched").read_bytes() == expected
    assert copied == Copied(*(hashlib.sha256(raw).hexdigest() for raw in (data, expected)))
    assert written == [(PART - 3, 8)]
    known = copied.source
    assert copy(tmp_path / "source", tmp_path / "same", known=known) == Copied(known, known)
    assert (tmp_path / "same").read_bytes() == data
    assert len(written) == 1
