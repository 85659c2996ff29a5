"""Prompts with two rival answers, each beside a corrupted prompt of as many tokens."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from surgery.errors import FindError, describe, quote
from surgery.find.interface import Goal
from surgery.stimuli import Stimulus
from surgery.stimuli.answers import following
from surgery.stimuli.prompts import Tokenizer, tokens_of

NO_ANSWERS = "lacks one of the two answers"
NO_TEXT = "has token ids in place of a prompt"
NO_JOINT = "its tokens change when an answer follows"
SAME_TOKEN = "its two answers begin with the same token"
NO_PARTNER = "no other prompt of its length has other answers"


@dataclass(frozen=True)
class Names:
    """The answer whose logit an edit shall raise over that of its rival."""

    raised: str
    rival: str


@dataclass(frozen=True)
class Pair:
    """Token ids of one clean prompt and of its corrupted one, equally long, and the first token
    of the raised answer and of the rival."""

    id: str
    clean: tuple[int, ...]
    corrupted: tuple[int, ...]
    tokens: tuple[int, int]


@dataclass(frozen=True)
class Pairs:
    """The prompts that can be used; `left_out` counts the others by why, `drawn` those whose
    corrupted prompt is another one of the file."""

    pairs: tuple[Pair, ...]
    left_out: Mapping[str, int]
    drawn: int


@dataclass(frozen=True)
class _Asked:
    stimulus: Stimulus
    ids: tuple[int, ...]
    answers: frozenset[str]


def answer_names(stimuli: Sequence[Stimulus], goal: Goal, against: str | None) -> Names:
    """The two answers of a goal that names one of them, as `answer_rate:NAME` does.

    The other is `against`, or the only other one that prompts with this answer have. Raises
    `FindError` where there is no such name, or several.
    """
    named = goal.argument
    asked = [s for s in stimuli if named in (s.answers or {})]
    if not named or not asked:
        there = sorted({name for s in stimuli for name in s.answers or {}})
        raise FindError(
            f"goal {quote(goal.name)}: expected a metric of an answer that prompts of set target "
            f"have, such as answer_rate:NAME; they have {describe(there) or 'none'}"
        )
    others = sorted({name for s in asked for name in s.answers or {}} - {named})
    if against is None and len(others) != 1:
        raise FindError(
            f"goal {quote(goal.name)}: the rival of this answer must be one that the same prompts "
            f"have; found {describe(others) or 'none'}; name it with against"
        )
    if against is not None and against not in others:
        raise FindError(
            f"against {quote(against)}: prompts with the answer {quote(named)} have no such other "
            f"answer; they have {describe(others) or 'none'}"
        )
    rival = others[0] if against is None else against
    return Names(named, rival) if goal.sign > 0 else Names(rival, named)


def contrast_pairs(
    stimuli: Sequence[Stimulus],
    names: Names,
    tokenizer: Tokenizer | None,
    vocab: int,
    positions: int,
    seed: int,
) -> Pairs:
    """Every prompt that has both answers, with its `corrupted` prompt, or else with another one
    of equal length and other answers, drawn by `seed`.

    Raises `FindError` where no prompt is left or a corrupted prompt does not fit its prompt, and
    `StimuliError` for prompts that the model cannot take.
    """
    if tokenizer is None:
        raise FindError("prompts with answers need a tokenizer.json beside the weights")
    left_out: Counter[str] = Counter()
    asked = _asked(stimuli, names, left_out)
    ids = tokens_of(asked, tokenizer, vocab, positions)
    every = [_Asked(s, ids[s.id], _strings(s, names)) for s in asked]
    partners = _partners(every, seed)
    found, drawn = [], 0
    for one in every:
        tokens = _watched(one, names, tokenizer, vocab)
        partner = partners.get(one.stimulus.id)
        if isinstance(tokens, str):
            left_out[tokens] += 1
        elif one.stimulus.corrupted is not None:
            found.append(Pair(one.stimulus.id, one.ids, _given(one, tokenizer, vocab), tokens))
        elif partner is None:
            left_out[NO_PARTNER] += 1
        else:
            found.append(Pair(one.stimulus.id, one.ids, partner, tokens))
            drawn += 1
    if not found:
        why = "; ".join(f"{count}: {reason}" for reason, count in left_out.items())
        raise FindError(
            f"no prompt of set target can be used to contrast {quote(names.raised)} with "
            f"{quote(names.rival)} ({why or 'there is none'}); give prompts whose answers begin "
            f"unlike, and a corrupted prompt of as many tokens for each"
        )
    return Pairs(tuple(found), dict(left_out), drawn)


def _asked(
    stimuli: Iterable[Stimulus], names: Names, left_out: Counter[str]
) -> tuple[Stimulus, ...]:
    """Prompts with both answers; the others are counted."""
    found = []
    for stimulus in stimuli:
        if not {names.raised, names.rival} <= set(stimulus.answers or {}):
            left_out[NO_ANSWERS] += 1
        elif stimulus.prompt is None:
            left_out[NO_TEXT] += 1
        else:
            found.append(stimulus)
    return tuple(found)


def _strings(stimulus: Stimulus, names: Names) -> frozenset[str]:
    """What answers the prompt, rightly or not."""
    answers = stimulus.answers or {}
    return frozenset(a.strip() for name in (names.raised, names.rival) for a in answers[name])


def _partners(every: Sequence[_Asked], seed: int) -> dict[str, tuple[int, ...]]:
    """For each prompt the tokens of another one of equal length that shares no answer with it: the
    next such in a drawn order."""
    of_length: dict[int, list[_Asked]] = defaultdict(list)
    for one in every:
        of_length[len(one.ids)].append(one)
    found = {}
    for length, group in sorted(of_length.items()):
        order = np.random.default_rng((seed, length)).permutation(len(group))
        drawn = [group[index] for index in order]
        for place, one in enumerate(drawn):
            after = (*drawn[place + 1 :], *drawn[:place])
            other = next((o for o in after if not o.answers & one.answers), None)
            if other is not None:
                found[one.stimulus.id] = other.ids
    return found


def _given(one: _Asked, tokenizer: Tokenizer, vocab: int) -> tuple[int, ...]:
    """The tokens of the stimulus' own corrupted prompt."""
    ids = tokenizer.encode(one.stimulus.corrupted or "")
    where = f"stimulus {quote(one.stimulus.id)}"
    if len(ids) != len(one.ids):
        raise FindError(
            f"{where}: corrupted has {len(ids)} tokens; expected {len(one.ids)}, as its prompt has"
        )
    if ids == one.ids:
        raise FindError(f"{where}: corrupted has the very tokens of its prompt; change it")
    if max(ids) >= vocab:
        raise FindError(
            f"{where}: corrupted has token id {max(ids)}; this model takes 0 to {vocab - 1}"
        )
    return ids


def _watched(one: _Asked, names: Names, tokenizer: Tokenizer, vocab: int) -> tuple[int, int] | str:
    """The first token of each answer's first string, or why they cannot be told apart."""
    answers = one.stimulus.answers or {}
    prompt = one.stimulus.prompt or ""
    raised = following(tokenizer, prompt, answers[names.raised][0])
    rival = following(tokenizer, prompt, answers[names.rival][0])
    if raised is None or rival is None:
        return NO_JOINT
    first = raised[0], rival[0]
    if first[0] == first[1]:
        return SAME_TOKEN
    if max(first) >= vocab:
        raise FindError(
            f"stimulus {quote(one.stimulus.id)}: an answer begins with token id "
            f"{max(first)}; this model takes 0 to {vocab - 1}"
        )
    return first
