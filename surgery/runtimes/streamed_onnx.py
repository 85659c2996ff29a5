"""ONNX Runtime on the CPU with one segment of the graph at a time in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnx import helper

from surgery.errors import OnnxError, quote
from surgery.runtimes import graph, session
from surgery.runtimes.interface import (
    INTRODUCED,
    PART,
    STREAM,
    Arrays,
    IdArrays,
    ModelRef,
    stream_file,
)
from surgery.runtimes.onnx_model import OnnxModel, Run
from surgery.runtimes.segments import Segment, cut_up, element_types, extract
from surgery.runtimes.streamed import Streamed


@dataclass
class _Track:
    """One way through the segments: values at cuts that are still to be read, and the outputs."""

    values: Arrays = field(default_factory=dict)
    outputs: Arrays = field(default_factory=dict)


@dataclass
class _Piece:
    """Columns of a batch that run at once: all, or those before or after its split.

    `own` is the graph from its own values, `given` from PyTorch's; `shapes` are those of values
    at cuts.
    """

    inputs: IdArrays
    columns: slice
    own: _Track = field(default_factory=_Track)
    given: _Track = field(default_factory=_Track)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)


class StreamedOnnx(Streamed, OnnxModel):
    """The .onnx file of `OnnxRuntime`, run segment by segment between the cuts of `model`.

    With `model.given`, every segment is also run from PyTorch's values at the cuts it reads: what
    it then gives differs from PyTorch's by what it brings in itself.
    """

    def __init__(self, model: ModelRef, threads: int) -> None:
        super().__init__(model, threads)
        onnxruntime.set_default_logger_severity(3)
        self._cuts = [cut.value for cut in model.cuts]
        self._segments = cut_up(self._proto, self._cuts)
        self._types = element_types(self._proto, self._cuts)
        self._session: Any = None

    def infer_impl(self, inputs: IdArrays, split: int) -> Arrays:
        found: Arrays = {}
        self._alone(lambda: found.update(self._walk(inputs, split)))
        return found

    def _change(self, part: Segment | None) -> None:
        self._session = None
        if part is not None:
            self._session = self._open(extract(self._proto, part.values, part.reads, self._types))

    def _runner(self, proto: Any) -> Run:
        return partial(self._open(proto).run, None)

    def _open(self, proto: Any) -> onnxruntime.InferenceSession:
        folder = self.model.initializers or self.model.path.parent
        return session.open_session(proto.SerializeToString(), folder, self.threads)

    def _walk(self, inputs: IdArrays, split: int) -> Arrays:
        pieces = list(_pieces(inputs, split if self._signature.continues else 0))
        for segment in self._segments:
            self._lockstep.gate(segment)
            self._run_own(segment, pieces)
            if self._streams is not None and self.model.given is not None:
                self._run_given(segment, pieces, self.model.given)
        found = self._named([piece.own for piece in pieces], inputs, split)
        given = self._named([piece.given for piece in pieces], inputs, split)
        wanted = self._signature.output
        return found | ({PART: given[wanted]} if wanted in given else {})

    def _run_own(self, segment: Segment, pieces: list[_Piece]) -> None:
        for piece in pieces:
            piece.own.values |= self._run(segment, piece, piece.own, pieces[0].own)
            piece.shapes = {name: array.shape for name, array in piece.own.values.items()}
        if segment.end is not None:
            streams = [_stream(piece.own.values[segment.end], piece) for piece in pieces]
            self._keep_stream(STREAM, segment.end, streams)
        for piece in pieces:
            for name in set(piece.own.values) - segment.later:
                del piece.own.values[name]

    def _run_given(self, segment: Segment, pieces: list[_Piece], folder: Path) -> None:
        """The segment from PyTorch's values, where those are known and have the graph's form."""
        for piece in pieces:
            given = {name: self._given(name, piece, folder) for name in segment.reads}
            if any(array is None for array in given.values()):
                return
            piece.given.values = {name: array for name, array in given.items() if array is not None}
        streams = []
        for piece in pieces:
            made = self._run(segment, piece, piece.given, pieces[0].given)
            streams += [_stream(array, piece) for array in made.values()]
        if segment.end is not None:
            self._keep_stream(INTRODUCED, segment.end, streams)

    def _run(self, segment: Segment, piece: _Piece, track: _Track, first: _Track) -> Arrays:
        """Runs the segment over a piece; the value at its end, under its name."""
        ports = [port for port in self._signature.ports if port.name in segment.inputs]
        past = None if track is first else self._past(first, ports)
        fed = graph.feed(ports, self._signature.roles, piece.inputs, past)
        fed |= {name: track.values[name] for name in segment.reads}
        found = dict(zip(segment.values, self._session.run(segment.values, fed), strict=True))
        track.outputs |= {name: found[name] for name in segment.outputs}
        return {segment.end: found[segment.end]} if segment.end is not None else {}

    def _past(self, first: _Track, ports: Iterable[graph.Port]) -> Arrays:
        links = [link for link in self._signature.links if link.present in first.outputs]
        known = {link.past: first.outputs[link.present] for link in links}
        for port in ports:
            if self._signature.roles[port.name] == graph.CACHE and port.name not in known:
                raise OnnxError(
                    f"{self.model.path}: reads the cache {quote(port.name)} before the layer that "
                    "writes it has run, so that it cannot be streamed; run without --stream"
                )
        return known

    def _given(self, cut: str, piece: _Piece, folder: Path) -> NDArray[Any] | None:
        """PyTorch's value at a cut in the graph's form: [batch, length, width] or its rows."""
        number = self._cuts.index(cut)
        path = folder / stream_file(STREAM, self._number, number)
        if not path.exists() or cut not in piece.shapes:
            return None
        whole = np.load(path, mmap_mode="r", allow_pickle=False)[:, piece.columns]
        shape = piece.shapes[cut]
        if shape not in (whole.shape, (whole.shape[0] * whole.shape[1], whole.shape[2])):
            return None
        dtype = helper.tensor_dtype_to_np_dtype(self._types[cut])
        return np.asarray(whole.reshape(shape), dtype)

    def _keep_stream(self, kind: str, cut: str, streams: list[NDArray[Any] | None]) -> None:
        known = [array for array in streams if array is not None]
        if len(known) == len(streams):
            self._keep(kind, self._cuts.index(cut), np.concatenate(known, axis=1))

    def _named(self, tracks: list[_Track], inputs: IdArrays, split: int) -> Arrays:
        """The outputs of a way through all segments, by optimum's names; none of one that was
        left."""
        names = self.output_names
        if any(name not in track.outputs for track in tracks for name in names):
            return {}
        made = iter([{name: track.outputs[name] for name in names} for track in tracks])
        return graph.infer(self._signature, lambda fed: next(made), inputs, split)


def _pieces(inputs: IdArrays, split: int) -> Iterator[_Piece]:
    """The batch as it is run: with a split, the columns before it and those from it on."""
    for columns in (slice(0, split), slice(split, None)) if split else (slice(0, None),):
        own = {name: array[:, columns] for name, array in inputs.items()}
        # The mask is over what is in the cache too.
        yield _Piece(own | {"attention_mask": inputs["attention_mask"][:, : columns.stop]}, columns)


def _stream(array: NDArray[Any], piece: _Piece) -> NDArray[Any] | None:
    """A value at a cut as [batch, length, width]; None for one of another form."""
    rows, columns = piece.inputs["input_ids"].shape
    if array.shape[:2] == (rows, columns) and array.ndim == 3:
        return array
    if array.ndim == 2 and len(array) == rows * columns:
        return array.reshape(rows, columns, -1)
    return None
