"""What is kept of a run's behaviour is what logits, texts and responses say, worked out plainly."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from surgery.differential import behaviour
from surgery.differential.behaviour import BehaviourSums
from surgery.differential.effects import Observation, observe
from surgery.differential.intervals import intervals
from surgery.differential.measures import Measure
from surgery.differential.responses import Response, partings
from surgery.differential.workload import Workload
from surgery.evidence import CORNERS, PAIRS
from surgery.metrics import make_metric
from surgery.metrics.intervals import bootstrap_mean, exact_change, exact_difference
from surgery.runtimes.generate import RunnerUp
from surgery.stimuli import Batch, Stimulus
from surgery.stimuli.batches import pad
from surgery.stimuli.extra import Space

Array = np.ndarray
VOCAB = 11
SINGLE = dict.fromkeys(CORNERS, "float32")


def batch(name: str, stimulus_set: str = "target", texts: int = 9, side: Any = "left") -> Batch:
    generator = np.random.default_rng(len(name))
    rows = [tuple(generator.integers(0, VOCAB, 2 + n % 4).tolist()) for n in range(texts)]
    names = tuple(f"{name} {n}" for n in range(texts))
    return pad(name, stimulus_set, rows, side, names)


def logits_of(own: Batch, seed: int = 0) -> tuple[dict[str, Array], dict[str, Array]]:
    """Original and edited models that are unlike, and conversions that are off by little."""
    generator = np.random.default_rng(seed)
    shape = (len(own.selected), VOCAB)
    exact = {"T_o": generator.normal(0, 3, shape)}
    exact["T_e"] = exact["T_o"] + generator.normal(0, 1, shape)
    kept = {}
    for name in CORNERS:
        noise = generator.normal(0, 1e-6, shape)
        kept[name] = (exact[f"T_{name[-1]}"] + noise).astype(np.float32)
    return kept, exact


def summed(*batches: Batch) -> BehaviourSums:
    sums = BehaviourSums()
    for own in batches:
        sums.add(own, *logits_of(own), SINGLE)
    return sums


def softmax(logits: Array) -> Array:
    grown = np.exp(logits.astype(np.float64))
    return grown / grown.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pair", PAIRS)
def test_every_pair_is_what_its_logits_say(pair: str, side: str) -> None:
    own = batch("a", side=side)
    kept, _ = logits_of(own)
    [row] = [r for r in summed(own).rows() if r.pair == pair]
    p, q = (softmax(kept[name]) for name in PAIRS[pair])
    kl = (p * np.log(p / q)).sum(axis=1)
    assert row.positions == len(own.selected)
    assert row.kl["mean"] == pytest.approx(kl.mean(), rel=1e-6, abs=1e-15)
    assert row.kl["median"] == pytest.approx(np.median(kl), rel=1e-6, abs=1e-15)
    assert row.flips == (p.argmax(axis=1) != q.argmax(axis=1)).sum()
    assert row.near_ties == 0
    before, after = [], []
    for index, (line, column) in enumerate(own.selected):
        ended = column + 1 == own.input_ids.shape[1]
        if not ended and own.attention_mask[line, column + 1]:
            before.append(-np.log(p[index, own.input_ids[line, column + 1]]))
            after.append(-np.log(q[index, own.input_ids[line, column + 1]]))
    assert row.tokens == len(before) > 0
    assert row.perplexity["before"] == pytest.approx(np.exp(np.mean(before)))
    assert row.perplexity["after"] == pytest.approx(np.exp(np.mean(after)))
    delta = np.exp(-np.array(after)) - np.exp(-np.array(before))
    assert row.delta_p["rms"] == pytest.approx(np.sqrt((delta**2).mean()), rel=1e-6)


def test_slices_change_nothing() -> None:
    whole = list(summed(batch("a"), batch("b", "preserve")).rows())
    with patch.object(behaviour, "SLICE_BYTES", 3 * 8 * len(PAIRS) * VOCAB):
        assert list(summed(batch("a"), batch("b", "preserve")).rows()) == whole


def test_sets_are_told_apart_and_joined_for_the_whole_edge() -> None:
    sums = summed(batch("a"), batch("b", "preserve"), batch("c"))
    rows = {(row.stimulus_set, row.pair): row for row in sums.rows()}
    assert set(rows) == {(name, pair) for name in ("target", "preserve") for pair in PAIRS}
    both = [rows[name, "C_e"] for name in ("target", "preserve")]
    kl, flips = sums.over_sets("C_e")
    positions = sum(row.positions for row in both)
    assert kl == pytest.approx(sum(r.kl["mean"] * r.positions for r in both) / positions)
    assert flips == sum(row.flips for row in both)
    assert BehaviourSums().over_sets("C_e") == (None, None)


def test_a_conversion_that_turns_a_tie_is_near_and_an_edit_that_does_is_real() -> None:
    own = batch("a", texts=1)
    shape = (len(own.selected), VOCAB)
    tied = np.zeros(shape, np.float32)
    tied[:, 3], tied[:, 5] = 4.0, 4.0 - 1e-6
    turned = tied.copy()
    turned[:, [3, 5]] = tied[:, [5, 3]]
    edited = turned.copy()
    edited[:, 5] += 1.0
    kept = {"T_o": tied, "R_o": turned, "T_e": edited, "R_e": edited}
    noise = np.full(shape, 1e-6)
    exact = {"T_o": tied + noise, "T_e": edited + noise}
    sums = BehaviourSums()
    sums.add(own, kept, exact, SINGLE)
    found = {row.pair: (row.flips, row.near_ties) for row in sums.rows()}
    n = len(own.selected)
    assert found == {"C_o": (n, n), "C_e": (0, 0), "T": (n, 0), "R": (0, 0)}


def test_a_wrong_conversion_excuses_no_flip_by_its_own_error() -> None:
    """The noise is PyTorch's, of the same model; an error of ONNX Runtime is none."""
    own = batch("a", texts=9)
    kept, exact = logits_of(own)
    generator = np.random.default_rng(9)
    kept["R_o"] = kept["R_o"] + generator.normal(0, 2, kept["R_o"].shape).astype(np.float32)
    sums = BehaviourSums()
    sums.add(own, kept, exact, SINGLE)
    [row] = [r for r in sums.rows() if r.pair == "C_o"]
    assert row.flips > 3 and row.near_ties == 0


