"""The scoring prompts of a search for neurons: what a model said up to its confusion points."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.differential.workload import end_tokens
from surgery.errors import FindError
from surgery.find.interface import Lab
from surgery.find.prompts.confusion import Judge, find_slip
from surgery.find.prompts.rows import Row, token_rows
from surgery.metrics.languages import ANSWER
from surgery.runtimes.generate import GROUP, Generation, generate
from surgery.stimuli import Stimulus

NOTHING = -1
"""In place of the tokens that a response has not."""


@dataclass(frozen=True)
class Points:
    """The prompts to score neurons at, token ids up to the confusion point, and how they came."""

    prompts: tuple[Row, ...]
    facts: dict[str, Any]


def confusion_points(lab: Lab, new_tokens: int, languages: Sequence[str]) -> Points:
    """Of the target prompts, of which `answers.language` says what they may be answered in.

    `languages` are those the detector chooses among, English with them; by default those of the
    answers. Raises `FindError` where no such prompt is there or no response slips into English.
    """
    stimuli = tuple(s for s in lab.of_set("target") if s.answers and ANSWER in s.answers)
    if not stimuli or lab.tokenizer is None:
        raise FindError(
            "confusion points need a tokenizer.json and target prompts with answers.language; "
            "without them use method auroc"
        )
    accepted = [_accepted(stimulus) for stimulus in stimuli]
    judge = Judge(languages or {code for codes in accepted for code in codes})
    prompts, slips, generated = [], 0, 0
    for (prompt, response), codes in zip(
        _responses(lab, stimuli, new_tokens), accepted, strict=True
    ):
        generated += len(response)
        slip = find_slip(response, lab.tokenizer.decode, codes, judge)
        slips += slip is not None
        if slip is not None and slip.point is not None:
            prompts.append((*prompt, *response[: slip.point]))
    if not prompts:
        raise FindError(
            f"none of {len(stimuli)} target prompts is answered in English against its "
            f"answers.language ({judge.name}), so there is no confusion to find neurons of"
        )
    facts = {
        "detector": judge.name,
        "prompts": len(stimuli),
        "new_tokens": new_tokens,
        "generated_tokens": generated,
        "confused": slips,
        "confusion_points": len(prompts),
    }
    return Points(tuple(prompts), facts)


def _accepted(stimulus: Stimulus) -> tuple[str, ...]:
    return (stimulus.answers or {})[ANSWER]


def _responses(lab: Lab, stimuli: Sequence[Stimulus], new_tokens: int) -> Iterator[tuple[Row, Row]]:
    """Each stimulus's prompt and greedy response."""
    prompts = token_rows(lab, stimuli)
    for start in range(0, len(prompts), GROUP):
        lab.progress("responses", start, len(prompts))
        group = tuple(prompts[start : start + GROUP])
        room = min(new_tokens, lab.arch.sizes["positions"] - max(map(len, group)))
        kept = lab.journal.array(f"responses {start}", partial(_respond, lab, group, room))
        for prompt, row in zip(group, kept, strict=True):
            yield prompt, tuple(row[row != NOTHING].tolist())


def _respond(lab: Lab, prompts: tuple[Row, ...], most: int) -> NDArray[np.int64]:
    """Greedy responses of at most so many tokens, [prompts, most], filled up with `NOTHING`."""
    [made] = generate(lab.runtime, [Generation(prompts, most, end_tokens(lab.checkpoint))])
    rows = np.full((len(prompts), most), NOTHING)
    for row, response in zip(rows, made.tokens, strict=True):
        row[: len(response)] = response
    return rows
