"""Which metrics are measured on which stimuli, and what they need the models to write."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from surgery.errors import StimuliError, quote
from surgery.metrics import Metric, make_metric
from surgery.metrics.interface import POSITIONS
from surgery.metrics.languages import ANSWER as LANGUAGE
from surgery.policy import Policy
from surgery.stimuli import Stimulus
from surgery.stimuli.prompts import Tokenizer


@dataclass(frozen=True)
class Measure:
    """One metric on one stimulus set, under the name a policy gives it."""

    name: str
    stimulus_set: str
    metric: Metric


def measures_of(stimuli: Sequence[Stimulus], policy: Policy) -> Iterator[Measure]:
    """The policy's metrics, then those that the stimuli's own answers suggest."""
    wanted: list[tuple[str, str]] = [(rule.metric, rule.set) for rule in policy.target]
    for name in dict.fromkeys(stimulus.set for stimulus in stimuli):
        wanted += [(metric, name) for metric in _suggested(stimuli, name)]
    named = {metric.partition(":")[0] for metric, _ in wanted[: len(policy.target)]}
    for index, (metric, stimulus_set) in enumerate(dict.fromkeys(wanted)):
        # A rate over languages the policy already names is not measured twice.
        again = index >= len(policy.target) and metric.startswith("line_pass_rate")
        if not (again and "line_pass_rate" in named):
            yield Measure(metric, stimulus_set, make_metric(metric, policy.word_lists))


def _suggested(stimuli: Sequence[Stimulus], stimulus_set: str) -> Iterator[str]:
    own = [stimulus for stimulus in stimuli if stimulus.set == stimulus_set]
    names = sorted({name for stimulus in own for name in stimulus.answers or {}})
    for name in names:
        if name != LANGUAGE:
            yield f"answer_rate:{name}"
        elif stimulus_set == "target":
            yield f"line_pass_rate:{','.join(_languages(stimuli))}"
    if own:
        yield "nll"


def _languages(stimuli: Sequence[Stimulus]) -> list[str]:
    return sorted({code for s in stimuli for code in (s.answers or {}).get(LANGUAGE, ())})


def needs_words(stimuli: Sequence[Stimulus], measures: Sequence[Measure]) -> bool:
    """Whether a response or an answer is asked for, which takes a tokenizer."""
    return any(
        measure.stimulus_set == stimulus.set and measure.metric.applies(stimulus)
        for measure in measures
        if measure.metric.needs not in POSITIONS
        for stimulus in stimuli
    )


def responders_of(
    stimuli: Sequence[Stimulus],
    measures: Sequence[Measure],
    tokens: Mapping[str, tuple[int, ...]],
    tokenizer: Tokenizer | None,
    positions: int,
) -> dict[int, tuple[str, ...]]:
    """Stimulus ids by the number of new tokens their metrics need, as far as the model reaches;
    `tokens` are those of the prompts, `positions` what the model takes.

    Raises `StimuliError` for a prompt that leaves no room for a response."""
    found: dict[int, list[str]] = {}
    for stimulus in stimuli:
        needed = _new_tokens(stimulus, measures, tokenizer)
        room = positions - len(tokens[stimulus.id])
        if needed and not room:
            raise StimuliError(
                f"stimulus {quote(stimulus.id)}: fills the {positions} positions of this model; a "
                "metric asks for a response and there is no room for one"
            )
        if needed:
            found.setdefault(min(needed, room), []).append(stimulus.id)
    return {length: tuple(ids) for length, ids in sorted(found.items())}


def _new_tokens(
    stimulus: Stimulus, measures: Sequence[Measure], tokenizer: Tokenizer | None
) -> int:
    answers = [a for listed in (stimulus.answers or {}).values() for a in listed]
    longest = max((len(tokenizer.encode(a)) for a in answers if tokenizer), default=0)
    return max(
        (
            measure.metric.new_tokens(longest)
            for measure in measures
            if measure.stimulus_set == stimulus.set and measure.metric.applies(stimulus)
        ),
        default=0,
    )
