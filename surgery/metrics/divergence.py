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
    return kl_of_logs(log_probabilities(p_logits), log_probabilities(q_logits))


def kl_of_logs(log_p: NDArray[np.float64], log_q: NDArray[np.float64]) -> NDArray[np.float64]:
    """KL(p || q) in nats for each of n positions, both log-probabilities [n, vocab].

    Σ p d, d = log p − log q, loses what is below 1e-16 and can come out negative. Where all d are
    small it is summed as Σ p (d + exp(−d) − 1): the same, as p and q both sum to 1, but of terms
    that are about d²/2, and free of what the sums of p and q are off.
    """
    p, d = np.exp(log_p), log_p - log_q
    kl = np.asarray((p * d).sum(axis=-1), np.float64)
    close = (np.abs(d) < 1).all(axis=-1)
    kl[close] = (p[close] * (d[close] + np.expm1(-d[close]))).sum(axis=-1)
    return kl


def top1_flips(a: Floats, b: Floats) -> int:
    """How many of n positions have another most likely token, the first one on ties."""
    return int(np.count_nonzero(a.argmax(axis=-1) != b.argmax(axis=-1)))


def token_nll(logits: Floats, next_tokens: NDArray[np.int64]) -> NDArray[np.float64]:
    """-log p(next token) in nats for n positions: `logits` [n, vocab], `next_tokens` [n]."""
    return nll_of_logs(log_probabilities(logits), next_tokens)


def nll_of_logs(log_p: NDArray[np.float64], next_tokens: NDArray[np.int64]) -> NDArray[np.float64]:
    """-log p(next token) of log-probabilities `log_p` [n, vocab], `next_tokens` [n]."""
    return np.asarray(-log_p[np.arange(len(next_tokens)), next_tokens], np.float64)
