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


class _Contrib(OpRun):  # type: ignore[misc]
    """An operator whose inputs and outputs may be left out."""

    op_domain = MICROSOFT
    op_schema = None
    """Else the package takes that of its own operator of the same name, with its attributes."""

    def _given(self, *values: Array) -> tuple[Array, ...]:
        """As many outputs as the node asks for."""
        return values[: len(self.onnx_node.output)]


def _wide(array: Array) -> Array:
    return array.astype(np.float32) if array.dtype == np.float16 else array


def _of(values: Array, like: Array) -> Array:
    return np.asarray(values).astype(like.dtype)


class FusedMatMul(_Contrib):
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


class Gelu(_Contrib):
    """x/2 · (1 + erf(x/√2))."""

    def _run(self, x: Array) -> tuple[Array]:
        return (_of(_erf_gelu(_wide(x)), x),)


class BiasGelu(_Contrib):
    """Gelu of A + B."""

    def _run(self, a: Array, b: Array) -> tuple[Array]:
        return (_of(_erf_gelu(_wide(a) + _wide(b)), a),)


class FastGelu(_Contrib):
    """Gelu by its approximation with tanh, of X + bias."""

    def _run(self, x: Array, bias: Array | None = None) -> tuple[Array]:
        wide = _wide(x) if bias is None else _wide(x) + _wide(bias)
        inner = math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)
        return (_of(0.5 * wide * (1 + np.tanh(inner)), x),)


class QuickGelu(_Contrib):
    """x · sigmoid(alpha · x)."""

    def _run(self, x: Array, alpha: float = 1.702) -> tuple[Array]:
        wide = _wide(x)
        return (_of(wide / (1 + np.exp(-alpha * wide)), x),)


# ----------------------------------------------------------------------------------------- norms


def _centred(x: Array, epsilon: float) -> tuple[Array, Array, Array]:
    """The normalised values over the last axis, their mean and the inverse deviation."""
    mean = x.mean(axis=-1, keepdims=True)
    inverse = 1 / np.sqrt(np.square(x - mean).mean(axis=-1, keepdims=True) + epsilon)
    return (x - mean) * inverse, mean, inverse


def _rms(x: Array, epsilon: float, axes: tuple[int, ...] = (-1,)) -> tuple[Array, Array]:
    inverse = 1 / np.sqrt(np.square(x).mean(axis=axes, keepdims=True) + epsilon)
    return x * inverse, inverse


class SimplifiedLayerNormalization(_Contrib):
    """x / √(mean(x²) + epsilon) · scale over the axes from `axis` on; in the main domain."""

    op_domain = ""

    def _run(
        self, x: Array, scale: Array, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
    ) -> tuple[Array, ...]:
        axes = tuple(range(axis % x.ndim, x.ndim))
        normed, inverse = _rms(_wide(x), epsilon, axes)
        return self._given(_of(normed * _wide(scale), x), inverse)


class SkipSimplifiedLayerNormalization(_Contrib):
    """SimplifiedLayerNormalization of input + skip + bias, whose sum is the fourth output."""

    def _run(
        self, x: Array, skip: Array, gamma: Array, bias: Array | None = None, epsilon: float = 1e-5
    ) -> tuple[Array, ...]:
        total = _wide(x) + _wide(skip) + (0 if bias is None else _wide(bias))
        normed, inverse = _rms(total, epsilon)
        mean = np.zeros_like(inverse)
        return self._given(_of(normed * _wide(gamma), x), mean, inverse, _of(total, x))


class SkipLayerNormalization(_Contrib):
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
        total = _wide(x) + _wide(skip) + (0 if bias is None else _wide(bias))
        normed, mean, inverse = _centred(total, epsilon)
        scaled = normed * _wide(gamma) + (0 if beta is None else _wide(beta))
        return self._given(_of(scaled, x), mean, inverse, _of(total, x))


class EmbedLayerNormalization(_Contrib):
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
        normed, _, _ = _centred(_wide(total), epsilon)
        counts = np.zeros(len(input_ids)) if mask is None else mask.sum(axis=1)
        scaled = _of(normed * _wide(gamma) + _wide(beta), word)
        return self._given(scaled, counts.astype(np.int32), total)


# ------------------------------------------------------------------------------------- attention


