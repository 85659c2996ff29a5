"""What one live model does, by the very code that the differential test measures a corner with.

So an effect that a search found is the one a report will tell, to the bit where every prompt of
the report is asked here too: prompts run in the same batches, and responses are as greedy. Two
things may differ by rounding: responses run in larger groups here unless `group` is `GROUP` of
`surgery.runtimes.generate`, and where logits do not fit the differential's budget, it keeps another
sample of positions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from surgery.differential.answers import forced_answers, logprobs_of
from surgery.differential.behaviour import BehaviourSums
from surgery.differential.effects import LogProbs, Observation, Scores, Texts
from surgery.differential.effects import observe as observe_corners
from surgery.differential.measures import Measure, responders_of
from surgery.differential.workload import DEFAULT_SEED, OUTPUT_BUDGET, Workload
from surgery.errors import FindError
from surgery.evidence import EDITS
from surgery.metrics.interface import POSITIONS
from surgery.runtimes.forced import force
from surgery.runtimes.generate import Generation, generate
from surgery.runtimes.interface import FLOAT32, Runtime
from surgery.stimuli import Batch, Stimulus
from surgery.stimuli.batches import prompt_batches, within_budget
from surgery.stimuli.extra import Space
from surgery.stimuli.prompts import Tokenizer, tokens_of

GROUP = 32
"""Prompts whose responses run together: fewer and larger steps than the differential's."""

ORIGINAL, EDITED = EDITS["T"]


@dataclass(frozen=True)
class Behaviour:
    """What a model was seen to do: one `Observation` for each measure, in order.

    `logits`, by batch, float32 [n, vocab], are those of the kept positions, where a measure
    compares an edited model with them.
    """

    observations: tuple[Observation, ...]
    logits: Mapping[str, NDArray[np.float32]] = field(default_factory=dict, repr=False)

    @property
    def scores(self) -> tuple[Scores, ...]:
        """Total, and score and weight of each text, for each measure."""
        return tuple(next(iter(own.corners.values())) for own in self.observations)


def ask(
    tokenizer: Tokenizer | None,
    stimuli: Sequence[Stimulus],
    measures: Sequence[Measure],
    *,
    vocab: int,
    positions: int,
    eos: Sequence[int],
    seed: int = DEFAULT_SEED,
) -> Workload:
    """What a model is asked, for any number of edits: `vocab` and `positions` are its sizes,
    `eos` the tokens that end a response (`surgery.differential.workload.end_tokens`).

    Raises `StimuliError` for stimuli that the model cannot take.
    """
    own = tuple(stimuli)
    tokens = tokens_of(own, tokenizer, vocab, positions)
    responders = responders_of(own, measures, tokens, tokenizer, positions)
    sets = {m.stimulus_set for m in measures if m.metric.needs in POSITIONS}
    width = np.dtype(np.float32).itemsize * vocab
    batches = [b for b in prompt_batches(own, tokens, width) if b.stimulus_set in sets]
    return Workload(
        own,
        tuple(within_budget(batches, 2 * width, OUTPUT_BUDGET, seed)),
        tuple(measures),
        tuple(
            Generation(tuple(tokens[i] for i in ids), length, tuple(eos))
            for length, ids in responders.items()
        ),
        tuple(responders.values()),
        tokenizer,
        Space(vocab, positions, late=True, cache=False, seed=seed),
        answers=forced_answers(own, measures, tokens, tokenizer, positions),
    )


def observe(
    runtime: Runtime,
    workload: Workload,
    original: Behaviour | None = None,
    *,
    group: int = GROUP,
) -> Behaviour:
    """What the model does now; `original` is what it did before an edit.

    Raises `FindError` where logits are not finite, or where a measure has nothing to measure.
    """
    corner = EDITED if original else ORIGINAL
    logits = {batch.name: _logits(runtime, batch) for batch in workload.batches}
    sums = BehaviourSums()
    for batch in workload.batches:
        own = {corner: logits[batch.name]}
        if _is_compared(workload):
            before = original.logits if original else logits
            own = {ORIGINAL: before[batch.name], EDITED: logits[batch.name]}
        sums.add(batch, own, {}, dict.fromkeys(own, FLOAT32))
    texts = {corner: _responses(runtime, workload, group)}
    answers = {corner: _answers(runtime, workload, group)}
    found = tuple(observe_corners(texts, workload, sums, answers))
    _check(found, workload)
    return Behaviour(found, logits if _is_compared(workload) else {})


def changes(before: Behaviour, after: Behaviour) -> tuple[Observation, ...]:
    """Each measure of the original and of the edited model in one: `effect().change("T")` is the
    change, `intervals(confidence)` what it leaves open."""
    pairs = zip(before.observations, after.observations, strict=True)
    return tuple(replace(a, corners={**a.corners, **b.corners}) for a, b in pairs)


def _is_compared(workload: Workload) -> bool:
    return any(measure.metric.needs == "kl" for measure in workload.measures)


def _logits(runtime: Runtime, batch: Batch) -> NDArray[np.float32]:
    row, column = batch.selected.T
    kept = np.asarray(runtime.infer(batch.inputs())["logits"][row, column], np.float32)
    if not np.isfinite(kept).all():
        raise FindError(f"logits of batch {batch.name} are not finite")
    return kept


def _responses(runtime: Runtime, workload: Workload, group: int) -> Texts:
    made = generate(runtime, workload.generations, group)
    if any(own.nonfinite for own in made):
        raise FindError("greedy responses stopped at logits that are not finite")
    decode = workload.tokenizer.decode if workload.tokenizer else None
    return {
        stimulus: decode(tokens)
        for ids, own in zip(workload.responders, made, strict=True)
        for stimulus, tokens in zip(ids, own.tokens, strict=True)
        if decode
    }


def _answers(runtime: Runtime, workload: Workload, group: int) -> LogProbs:
    rows = force(runtime, [answer.tokens for answer in workload.answers], group)
    if not all(math.isfinite(value) for row in rows for value in row):
        raise FindError("the log-probability of an answer is not finite")
    return logprobs_of(workload.answers, rows)


def _check(found: Sequence[Observation], workload: Workload) -> None:
    measured = {id(own.measure) for own in found if own.count}
    for measure in workload.measures:
        if id(measure) not in measured:
            raise FindError(
                f"{measure.name} has nothing to measure on the {measure.stimulus_set} set; "
                "give prompts that it is about"
            )