# ------------------------------------------------------------------------------------ intervals


def test_intervals_of_positions_are_over_texts() -> None:
    own = batch("a", texts=12)
    sums = summed(own)
    found = {(i.quantity, i.pair): i for i in intervals(sums, (), (), (0.95,))}
    kept, _ = logits_of(own)
    p, q = softmax(kept["T_o"]), softmax(kept["T_e"])
    kl = (p * np.log(p / q)).sum(axis=1)
    totals = np.array([kl[own.selected[:, 0] == n].sum() for n in range(12)])
    weights = np.bincount(own.selected[:, 0]).astype(float)
    # Texts are taken in the order of their names: a 0, a 1, a 10, a 11, a 2, …
    order = sorted(range(12), key=str)
    bounds = bootstrap_mean(totals[order], weights[order], 0.95)
    assert bounds is not None
    row = found["kl", "T"]
    assert (row.low, row.high) == pytest.approx(bounds)
    assert (row.count, row.estimate) == (12, pytest.approx(kl.mean()))
    for name, share in (("kl_median", 0.5), ("kl_99%", 0.99)):
        assert found[name, "T"].estimate == pytest.approx(np.quantile(kl, share))
        assert found[name, "T"].low < found[name, "T"].high <= kl.max() * (1 + 1e-9)
    assert found["real_flip_rate", "T"].high <= found["flip_rate", "T"].high
    assert found["log_ratio", "C_o"].low <= 0 <= found["log_ratio", "C_o"].high


def test_few_texts_leave_shares_their_exact_interval_and_means_none() -> None:
    found = {i.quantity for i in intervals(summed(batch("a", texts=3)), (), (), (0.95,))}
    assert found == {"flip_rate", "real_flip_rate"}


# -------------------------------------------------------------------------------------- metrics

TEXTS = tuple(
    Stimulus(str(n), "target", input_ids=(1,), answers={"yes": ("yes",)}) for n in range(10)
)
RATE = Measure("answer_rate:yes", "target", make_metric("answer_rate:yes"))
SPACE = Space(VOCAB, 16, late=True, cache=False, seed=0)
PLAIN = Workload(TEXTS, (), (RATE,), (), (), None, SPACE)


def answers(*said: str) -> dict[str, str]:
    return {str(n): text for n, text in enumerate(said)}


def observed(before: list[str], after: list[str], workload: Workload = PLAIN) -> Observation:
    texts = {"T_o": answers(*before), "T_e": answers(*after)}
    [found] = observe(texts, workload, BehaviourSums())
    return found


def test_a_rate_has_the_exact_interval_of_its_paired_change() -> None:
    before = ["yes"] * 3 + ["no"] * 7
    after = ["no"] + ["yes"] * 8 + ["no"]
    found = observed(before, after)
    [row] = found.intervals(0.95)
    assert found.effect().change("T") == row.estimate == pytest.approx(0.5)
    assert (row.low, row.high) == exact_change(6, 1, 10, 0.95)
    assert (row.quantity, row.pair, row.count) == ("answer_rate:yes", "T", 10)