class RotaryEmbedding(_Contrib):
    """Pairs of a head's features turned by the angles of their position: the two halves of its
    rotated part, or with `interleaved` each even feature and the next."""

    def _run(
        self,
        x: Array,
        position_ids: Array,
        cos_cache: Array,
        sin_cache: Array,
        interleaved: int = 0,
        is_packed_batching: int = 0,
        num_heads: int = 0,
        rotary_embedding_dim: int = 0,
        scale: float = 1.0,
    ) -> tuple[Array]:
        if is_packed_batching or scale != 1.0:
            raise NotImplementedError("RotaryEmbedding of packed batches or with a scale")
        heads = x if x.ndim == 4 else _split(x, num_heads or x.shape[2] // (2 * cos_cache.shape[1]))
        length = heads.shape[2]
        rows = position_ids
        if position_ids.size == 1:
            rows = position_ids.reshape(1, 1) + np.arange(length)[None]
        turned = rotate(heads, cos_cache[rows], sin_cache[rows], bool(interleaved))
        return (turned if x.ndim == 4 else _join(turned),)


def rotate(x: Array, cos: Array, sin: Array, interleaved: bool) -> Array:
    """Heads [B, N, S, D] turned by cos and sin [B, S, R/2]; the features past R stay."""
    size = 2 * cos.shape[-1]
    cos, sin = cos[:, None], sin[:, None]
    out = x.copy()
    one, two = (slice(0, size, 2), slice(1, size, 2))
    if not interleaved:
        one, two = slice(0, size // 2), slice(size // 2, size)
    first, second = x[..., one], x[..., two]
    out[..., one], out[..., two] = first * cos - second * sin, second * cos + first * sin
    return out


def _split(x: Array, heads: int) -> Array:
    batch, length, width = x.shape
    return x.reshape(batch, length, heads, width // heads).transpose(0, 2, 1, 3)


def _join(x: Array) -> Array:
    batch, heads, length, size = x.shape
    return x.transpose(0, 2, 1, 3).reshape(batch, length, heads * size)


def _attend(q: Array, k: Array, v: Array, scale: float, bias: Array | float) -> Array:
    """softmax(q·kᵀ · scale + bias)·v of heads [B, N, S, D]."""
    scores = np.matmul(_wide(q), _wide(k).swapaxes(-1, -2)) * (scale or 1 / math.sqrt(q.shape[-1]))
    scores = scores + bias
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights = weights / weights.sum(axis=-1, keepdims=True)
    return _of(np.matmul(weights, _wide(v)), q)


def _causal(queries: int, keys: int, filler: float) -> Array:
    """What is added to the scores of later keys than a query's own position, the last ones."""
    rows = np.arange(queries)[:, None] + keys - queries
    return np.where(np.arange(keys)[None] <= rows, 0.0, filler).astype(np.float32)


def _padding(mask: Array | None, batch: int, keys: int, filler: float) -> Array | float:
    """What is added to the scores of padded keys: `mask` holds lengths [B] or ones [B, T]."""
    if mask is None:
        return 0.0
    if mask.ndim == 1 and len(mask) == batch:
        mask = np.arange(keys)[None] < mask[:, None]
    if mask.shape != (batch, keys):
        raise NotImplementedError(f"attention with a mask of shape {list(mask.shape)}")
    return np.where(mask[:, None, None] > 0, 0.0, filler).astype(np.float32)


class MultiHeadAttention(_Contrib):
    """Attention of projected queries, keys and values [B, S, N·D]; keys and values may be heads
    [B, N, S, D]. A cache comes before them; the second and third output continue it."""

    def _run(
        self,
        query: Array,
        key: Array | None = None,
        value: Array | None = None,
        bias: Array | None = None,
        key_padding_mask: Array | None = None,
        attention_bias: Array | None = None,
        past_key: Array | None = None,
        past_value: Array | None = None,
        past_sequence_length: Array | None = None,
        cache_indirection: Array | None = None,
        num_heads: int = 0,
        mask_filter_value: float = -10000.0,
        scale: float = 0.0,
        unidirectional: int = 0,
    ) -> tuple[Array, ...]:
        if key is None or value is None or past_sequence_length is not None:
            raise NotImplementedError("MultiHeadAttention of packed input or a shared buffer")
        q = _split(query + _part(bias, 0, query), num_heads)
        k, v = (
            x if x.ndim == 4 else _split(x + _part(bias, n, x), num_heads)
            for n, x in ((1, key), (2, value))
        )
        if past_key is not None and past_value is not None:
            k, v = np.concatenate([past_key, k], 2), np.concatenate([past_value, v], 2)
        keys = k.shape[2]
        added = _padding(key_padding_mask, len(query), keys, mask_filter_value)
        if unidirectional:
            added = added + _causal(query.shape[1], keys, mask_filter_value)
        if attention_bias is not None:
            added = added + _wide(attention_bias)
        return self._given(_join(_attend(q, k, v, scale, added)), k, v)


def _part(bias: Array | None, number: int, like: Array) -> Array | float:
    """The bias of queries, keys or values, all of one width, which lie behind one another."""
    if bias is None:
        return 0.0
    width = like.shape[-1]
    if bias.size != 3 * width:
        raise NotImplementedError("attention with a bias of unlike widths")
    return bias[number * width : (number + 1) * width]


class Attention(_Contrib):
    """As MultiHeadAttention, of an input that is projected first, by weights [d, 3·N·D]."""

    def _run(
        self,
        x: Array,
        weights: Array,
        bias: Array | None = None,
        mask_index: Array | None = None,
        past: Array | None = None,
        attention_bias: Array | None = None,
        past_sequence_length: Array | None = None,
        num_heads: int = 0,
        mask_filter_value: float = -10000.0,
        scale: float = 0.0,
        unidirectional: int = 0,
        qkv_hidden_sizes: Any = None,
        do_rotary: int = 0,
        rotary_embedding_dim: int = 0,
        past_present_share_buffer: int = 0,
    ) -> tuple[Array, ...]:
        if qkv_hidden_sizes or do_rotary or past_present_share_buffer:
            raise NotImplementedError("Attention of unlike widths, with rotary or a shared buffer")
        mixed = np.matmul(x, weights) + (0 if bias is None else bias)
        q, k, v = (_split(part, num_heads) for part in np.split(mixed, 3, axis=-1))
        if past is not None:
            k, v = np.concatenate([past[0], k], 2), np.concatenate([past[1], v], 2)
        keys = k.shape[2]
        added = _padding(mask_index, len(x), keys, mask_filter_value)
        if unidirectional:
            added = added + _causal(x.shape[1], keys, mask_filter_value)
        if attention_bias is not None:
            added = added + _wide(attention_bias)
        return self._given(_join(_attend(q, k, v, scale, added)), np.stack([k, v]))


class GroupQueryAttention(_Contrib):
    """Causal attention in which several heads of queries share one of keys and values.

    `seqlens_k` holds, of each row, how many keys there are in all, less one; padding is on the
    right. Defined for a first run, without keys in the cache, and for one row or rows of one
    length after it.
    """

    def _run(
        self,
        query: Array,
        key: Array | None,
        value: Array | None,
        past_key: Array | None,
        past_value: Array | None,
        seqlens_k: Array,
        total_sequence_length: Array,
        cos_cache: Array | None = None,
        sin_cache: Array | None = None,
        *more: Array | None,
        num_heads: int = 0,
        kv_num_heads: int = 0,
        do_rotary: int = 0,
        rotary_interleaved: int = 0,
        scale: float = 0.0,
        softcap: float = 0.0,
        local_window_size: int = -1,
        **others: Any,
    ) -> tuple[Array, ...]:
        plain = softcap == 0 and local_window_size == -1 and not any(x is not None for x in more)
        if key is None or value is None or not plain or any(map(_set, others.values())):
            raise NotImplementedError("GroupQueryAttention of packed input, windows or a softcap")
        q, k, v = _split(query, num_heads), _split(key, kv_num_heads), _split(value, kv_num_heads)
        length, held = q.shape[2], 0 if past_key is None else past_key.shape[2]
        totals = seqlens_k.reshape(-1).astype(np.int64) + 1
        if held and (totals != held + length).any():
            raise NotImplementedError("GroupQueryAttention over a cache of rows of unlike lengths")
        if do_rotary and cos_cache is not None and sin_cache is not None:
            rows = np.broadcast_to(held + np.arange(length), (len(q), length))
            turned = (cos_cache[rows], sin_cache[rows], bool(rotary_interleaved))
            q, k = rotate(q, *turned), rotate(k, *turned)
        if held and past_key is not None and past_value is not None:
            k, v = np.concatenate([past_key, k], 2), np.concatenate([past_value, v], 2)
        groups = num_heads // kv_num_heads
        keys, values = (np.repeat(x, groups, axis=1) for x in (k, v))
        added = _causal(length, k.shape[2], -np.inf)
        return self._given(_join(_attend(q, keys, values, scale, added)), k, v)


def _set(value: Any) -> bool:
    """Whether an attribute asks for something: neither nothing nor what is the default."""
    return value not in (None, 0, -1, 0.0, b"", "", "NONE", b"NONE")


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
    RotaryEmbedding,
    MultiHeadAttention,
    Attention,
    GroupQueryAttention,
)
