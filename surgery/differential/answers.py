"""Answers whose probability is asked for: their tokens after the prompt, and what came of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from surgery.differential.measures import Measure
from surgery.errors import StimuliError, quote
from surgery.runtimes.forced import Continuation
from surgery.stimuli import Stimulus
from surgery.stimuli.answers import joined, spaced
from surgery.stimuli.prompts import Tokenizer


@dataclass(frozen=True)
class ForcedAnswer:
    """One answer of a stimulus, as tokens after those of its prompt."""

    stimulus: str
    answer: str
    tokens: Continuation


def forced_answers(
    stimuli: Sequence[Stimulus],
    measures: Sequence[Measure],
    tokens: Mapping[str, tuple[int, ...]],
    tokenizer: Tokenizer | None,
    positions: int,
) -> tuple[ForcedAnswer, ...]:
    """Every answer that a metric asks for, each once; `tokens` are those of the prompts.

    Raises `StimuliError` for one that the model has no room for, or that has no tokens.
    """
    return tuple(
        ForcedAnswer(stimulus.id, answer, _tokens(stimulus, answer, tokens, tokenizer, positions))
        for stimulus in stimuli
        if tokenizer is not None
        for answer in dict.fromkeys(_asked(stimulus, measures))
    )


def _asked(stimulus: Stimulus, measures: Sequence[Measure]) -> Iterator[str]:
    for measure in measures:
        if measure.stimulus_set == stimulus.set and measure.metric.applies(stimulus):
            yield from measure.metric.asks(stimulus)


def _tokens(
    stimulus: Stimulus,
    answer: str,
    tokens: Mapping[str, tuple[int, ...]],
    tokenizer: Tokenizer,
    positions: int,
) -> Continuation:
    if stimulus.prompt is None:
        found = Continuation(tokens[stimulus.id], tokenizer.encode_alone(spaced("", answer)))
    else:
        found = Continuation(*joined(tokenizer, stimulus.prompt, answer))
    length = len(found.prompt) + len(found.following)
    where = f"stimulus {quote(stimulus.id)}, answer {quote(answer)}"
    if not (found.prompt and found.following):
        raise StimuliError(f"{where}: leaves the prompt or the answer without a token of its own")
    if length > positions:
        raise StimuliError(
            f"{where}: has {length} tokens with its prompt; this model takes {positions}"
        )
    return found


def logprobs_of(
    answers: Sequence[ForcedAnswer], rows: Iterable[tuple[float, ...]]
) -> dict[str, dict[str, tuple[float, ...]]]:
    """The log-probability of each token of every answer, by stimulus and answer; `rows` has them
    in the order of the answers."""
    found: dict[str, dict[str, tuple[float, ...]]] = {}
    for own, row in zip(answers, rows, strict=True):
        found.setdefault(own.stimulus, {})[own.answer] = row
    return found
