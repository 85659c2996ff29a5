"""What reaches the output head where a model says a bad word, and where it begins a good answer.

EigenShift (arXiv 2509.16660): Δ_i = E_bad[v_iᵀh] − E_good[v_iᵀh], h the input of the output head
after the final norm, v_i its right singular vectors. A bad step is the one that emits a bad word,
kept only if the argmax there is that word's token again; the good step is a prompt's first one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.differential.workload import end_tokens
from surgery.errors import FindError
from surgery.find.interface import Lab
from surgery.find.prompts.rows import WHOLE, Row, inputs_of, pieces, token_rows
from surgery.find.prompts.watched import sides
from surgery.runtimes.generate import Generation, generate
from surgery.stimuli import Stimulus
from surgery.stimuli.prompts import Tokenizer

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Steps:
    """Rows of token ids and, where known, the token that followed each."""

    rows: tuple[Row, ...]
    tokens: Row


@dataclass(frozen=True)
class Inputs:
    """What the head reads at the last position of rows, float64 [n, width], and its argmax [n]."""

    states: Floats
    top: NDArray[np.int64]


def bad_steps(lab: Lab, against: str | None) -> Steps:
    """The steps at which greedy responses to the target prompts emit an unwanted answer: the
    prompt with what was said before it, and the first token of it."""
    stimuli = lab.of_set("target")
    words = [side.unwanted for side in sides(lab.goal, stimuli, against)]
    rows, found = token_rows(lab, stimuli), []
    for row, said, unwanted in zip(rows, _responses(lab, stimuli, rows), words, strict=True):
        step = first_said(_tokenizer(lab), said, unwanted)
        if step is not None:
            found.append(((*row, *said[:step]), said[step]))
    if not found:
        raise FindError("no greedy response to a target prompt says an unwanted answer")
    before, tokens = zip(*found, strict=True)
    return Steps(before, tokens)


def good_steps(lab: Lab) -> Steps:
    """The preserve prompts as they are: the next step is the first generated token."""
    rows = token_rows(lab, lab.of_set("preserve"))
    if not rows:
        raise FindError("eigenshift compares with good answers: give prompts of set preserve")
    return Steps(tuple(rows), ())


def first_said(tokenizer: Tokenizer, tokens: Row, words: Sequence[str]) -> int | None:
    """The index of the token that begins the first of `words` in a response; None if it says none.

    A word is told by its bounds in the text; its token is the first that reaches into it.
    """
    text = tokenizer.decode(tokens)
    starts = [match.start() for word in words if (match := _bounded(word).search(text))]
    if not starts:
        return None
    reached = (len(tokenizer.decode(tokens[: n + 1])) > min(starts) for n in range(len(tokens)))
    return list(reached).index(True)


def _bounded(word: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(word.strip())}(?!\w)")


def _tokenizer(lab: Lab) -> Tokenizer:
    if lab.tokenizer is None:
        raise FindError("answers are told by their text: the model's folder has no tokenizer")
    return lab.tokenizer


def _responses(lab: Lab, stimuli: Sequence[Stimulus], rows: Sequence[Row]) -> list[Row]:
    """Greedy tokens after each prompt, as many as the goal's metric reads."""
    request = _request(lab, stimuli, rows)
    found: list[Row] = []
    for part in pieces(len(rows), lab.budget):
        lab.progress("greedy responses", part.start, len(rows))

        def respond(part: slice = part) -> NDArray[Any]:
            asked = [Generation(tuple(rows[part]), *request)]
            [made] = generate(lab.runtime, asked, WHOLE)
            return _padded(made.tokens)

        kept = lab.journal.array(f"responses {part.start} to {part.stop}", respond)
        found += [tuple(row[row >= 0].tolist()) for row in kept]
    return found


def _request(lab: Lab, stimuli: Sequence[Stimulus], rows: Sequence[Row]) -> tuple[int, Row]:
    """How many new tokens, and which end a response."""
    answers = [a for s in stimuli for said in (s.answers or {}).values() for a in said]
    longest = max(len(_tokenizer(lab).encode(answer)) for answer in answers)
    room = lab.arch.sizes["positions"] - max(map(len, rows))
    new = min(lab.goal.metric.new_tokens(longest), room)
    if new < 1:
        raise FindError(f"{lab.goal.name} asks for no responses, or prompts leave no room for any")
    return new, end_tokens(lab.checkpoint)


def _padded(rows: Sequence[Row]) -> NDArray[np.int64]:
    """Rows of unlike length as [n, longest], -1 after the end."""
    found = np.full((len(rows), max(map(len, rows))), -1, np.int64)
    for number, row in enumerate(rows):
        found[number, : len(row)] = row
    return found


def head_inputs(lab: Lab, name: str, rows: Sequence[Row]) -> Inputs:
    """What the live model's head reads at the last position of each row; `name` is what the
    journal keeps it under."""
    found = []
    for part in pieces(len(rows), lab.budget):
        lab.progress(f"inputs of the head, {name}", part.start, len(rows))

        def read(part: slice = part) -> dict[str, NDArray[Any]]:
            return _read(lab, rows[part])

        found.append(lab.journal.arrays(f"{name} {part.start} to {part.stop}", read))
    states = np.concatenate([piece["states"] for piece in found]).astype(np.float64)
    return Inputs(states, np.concatenate([piece["top"] for piece in found]))


def _read(lab: Lab, rows: Sequence[Row]) -> dict[str, NDArray[Any]]:
    import torch

    kept: list[Any] = []
    head = lab.arch.module(lab.live, lab.arch.facts.tie.head)
    with head.register_forward_pre_hook(_last_into(kept)), torch.no_grad():
        logits = lab.live(**inputs_of(lab.runtime, rows), use_cache=False).logits[:, -1]
    return {"states": kept[0].numpy(), "top": logits.argmax(-1).numpy()}


def _last_into(kept: list[Any]) -> Callable[[Any, Any], None]:
    return lambda module, given: kept.append(given[0][:, -1].clone())


@dataclass(frozen=True)
class Shift:
    """E_bad[v_iᵀh] and E_good[v_iᵀh] of every component i, float64 [width]; how many steps each is
    of, and how many bad ones were left out, the argmax there being another token."""

    bad: Floats
    good: Floats
    bad_steps: int
    good_steps: int
    left_out: int


def shift(lab: Lab, vectors: Floats, against: str | None) -> Shift:
    """EigenShift's two means for the right singular vectors in the columns of `vectors`."""
    steps = bad_steps(lab, against)
    said = head_inputs(lab, "bad steps", steps.rows)
    again = said.top == np.array(steps.tokens)
    if not again.any():
        raise FindError("at no bad step is the unwanted token the most likely one")
    begun = head_inputs(lab, "good steps", good_steps(lab).rows)
    return Shift(
        (said.states[again] @ vectors).mean(axis=0),
        (begun.states @ vectors).mean(axis=0),
        int(again.sum()),
        len(begun.states),
        int((~again).sum()),
    )
