"""What every runtime does: run one model on one batch, and look up embedding rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]
IdArrays = Mapping[str, NDArray[np.int64]]

PART = "part"
"""The output of `infer` that is what the last part of a streamed graph makes of PyTorch's values
before it."""

STREAM, INTRODUCED = "stream", "introduced"


def stream_file(kind: str, batch: int, cut: int) -> str:
    """Where a batch's residual stream at a cut is kept: the model's own (`STREAM`), or what one
    part makes of PyTorch's (`INTRODUCED`)."""
    return f"{kind}-{batch}-{cut}.npy"


@dataclass(frozen=True)
class Cut:
    """Where a model comes apart: at the residual stream that the norm `role` of `layer` reads,
    None after the last; `value` is its name in the ONNX graph."""

    value: str
    role: str
    layer: int | None


FLOAT32 = "float32"


@dataclass(frozen=True)
class ModelRef:
    """A model and how to run it.

    runtime: a name of `RUNTIMES`; path: a checkpoint folder for `torch`, an .onnx file for the
    others; task: a name of `surgery.export.TASKS`; dtype: what `torch` computes in, `float32`,
    `float64` (the reference), `float16` or `bfloat16`; initializers: another folder than the
    file's own in which the .onnx file's external data lies; attention: what `torch` computes
    attention with, `eager` or `sdpa`, by default the first that the model has of sdpa and eager;
    stored: a type the weights are rounded to before they are computed with in `dtype`; level: what
    `onnxruntime` optimises, `disabled`, `basic`, `extended` or `all`; cuts: where a streamed model
    comes apart, in order; given: a folder of PyTorch's values at the cuts, from which each part of
    a streamed .onnx file is run too. Streamed models know no `attention`, `stored` or `level`.
    """

    runtime: str
    path: Path
    task: str
    dtype: str = FLOAT32
    initializers: Path | None = None
    attention: str | None = None
    stored: str | None = None
    level: str = "all"
    cuts: tuple[Cut, ...] = ()
    given: Path | None = None


class Runtime(ABC):
    """One loaded model. `infer` checks what goes in and comes out, `infer_impl` runs it."""

    def __init__(self, model: ModelRef, threads: int) -> None:
        self.model = model
        self.threads = threads

    @property
    @abstractmethod
    def input_names(self) -> tuple[str, ...]:
        """The model's own input names."""

    @property
    @abstractmethod
    def output_names(self) -> tuple[str, ...]:
        """The names of what `infer` returns."""

    @property
    def compute(self) -> str:
        """The float type the model computes in."""
        return self.model.dtype

    @abstractmethod
    def infer_impl(self, inputs: IdArrays, split: int) -> Arrays:
        """`infer` without the checks."""

    @abstractmethod
    def embedding(self, ids: NDArray[np.int64]) -> NDArray[Any]:
        """Rows [n, d] of the token embedding for ids [n]: the value right after the lookup."""

    def together(
        self, tasks: Sequence[Callable[[], None]], streams: Path | None = None, first: int = 0
    ) -> None:
        """Runs tasks that call `infer`; a streamed model reads its weights once for all of them,
        and keeps in the folder `streams` what crosses its cuts, by the number of the task, which
        begin with `first`."""
        for task in tasks:
            task()

    def infer(self, inputs: IdArrays, split: int = 0) -> Arrays:
        """Every output by name, for int64 [batch, length] inputs of one shape.

        `inputs` has `input_ids`, `attention_mask` and `position_ids`; a model takes those it has
        use for. An ONNX graph that reads a cache runs the first `split` columns, then the others
        over the cache those left: its outputs are those of both runs, joined. PyTorch runs all at
        once whatever `split` is: a cache must not change a number. Raises `ValueError` for inputs
        of another form; what the model makes of them is not judged here.
        """
        shapes = {name: array.shape for name, array in inputs.items()}
        ids = shapes.get("input_ids", ())
        if len(ids) != 2 or 0 in ids or any(shape != ids for shape in shapes.values()):
            raise ValueError(f"inputs must all be [batch, length], not empty; found {shapes}")
        if any(array.dtype != np.int64 for array in inputs.values()):
            raise ValueError("inputs must be int64")
        if not 0 <= split < ids[1]:
            raise ValueError(f"split must be 0 to {ids[1] - 1}; found {split}")
        outputs = self.infer_impl(inputs, split)
        return {name: np.asarray(array) for name, array in outputs.items()}
