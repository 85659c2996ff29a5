"""Distances between next-token distributions, from float32 logits in float64 arithmetic."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax

Floats = NDArray[np.floating[Any]]


def log_probabilities(logits: Floats) -> NDArray[np.float64]:
    """Natural log-probabilities [n, vocab] of `logits` [n, vocab]."""
    return np.asarray(log_softmax(logits.astype(np.float64), axis=-1), np.float64)


def kl_divergence(p_logits: Floats, q_logits: Floats) -> NDArray[np.float64]:
    """KL(p || q) in nats for each of n positions, both logits [n, vocab]."""
    log_p, log_q = log_probabilities(p_logits), log_probabilities(q_logits)
    return np.asarray((np.exp(log_p) * (log_p - log_q)).sum(axis=-1), np.float64)


def top1_flips(a: Floats, b: Floats) -> int:
    """How many of n positions have another most likely token, the first one on ties."""
    return int(np.count_nonzero(a.argmax(axis=-1) != b.argmax(axis=-1)))


def token_nll(logits: Floats, next_tokens: NDArray[np.int64]) -> NDArray[np.float64]:
    """-log p(next token) in nats for n positions: `logits` [n, vocab], `next_tokens` [n]."""
    log_p = log_probabilities(logits)
    return np.asarray(-log_p[np.arange(len(next_tokens)), next_tokens], np.float64)
