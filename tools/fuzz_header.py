"""Fuzz the safetensors header reader: `fuzz_header.py CORPUS --seconds N` (needs atheris).

Every input is a whole file. Whatever we accept the reference library must accept and read alike;
whatever we refuse is refused by `CheckpointError` in one printable line, within bounded time.
Half of the mutations know what a header is (tools/header_files.py), half know nothing.
"""

from __future__ import annotations

import random
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["surgery"]):
    from surgery.checkpoint.header import encode_header, read_header
    from surgery.errors import CheckpointError

from fuzzing import arguments, fuzz, seed
from header_files import DTYPES, MUTATIONS, HeaderFile, judge, retile, shrink

MAX_LEN = 16_384
MAX_CPU = 2.0
FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
WORDS = ('{"', '":{"dtype":"', '","shape":[', '],"data_offsets":[', "]}", '"__metadata__":{', "\\u")


def check(data: bytes) -> str:
    return judge(read_header, CheckpointError, HeaderFile.split(data))


def mutate(data: bytes, max_size: int, number: int) -> bytes:
    rng = random.Random(number)
    if rng.random() < 0.5:
        return bytes(atheris.Mutate(data, max_size))
    file = HeaderFile.split(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        file = MUTATIONS[rng.choice(list(MUTATIONS))](file, rng)
    if rng.random() < 0.3:
        file = retile(file, rng)
    return (file.head + bytes(min(file.data, max_size)))[:max_size]


def seeds() -> list[bytes]:
    """Small well-formed files, and the fixtures' headers with their tensors shrunk."""
    small = [
        {},
        {"__metadata__": {"format": "pt"}},
        {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}},
        {"a": {"dtype": "U8", "shape": [], "data_offsets": [0, 1]}},
        {"a": {"dtype": "BF16", "shape": [0, 7], "data_offsets": [0, 0]}},
        {"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}},
        {
            "a.weight": {"dtype": "F16", "shape": [4], "data_offsets": [0, 8]},
            "a.bias": {"dtype": "F64", "shape": [1], "data_offsets": [8, 16]},
        },
    ]
    files = [HeaderFile(0, b"", _end(entries)).text(encode_header(entries)) for entries in small]
    real = [shrink(HeaderFile.read(path)) for path in sorted(FIXTURES.glob("*/*.safetensors"))]
    return [file.head + bytes(file.data) for file in [*files, *real]]


def _end(entries: dict[str, dict[str, list[int]]]) -> int:
    return max((e["data_offsets"][1] for n, e in entries.items() if n != "__metadata__"), default=0)


def main() -> None:
    options = arguments(__doc__.splitlines()[0])
    seed(options.corpus, seeds())
    words = [*WORDS, *(dtype.decode() for dtype in DTYPES)]
    fuzz(atheris, check, options, max_cpu=MAX_CPU, max_len=MAX_LEN, words=words, mutate=mutate)


if __name__ == "__main__":
    main()
