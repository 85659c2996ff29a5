"""An uncompressed `.npz` read in place: where its arrays lie, by their headers alone.

Such a file is a zip archive of `.npy` members stored as they are (numpy, "NEP 1" format): a short
header, then raw numbers. Nothing is unpacked, so no archive can unfold into more than it is.
"""

from __future__ import annotations

import io
import math
import os
import re
import zipfile
from pathlib import Path

from surgery.checkpoint import TensorFile, TensorInfo
from surgery.checkpoint.dtypes import BITS
from surgery.checkpoint.files import open_regular
from surgery.errors import CheckpointError, quote

MAX_DIRECTORY_BYTES = 1 << 20
"""What zipfile may read at once: a directory of thousands of arrays fits."""

_DTYPES = {"<f2": "F16", "<f4": "F32", "<f8": "F64"}
_LOCAL_HEADER = 30
_LENGTHS = {b"\x93NUMPY\x01\x00": 2, b"\x93NUMPY\x02\x00": 4}
"""How a header begins in each version, and how many bytes then give its length."""
_HEADER = re.compile(
    rb"\{'descr': '([^']{1,20})', 'fortran_order': (True|False), "
    rb"'shape': \(((?:\d{1,15}(?:, \d{1,15})*,?)?)\), \} *\n"
)
"""As numpy writes it: a Python literal, which nobody needs to evaluate."""


class _Bounded(io.FileIO):
    """A file of which nobody reads more than `MAX_DIRECTORY_BYTES` at once."""

    def read(self, size: int | None = -1, /) -> bytes:
        left = os.fstat(self.fileno()).st_size - self.tell()
        wanted = left if size is None or size < 0 else size
        if wanted > MAX_DIRECTORY_BYTES:
            raise ValueError(f"a directory of more than {MAX_DIRECTORY_BYTES} bytes")
        return super().read(wanted) or b""


def open_npz(path: Path) -> tuple[TensorFile, tuple[str, ...]]:
    """The arrays of floats in `path`, and the names of those that are stored transposed.

    Raises `CheckpointError` for anything but an uncompressed archive of arrays that hold what
    their headers say.
    """
    found, transposed = {}, []
    with open_regular(path) as descriptor, _Bounded(descriptor, closefd=False) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
                for member in members:
                    info, fortran = _array(file, member, path)
                    if info.name in found:
                        raise ValueError(f"{info.name!r} is there twice")
                    found[info.name] = info
                    transposed += [info.name] if fortran else []
        except (ValueError, zipfile.BadZipFile, NotImplementedError, EOFError) as error:
            raise CheckpointError(f"{path}: not an npz of float arrays: {quote(error)}") from None
    return TensorFile(path, found), tuple(transposed)


def _array(file: _Bounded, member: zipfile.ZipInfo, path: Path) -> tuple[TensorInfo, bool]:
    """Where the numbers of `member` lie in the file, and whether columns come first.

    An array stored so has its shape turned round.
    """
    if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
        raise ValueError(f"{member.filename!r} is compressed; save it with numpy.savez")
    # The directory's copy of these lengths may differ from the one before the data.
    file.seek(member.header_offset)
    local = file.read(_LOCAL_HEADER)
    if len(local) < _LOCAL_HEADER or not local.startswith(b"PK\x03\x04"):
        raise ValueError(f"{member.filename!r} is not where the directory says")
    lengths = int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
    start = member.header_offset + _LOCAL_HEADER + lengths
    end = start + member.file_size
    if member.compress_size != member.file_size or end > os.fstat(file.fileno()).st_size:
        raise ValueError(f"{member.filename!r} is larger than the file")
    file.seek(start)
    dtype, fortran, shape = _header(file, member.filename)
    begin = file.tell()
    if math.prod(shape) * BITS[dtype] // 8 != end - begin:
        raise ValueError(f"{member.filename!r} does not hold the shape {shape} it says")
    name = member.filename.removesuffix(".npy")
    order = shape[::-1] if fortran else shape
    return TensorInfo(name, dtype, order, begin, end, str(path)), fortran


def _header(file: _Bounded, name: str) -> tuple[str, bool, tuple[int, ...]]:
    """What the npy header at the file's position says: dtype, columns first, shape."""
    magic = file.read(8)
    if magic not in _LENGTHS:
        raise ValueError(f"{name!r} is no npy file of version 1 or 2")
    header = file.read(int.from_bytes(file.read(_LENGTHS[magic]), "little"))
    match = _HEADER.fullmatch(header)
    if match is None:
        raise ValueError(f"{name!r} has no header as numpy writes it")
    descr, fortran, shape = (group.decode("ascii", "replace") for group in match.groups())
    if descr not in _DTYPES:
        raise ValueError(f"{name!r} has dtype {descr}; expected {', '.join(_DTYPES)}")
    return _DTYPES[descr], fortran == "True", tuple(map(int, re.findall(r"\d+", shape)))
