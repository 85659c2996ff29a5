"""ONNX Runtime's contrib operators for attention, as `contrib` defines the others."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from surgery.runtimes.contrib import Array, Contrib, rounded_as, widen


class RotaryEmbedding(Contrib):
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
    scores = np.matmul(widen(q), widen(k).swapaxes(-1, -2)) * (scale or 1 / math.sqrt(q.shape[-1]))
    scores = scores + bias
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights = weights / weights.sum(axis=-1, keepdims=True)
    return rounded_as(np.matmul(weights, widen(v)), q)


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


class MultiHeadAttention(Contrib):
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
            added = added + widen(attention_bias)
        return self._given(_join(_attend(q, k, v, scale, added)), k, v)


def _part(bias: Array | None, number: int, like: Array) -> Array | float:
    """The bias of queries, keys or values, all of one width, which lie behind one another."""
    if bias is None:
        return 0.0
    width = like.shape[-1]
    if bias.size != 3 * width:
        raise NotImplementedError("attention with a bias of unlike widths")
    return bias[number * width : (number + 1) * width]


class Attention(Contrib):
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
            added = added + widen(attention_bias)
        return self._given(_join(_attend(q, k, v, scale, added)), np.stack([k, v]))


class GroupQueryAttention(Contrib):
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


ATTENTION = (RotaryEmbedding, MultiHeadAttention, Attention, GroupQueryAttention)
