"""Which next tokens tell a goal: those that open an answer wanted, and one that is not.

The margin of a prompt is log p(a wanted answer opens) − log p(an unwanted one opens) at its last
position; where a prompt has answers of one kind alone, the log-probability of that kind. It is the
number that an edit shall raise, whether the goal is raised or lowered.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from surgery.errors import FindError, quote
from surgery.find.interface import Goal, Lab
from surgery.find.prompts.rows import Row, token_rows
from surgery.metrics.languages import ANSWER as LANGUAGE
from surgery.stimuli import Stimulus
from surgery.stimuli.answers import following
from surgery.stimuli.prompts import Tokenizer


@dataclass(frozen=True)
class Sides:
    """The answers of one prompt, as text: those that shall come, and those that shall not."""

    wanted: tuple[str, ...]
    unwanted: tuple[str, ...]


@dataclass(frozen=True)
class Watched:
    """Prompts as token ids, and for each the tokens that open a wanted and an unwanted answer; a
    prompt may have none of one kind. `left_out` counts those whose kinds open alike, or that have
    no answer."""

    rows: tuple[Row, ...]
    wanted: tuple[Row, ...]
    unwanted: tuple[Row, ...]
    left_out: int

    def answers(self, part: slice, sign: int) -> list[Row]:
        """The tokens of each prompt that open the answer a goal of `sign` is about."""
        pairs = zip(self.wanted[part], self.unwanted[part], strict=True)
        return [(a or b) if sign > 0 else (b or a) for a, b in pairs]

    def margins(self, logits: Any, part: slice) -> Any:
        """The margin [n] of the prompts `part`, from their logits [n, vocab]; torch, float64."""
        import torch

        logs = logits.double().log_softmax(-1)
        sides = zip(logs, self.wanted[part], self.unwanted[part], strict=True)
        return torch.stack([_opens(row, a) - _opens(row, b) for row, a, b in sides])


def _opens(logs: Any, tokens: Row) -> Any:
    """log p of any of `tokens`; 0 where there are none."""
    return logs[list(tokens)].logsumexp(-1) if tokens else logs.new_zeros(())


def sides(goal: Goal, stimuli: Iterable[Stimulus], against: str | None) -> list[Sides]:
    """The answers of each prompt by the goal: those it is named after, and, opposed to them, those
    called `against`, or all others. Of a goal that names none, `against` are the unwanted ones.

    Raises `FindError` where neither names answers of any prompt, or both the same.
    """
    asked = [_spoken(stimulus) for stimulus in stimuli]
    known = sorted({name for answers in asked for name in answers})
    if against == goal.argument:
        raise FindError(
            f"against {quote(against)}: these are the answers that the goal is named after; name "
            "others, or none"
        )
    named = goal.argument if against is None else against
    if named not in known:
        raise FindError(
            f"no prompt of set target has answers called {quote(named)}, by which the tokens to "
            f"watch are known; expected one of {', '.join(map(quote, known)) or 'none'}: name it "
            "with against"
        )
    if goal.argument not in known:
        return [Sides((), answers.get(named, ())) for answers in asked]
    return [_sides(goal, answers, against) for answers in asked]


def _spoken(stimulus: Stimulus) -> dict[str, tuple[str, ...]]:
    """The answers that are text."""
    return {name: own for name, own in (stimulus.answers or {}).items() if name != LANGUAGE}


def _sides(goal: Goal, answers: dict[str, tuple[str, ...]], against: str | None) -> Sides:
    own = answers.get(goal.argument, ())
    others = [name for name in answers if name != goal.argument and against in (None, name)]
    rivals = tuple(answer for name in others for answer in answers[name])
    return Sides(own, rivals) if goal.sign > 0 else Sides(rivals, own)


def watch(lab: Lab, against: str | None) -> Watched:
    """What the target prompts of `lab` are watched for.

    Raises `FindError` where no prompt is left, `StimuliError` for what the model cannot take.
    """
    stimuli = lab.of_set("target")
    found = sides(lab.goal, stimuli, against)
    kept = []
    for stimulus, row, side in zip(stimuli, token_rows(lab, stimuli), found, strict=True):
        wanted = _opening(lab.tokenizer, stimulus, side.wanted)
        unwanted = _opening(lab.tokenizer, stimulus, side.unwanted)
        if (wanted or unwanted) and not set(wanted) & set(unwanted):
            kept.append((row, wanted, unwanted))
    if not kept:
        raise FindError("no prompt of set target has an answer told by its first token")
    rows, wanted_, unwanted_ = zip(*kept, strict=True)
    return Watched(rows, wanted_, unwanted_, len(stimuli) - len(kept))


def _opening(tokenizer: Tokenizer | None, stimulus: Stimulus, answers: Sequence[str]) -> Row:
    """The tokens that may come first of an answer right after the prompt, but for blank ones."""
    if not answers:
        return ()
    if tokenizer is None or stimulus.prompt is None:
        raise FindError(f"stimulus {quote(stimulus.id)}: answers need a prompt in text")
    found = [following(tokenizer, stimulus.prompt, answer) for answer in answers]
    first = dict.fromkeys(tokens[0] for tokens in found if tokens is not None)
    return tuple(token for token in first if tokenizer.decode([token]).strip())
