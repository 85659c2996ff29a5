"""The data file of an ONNX model: the numbers of its initializers, written while they are read.

Where each tensor lies follows from shapes alone, so the graph is finished before the first number
is read, and the file is written from front to back, hashed on the way, in the memory of a few
bands.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.checkpoint import Checkpoint
from surgery.checkpoint.parallel import Advance
from surgery.checkpoint.sink import Sink
from surgery.export.bind import numbers
from surgery.export.expressions import Expressions

ALIGNMENT = 4096
"""Every tensor begins on a page, so that a runtime can map it (onnx, docs/ExternalData.md)."""
INLINE = 1024
"""Bytes of the largest constant that is kept in the graph itself."""


@dataclass(frozen=True)
class DataFile:
    """What the file holds: by offset, the tensors of a checkpoint, and constants of the graph."""

    bound: Expressions
    constants: dict[str, NDArray[Any]]
    offsets: dict[str, int]
    size: int

    def write(self, path: Path, checkpoint: Checkpoint, advance: Advance) -> str:
        """Writes the new file `path`; returns its SHA-256. Raises what `bind.numbers` raises.

        One thread reads and converts a band while another hashes the last one.
        """
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        digest = hashlib.sha256()
        with Sink(file) as sink, ThreadPoolExecutor(1) as other:

            def take(data: memoryview) -> None:
                digest.update(data)
                sink.put(data)
                advance(len(data))

            pending: Future[None] | None = None
            for data in self._bytes(checkpoint):
                if pending is not None:
                    pending.result()
                pending = other.submit(take, data)
            if pending is not None:
                pending.result()
        return digest.hexdigest()

    def _bytes(self, checkpoint: Checkpoint) -> Iterator[memoryview]:
        """The file from its first byte to its last, in pieces."""
        done = 0
        for name, offset in self.offsets.items():
            yield memoryview(bytes(offset - done))
            done = offset
            for band in self._bands(name, checkpoint):
                data = np.ascontiguousarray(band).reshape(-1).view(np.uint8).data
                yield data
                done += len(data)

    def _bands(self, name: str, checkpoint: Checkpoint) -> Iterable[NDArray[Any]]:
        if name in self.constants:
            return (self.constants[name],)
        return numbers(self.bound[name], checkpoint)


def plan_data(model: Any, bound: Expressions, location: str) -> DataFile:
    """Points the initializers of an `onnx_ir.Model` into the file `location`, which the result
    writes: all of `bound`, and constants of more than `INLINE` bytes, in the order of use."""
    import onnx_ir

    constants, offsets, end = {}, {}, 0
    for value in _in_order_of_use(model.graph):
        tensor = value.const_value
        if value.name not in bound:
            if tensor.nbytes <= INLINE:
                continue
            constants[value.name] = tensor.numpy()
        start = offsets[value.name] = -(-end // ALIGNMENT) * ALIGNMENT
        end = start + tensor.nbytes
        value.const_value = onnx_ir.ExternalTensor(
            location, start, tensor.nbytes, tensor.dtype, shape=tensor.shape, name=value.name
        )
    return DataFile(bound, constants, offsets, end)


def _in_order_of_use(graph: Any) -> Iterator[Any]:
    """The initializers that nodes read, each once, in the order of the nodes."""
    seen = set()
    for node in graph:
        for value in node.inputs:
            if value is not None and value.name in graph.initializers and value.name not in seen:
                seen.add(value.name)
                yield value
