"""Streaming: where a model comes apart layer by layer, and which layer brings an error in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from surgery.arch import identify
from surgery.checkpoint import Checkpoint
from surgery.differential import Pair
from surgery.errors import OnnxError
from surgery.evidence import EDGES, Evidence, Finding
from surgery.export import onnxfile
from surgery.export.lineage import Lineage
from surgery.localize.boundaries import Boundary, find_streams, owners_of
from surgery.localize.result import LIMIT
from surgery.runtimes import Cut


def streamed(pair: Pair, lineage: Lineage) -> Pair:
    """The pair to be run part by part: cut before each layer, at what its first norm reads, and
    after the last, where a norm follows it; `lineage` says which initializer is which tensor.

    Raises `OnnxError` where the graph shows no residual stream at a layer.
    """
    arch = identify(Checkpoint.open(pair.model))
    graph = onnxfile.read(pair.onnx, pair.initializers).graph
    owners = owners_of([(row.name, row.tensors) for row in lineage.rows], arch)
    streams = find_streams(graph, owners, arch)
    first: dict[int, Boundary] = {}
    for boundary in streams:
        if boundary.layer is not None:
            first.setdefault(boundary.layer, boundary)
    if len(first) < arch.layers:
        raise OnnxError(
            f"{pair.onnx}: cannot be streamed: what a norm reads before each of {arch.layers} "
            f"layers is needed, and was found before {len(first)}; run without --stream"
        )
    last = streams[-1]
    found = [*(first[layer] for layer in sorted(first)), *([last] if last.layer is None else [])]
    return replace(pair, cuts=tuple(Cut(b.value, b.role, b.layer) for b in found))


def introduced(evidence: Evidence) -> Iterator[Finding]:
    """The parts of a streamed model that bring an error in; of an edge without any, that."""
    for edge, (_, onnx) in EDGES.items():
        rows = [row for row in evidence.layers if row.edge == edge]
        guilty = [row for row in rows if not row.introduced <= LIMIT]
        for row in guilty:
            message = (
                f"{onnx}: from PyTorch's values at {row.begin}, the graph is off by "
                f"{row.introduced:.3g} times the noise at {row.end}"
            )
            site = f"{onnx}/{row.begin} to {row.end}"
            yield Finding("layer", "introduced error", site, message, row.introduced, LIMIT)
        if rows and not guilty and any(row.propagated > LIMIT for row in rows):
            message = f"{onnx}: every layer by itself stays within {LIMIT:g} times the noise"
            yield Finding("localize", "not found", onnx, message)