def test_a_rate_over_unlike_texts_has_the_interval_of_two_rates() -> None:
    """A response with no line to judge is in the language rate of one corner and not the other."""
    english = "This is a sentence that is clearly written in English."
    french = "Ceci est une phrase qui est clairement écrite en français."
    texts = tuple(replace(own, answers={"language": ("en",)}) for own in TEXTS)
    metric = make_metric("line_pass_rate:en,fr")
    measure = Measure("line_pass_rate:en,fr", "target", metric)
    workload = replace(PLAIN, stimuli=texts, measures=(measure,))
    found = observed([english] * 8 + ["", french], [french] * 4 + [english] * 6, workload)
    [row] = found.intervals(0.95)
    assert row.estimate == pytest.approx(6 / 10 - 8 / 9)
    assert (row.low, row.high) == exact_difference((8, 9), (6, 10), 0.95)


def test_the_nll_has_a_bootstrap_over_its_texts() -> None:
    own = batch("a", texts=10)
    stimuli = tuple(Stimulus(name, "target", input_ids=(1,)) for name in own.rows)
    measure = Measure("nll", "target", make_metric("nll"))
    workload = replace(PLAIN, stimuli=stimuli, measures=(measure,))
    sums = summed(own)
    [found] = observe({"T_o": {}, "T_e": {}}, workload, sums)
    [row] = found.intervals(0.95)
    [ratio] = [
        i for i in intervals(sums, (), (), (0.95,)) if (i.quantity, i.pair) == ("log_ratio", "T")
    ]
    assert row.estimate == pytest.approx(ratio.estimate)
    assert (row.low, row.high) == pytest.approx((ratio.low, ratio.high), rel=0.05)


def test_a_metric_that_is_no_mean_of_texts_has_no_interval() -> None:
    class Median(type(RATE.metric)):  # type: ignore[misc]
        def score(self, observed: Any) -> float:
            return super().score(observed) if len(observed.stimuli) == 1 else 0.123

    workload = replace(PLAIN, measures=(replace(RATE, metric=Median("yes")),))
    found = observed(["yes"] * 10, ["no"] * 10, workload)
    assert found.effect().corners == {"T_o": 0.123, "T_e": 0.123}
    assert list(found.intervals(0.95)) == []


# ------------------------------------------------------------------------------------ responses


def response(*tokens: int, runners: tuple[RunnerUp, ...] = ()) -> Response:
    return Response(tokens, runners or tuple(RunnerUp(0, 1.0, 8.0) for _ in tokens))


def test_responses_part_where_their_tokens_do() -> None:
    one = {"0": response(1, 2, 3), "1": response(1, 2), "2": response(4), "3": response(7, 7)}
    other = {"0": response(1, 5, 3), "1": response(1, 2), "2": response(9), "3": response(7)}
    [found] = partings({"T_o": one, "T_e": other}, PLAIN, BehaviourSums())
    row = found.row()
    assert (row.stimulus_set, row.pair, row.responses, row.parted) == ("target", "T", 4, 3)
    assert (row.first, row.median, row.near_ties) == (0, 1.0, 0)
    [interval] = intervals(BehaviourSums(), (found,), (), (0.9,))
    assert (interval.quantity, interval.estimate) == ("parted_rate", 0.75)
    [alike] = partings({"T_o": one, "T_e": one}, PLAIN, BehaviourSums())
    same = alike.row()
    assert (same.parted, same.first, same.median) == (0, None, None)


NEAR = 2.0**-21
"""The float32 grid at 8 is 2^-20."""


@pytest.mark.parametrize(
    ("first", "second", "near"),
    [
        (RunnerUp(9, NEAR, 8.0), RunnerUp(4, NEAR, 8.0), True),
        (RunnerUp(9, NEAR, 8.0), RunnerUp(4, 1.0, 8.0), False),
        (RunnerUp(9, 1.0, 8.0), RunnerUp(4, NEAR, 8.0), False),
        (RunnerUp(8, NEAR, 8.0), RunnerUp(4, NEAR, 8.0), False),
        (RunnerUp(9, NEAR, 8.0), RunnerUp(5, NEAR, 8.0), False),
    ],
)
def test_a_parting_is_near_where_each_is_the_others_runner_up(
    first: RunnerUp, second: RunnerUp, near: bool
) -> None:
    one, other = {"0": response(4, runners=(first,))}, {"0": response(9, runners=(second,))}
    [found] = partings({"T_o": one, "R_o": other}, PLAIN, BehaviourSums())
    assert found.row().near_ties == int(near)


def test_noise_of_the_set_widens_what_is_near() -> None:
    runner = (RunnerUp(9, 1e-4, 8.0),), (RunnerUp(4, 1e-4, 8.0),)
    one, other = ({"0": response(t, runners=r)} for t, r in zip((4, 9), runner, strict=True))
    sums = BehaviourSums(noise={("target", "T_o"): [np.array([1e-9, 2e-5, 1.0])]})
    [found] = partings({"T_o": one, "R_o": other}, PLAIN, sums)
    assert found.row().near_ties == 1, "the median is 2e-5, and 8 of it are more than the gap"
