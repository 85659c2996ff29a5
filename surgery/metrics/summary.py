"""The statistics of llama.cpp's `--kl-divergence` table, from per-position values in float64.

The formulas are those of `tools/perplexity/perplexity.cpp` (llama.cpp, `kl_divergence`), with two
differences. Its base holds log-probabilities in 16 bits, cut 16 nats below the largest, so that
small divergences come out negative; here they are float32 logits in float64 arithmetic. Errors of
what is paired are the standard errors of the paired values themselves: the same number as
√(σ₁² + σ₂² − 2 cov), without its cancellation. A standard error needs two values: of one there is
none, and its name is left out.

Standard errors take positions to be independent, as llama.cpp does. `metrics.intervals` does not.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.evidence import DELTA_LEVELS, KL_LEVELS

Values = NDArray[np.float64]
Row = dict[str, float]


def kl_table(kl: Values) -> Row:
    """Mean ± `error`, smallest, percentiles and largest of KL(p || q) in nats, `kl` [n], n > 0."""
    return _mean(kl, "mean", "error") | _spread(kl, KL_LEVELS)


def delta_table(before: Values, after: Values) -> Row:
    """Δp: how the probability of the text's own next token changes, as a share of 1.

    `before` and `after` are -log p of those tokens in nats, [n], n > 0. Mean, root mean square
    with its error 0.5 / RMS · σ(Δp²), and percentiles.
    """
    delta = np.exp(-after) - np.exp(-before)
    rms = float(np.sqrt(np.square(delta).mean()))
    row = _mean(delta, "mean", "error") | {"rms": rms}
    if len(delta) > 1:
        row["rms_error"] = 0.5 / rms * standard_error(np.square(delta)) if rms else 0.0
    return row | _spread(delta, DELTA_LEVELS)


def perplexity_table(before: Values, after: Values) -> Row:
    """Perplexities exp(mean -log p) and how they differ, of -log p in nats [n], n > 0.

    `log_before`, `log_after`: means; `before`, `after`: perplexities; `correlation` of both over
    the tokens, left out where one of them never varies; `log_ratio` = ln(PPL after / PPL before),
    `ratio` and `difference` = PPL after − PPL before. Each `NAME_error` is its standard error, to
    first order (d exp(x) = exp(x) dx). What is too large for float64 is left out.
    """
    logs = _mean(before, "log_before", "log_before_error")
    logs |= _mean(after, "log_after", "log_after_error")
    logs |= _mean(after - before, "log_ratio", "log_ratio_error")
    with np.errstate(over="ignore", invalid="ignore"):
        row = logs | _correlation(before, after)
        derived = _perplexities(logs, before, after)
    # Where the logarithms themselves are no numbers, so is all that follows, and it is shown.
    sound = bool(np.isfinite(list(logs.values())).all())
    return row | {name: value for name, value in derived.items() if np.isfinite(value) or not sound}


def _perplexities(logs: Row, before: Values, after: Values) -> Row:
    small, large, ratio = (
        float(np.exp(logs[name])) for name in ("log_before", "log_after", "log_ratio")
    )
    row = {"before": small, "after": large, "ratio": ratio, "difference": large - small}
    if len(before) > 1:
        row["before_error"] = small * logs["log_before_error"]
        row["after_error"] = large * logs["log_after_error"]
        row["ratio_error"] = ratio * logs["log_ratio_error"]
        row["difference_error"] = standard_error(large * after - small * before)
    return row


def _correlation(before: Values, after: Values) -> Row:
    if len(before) < 2 or before.std() == 0 or after.std() == 0:
        return {}
    x, y = before - before.mean(), after - after.mean()
    found = float((x * y).sum() / np.sqrt(np.square(x).sum() * np.square(y).sum()))
    return {"correlation": found}


def standard_error(values: Values) -> float:
    """√((mean of squares − square of mean) / (n − 1)) of n values, n > 1."""
    return float(values.std(ddof=1) / np.sqrt(len(values)))


def _mean(values: Values, name: str, error: str) -> Row:
    row = {name: float(values.mean())}
    return row | {error: standard_error(values)} if len(values) > 1 else row


def _spread(values: Values, levels: tuple[str, ...]) -> Row:
    """Smallest, `levels` and largest; between two values linearly, as llama.cpp does."""
    shares = [_share(level) for level in levels]
    found: NDArray[Any] = np.quantile(values, [0.0, *shares, 1.0])
    return dict(zip(("min", *levels, "max"), found.tolist(), strict=True))


def _share(level: str) -> float:
    return 0.5 if level == "median" else float(level.rstrip("%")) / 100
