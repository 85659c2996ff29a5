"""What ONNX Runtime's contrib operators mean, in numpy, for the onnx package's evaluator.

Exporters and ONNX Runtime's own optimiser write these into files. Each definition follows
onnxruntime's docs/ContribOperators.md and is tested against ONNX Runtime's CPU kernel. What a
definition leaves out raises `NotImplementedError`: the evaluator then gives nothing. float16 is
computed in float32 and rounded once, as the kernels do.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx.reference.op_run import OpRun

Array = NDArray[Any]
MICROSOFT = "com.microsoft"


class Contrib(OpRun):  # type: ignore[misc]
    """An operator whose inputs and outputs may be left out."""

    op_domain = MICROSOFT
    op_schema = None
    """Else the package takes that of its own operator of the same name, with its attributes."""

    def _given(self, *values: Array) -> tuple[Array, ...]:
        """As many outputs as the node asks for."""
        return values[: len(self.onnx_node.output)]


def widen(array: Array) -> Array:
    return array.astype(np.float32) if array.dtype == np.float16 else array


def rounded_as(values: Array, like: Array) -> Array:
    return np.asarray(values).astype(like.dtype)


class FusedMatMul(Contrib):
    """alpha · A′B′, each transposed or not along its last two axes; no batch transposition."""

    def _run(
        self,
        a: Array,
        b: Array,
        alpha: float = 1.0,
        transA: int = 0,  # noqa: N803 - the operator's attribute
        transB: int = 0,  # noqa: N803 - the operator's attribute
        transBatchA: int = 0,  # noqa: N803 - the operator's attribute
        transBatchB: int = 0,  # noqa: N803 - the operator's attribute
    ) -> tuple[Array]:
        if transBatchA or transBatchB:
            raise NotImplementedError("FusedMatMul with transposed batches")
        left = np.swapaxes(a, -1, -2) if transA else a
        right = np.swapaxes(b, -1, -2) if transB else b
        return (np.asarray(np.matmul(left, right) * np.asarray(alpha, a.dtype)),)


# ----------------------------------------------------------------------------------- activations


def _erf_gelu(x: Array) -> Array:
    from scipy.special import erf

    return np.asarray(0.5 * x * (1 + erf(x / math.sqrt(2))))


class Gelu(Contrib):
    """x/2 · (1 + erf(x/√2))."""

    def _run(self, x: Array) -> tuple[Array]:
        return (rounded_as(_erf_gelu(widen(x)), x),)


class BiasGelu(Contrib):
    """Gelu of A + B."""

    def _run(self, a: Array, b: Array) -> tuple[Array]:
        return (rounded_as(_erf_gelu(widen(a) + widen(b)), a),)


class FastGelu(Contrib):
    """Gelu by its approximation with tanh, of X + bias."""

    def _run(self, x: Array, bias: Array | None = None) -> tuple[Array]:
        wide = widen(x) if bias is None else widen(x) + widen(bias)
        inner = math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)
        return (rounded_as(0.5 * wide * (1 + np.tanh(inner)), x),)


class QuickGelu(Contrib):
    """x · sigmoid(alpha · x)."""

    def _run(self, x: Array, alpha: float = 1.702) -> tuple[Array]:
        wide = widen(x)
        return (rounded_as(wide / (1 + np.exp(-alpha * wide)), x),)


# ----------------------------------------------------------------------------------------- norms


def _centred(x: Array, epsilon: float) -> tuple[Array, Array, Array]:
    """The normalised values over the last axis, their mean and the inverse deviation."""
    mean = x.mean(axis=-1, keepdims=True)
    inverse = 1 / np.sqrt(np.square(x - mean).mean(axis=-1, keepdims=True) + epsilon)
    return (x - mean) * inverse, mean, inverse


def _rms(x: Array, epsilon: float, axes: tuple[int, ...] = (-1,)) -> tuple[Array, Array]:
    inverse = 1 / np.sqrt(np.square(x).mean(axis=axes, keepdims=True) + epsilon)
    return x * inverse, inverse


class SimplifiedLayerNormalization(Contrib):
    """x / √(mean(x²) + epsilon) · scale over the axes from `axis` on; in the main domain."""

    op_domain = ""

    def _run(
        self, x: Array, scale: Array, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
    ) -> tuple[Array, ...]:
        axes = tuple(range(axis % x.ndim, x.ndim))
        normed, inverse = _rms(widen(x), epsilon, axes)
        return self._given(rounded_as(normed * widen(scale), x), inverse)


class SkipSimplifiedLayerNormalization(Contrib):
    """SimplifiedLayerNormalization of input + skip + bias, whose sum is the fourth output."""

    def _run(
        self, x: Array, skip: Array, gamma: Array, bias: Array | None = None, epsilon: float = 1e-5
    ) -> tuple[Array, ...]:
        total = widen(x) + widen(skip) + (0 if bias is None else widen(bias))
        normed, inverse = _rms(total, epsilon)
        mean = np.zeros_like(inverse)
        return self._given(
            rounded_as(normed * widen(gamma), x), mean, inverse, rounded_as(total, x)
        )


class SkipLayerNormalization(Contrib):
    """LayerNormalization of input + skip + bias, whose sum is the fourth output."""

    def _run(
        self,
        x: Array,
        skip: Array,
        gamma: Array,
        beta: Array | None = None,
        bias: Array | None = None,
        epsilon: float = 1e-5,
    ) -> tuple[Array, ...]:
        total = widen(x) + widen(skip) + (0 if bias is None else widen(bias))
        normed, mean, inverse = _centred(total, epsilon)
        scaled = normed * widen(gamma) + (0 if beta is None else widen(beta))
        return self._given(rounded_as(scaled, x), mean, inverse, rounded_as(total, x))


class EmbedLayerNormalization(Contrib):
    """LayerNormalization of word + position + segment embeddings; the third output is their sum,
    the second how many tokens of a row `mask` has."""

    def _run(
        self,
        input_ids: Array,
        segment_ids: Array | None,
        word: Array,
        position: Array,
        segment: Array | None,
        gamma: Array,
        beta: Array,
        mask: Array | None = None,
        position_ids: Array | None = None,
        epsilon: float = 1e-12,
        mask_index_type: int = 1,
    ) -> tuple[Array, ...]:
        length = input_ids.shape[1]
        where = np.arange(length)[None] if position_ids is None else position_ids
        total = word[input_ids] + position[where]
        if segment is not None and segment_ids is not None:
            total = total + segment[segment_ids]
        normed, _, _ = _centred(widen(total), epsilon)
        counts = np.zeros(len(input_ids)) if mask is None else mask.sum(axis=1)
        scaled = rounded_as(normed * widen(gamma) + widen(beta), word)
        return self._given(scaled, counts.astype(np.int32), total)


CONTRIB = (
    FusedMatMul,
    Gelu,
    BiasGelu,
    FastGelu,
    QuickGelu,
    SimplifiedLayerNormalization,
    SkipSimplifiedLayerNormalization,
    SkipLayerNormalization,
    EmbedLayerNormalization,
)
