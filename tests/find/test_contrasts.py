"""Which prompts can be contrasted, which tokens are watched, and who is whose corrupted twin."""

from __future__ import annotations

import string
from typing import Any

import pytest
from tokenizers import Regex
from tokenizers import Tokenizer as Fast
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split

from surgery.errors import FindError, StimuliError
from surgery.find.interface import Goal
from surgery.find.prompts.contrasts import Names, Pairs, answer_names, contrast_pairs
from surgery.find.prompts.questions import contrasts
from surgery.metrics import make_metric
from surgery.stimuli import Stimulus
from surgery.stimuli.prompts import Tokenizer

NAMES = Names("memory", "context")
VOCAB = [" ", ":", *string.ascii_letters, "首", "東", "北", *(f" {a}" for a in "ABCDL")]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A token for each letter, but one for a space and the capital after it."""
    fast = Fast(WordLevel({text: n for n, text in enumerate(VOCAB)}))
    fast.pre_tokenizer = Split(Regex(" [A-Z]|."), "isolated")
    folder = tmp_path_factory.mktemp("tokenizer")
    fast.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder)


def ask(id: str, prompt: str, memory: str, context: str, **more: Any) -> Stimulus:
    return Stimulus(
        id, "target", prompt, answers={"memory": (memory,), "context": (context,)}, **more
    )


def pairs_of(tokenizer: Tokenizer | None, *stimuli: Stimulus, seed: int = 0) -> Pairs:
    return contrast_pairs(stimuli, NAMES, tokenizer, len(VOCAB), positions=20, seed=seed)


@pytest.mark.parametrize(
    ("prompt", "memory", "context", "watched"),
    [
        ("q:", "Lima", "Bonn", [" L", " B"]),
        ("q:", " Lima", " Bonn", [" L", " B"]),
        ("q: ", "lima", "bonn", ["l", "b"]),
        ("首:", "東", "北", ["東", "北"]),
    ],
)
def test_the_watched_token_is_the_one_that_follows_the_prompt(
    tokenizer: Tokenizer, prompt: str, memory: str, context: str, watched: list[str]
) -> None:
    """With the space before it in it; alone after a prompt that ends with one, or in a script
    that has none."""
    stimulus = ask("a", prompt, memory, context, corrupted="x" * len(prompt))
    [pair] = pairs_of(tokenizer, stimulus).pairs
    assert [VOCAB[token] for token in pair.tokens] == watched
    assert "".join(VOCAB[token] for token in pair.clean) == prompt
    assert "".join(VOCAB[token] for token in pair.corrupted) == stimulus.corrupted


def test_a_prompt_that_says_nothing_is_left_out_and_counted(tokenizer: Tokenizer) -> None:
    good = ask("good", "q:", "Lima", "Bonn", corrupted="p:")
    silent = {
        contrasts.SAME_TOKEN: ask("same", "q:", "Lima", "Lome", corrupted="p:"),
        contrasts.NO_JOINT: ask("joint", "q: ", "Lima", "Bonn", corrupted="p: "),
        contrasts.NO_PARTNER: ask("alone", "qqqq:", "Lima", "Bonn"),
        contrasts.NO_TEXT: Stimulus("ids", "target", None, (1, 2), good.answers),
        contrasts.NO_ANSWERS: Stimulus("plain", "target", "q:", answers={"memory": ("Lima",)}),
    }
    found = pairs_of(tokenizer, good, *silent.values())
    assert [pair.id for pair in found.pairs] == ["good"]
    assert found.left_out == dict.fromkeys(silent, 1)
    with pytest.raises(FindError) as caught:
        pairs_of(tokenizer, *silent.values())
    assert all(reason in str(caught.value) for reason in silent)


def test_a_drawn_partner_is_as_long_and_answered_otherwise(tokenizer: Tokenizer) -> None:
    capitals = ("Lima", "Bonn", "Cairo", "Dakar", "Amman")
    stimuli = [
        ask(f"{length}{place}{other}", "q" * length + ":", capitals[place], capitals[other])
        for length in (2, 3)
        for place in range(5)
        for other in range(5)
        if place != other
    ]
    marked = [
        Stimulus(s.id, "target", f"{string.ascii_letters[n]}{s.prompt}", answers=s.answers)
        for n, s in enumerate(stimuli)
    ]
    found = pairs_of(tokenizer, *marked)
    of_ids = {tokenizer.encode(s.prompt or ""): s for s in marked}
    assert len(found.pairs) == found.drawn == len(marked)
    for pair, own in zip(found.pairs, marked, strict=True):
        partner = of_ids[pair.corrupted]
        assert len(pair.corrupted) == len(pair.clean)
        shared = [set((s.answers or {}).values()) for s in (own, partner)]
        assert not shared[0] & shared[1]
    assert pairs_of(tokenizer, *marked) == found
    assert pairs_of(tokenizer, *marked, seed=1) != found


def test_a_corrupted_prompt_must_fit_its_prompt(tokenizer: Tokenizer) -> None:
    with pytest.raises(FindError, match="stimulus 'a': corrupted has 3 tokens; expected 2"):
        pairs_of(tokenizer, ask("a", "q:", "Lima", "Bonn", corrupted="qq:"))
    with pytest.raises(FindError, match="stimulus 'a': corrupted has the very tokens"):
        pairs_of(tokenizer, ask("a", "q:", "Lima", "Bonn", corrupted="q:"))


def test_tokens_that_the_model_does_not_have_are_refused(tokenizer: Tokenizer) -> None:
    """The tokenizer knows more than a model of few tokens."""

    def few(stimulus: Stimulus, vocab: int) -> None:
        contrast_pairs([stimulus], NAMES, tokenizer, vocab, positions=20, seed=0)

    stimulus = ask("a", ":a", "b c", "Bonn", corrupted=":z")
    with pytest.raises(StimuliError, match="token id 2 is out of range"):
        few(stimulus, 2)
    with pytest.raises(FindError, match="an answer begins with token id"):
        few(stimulus, 20)
    with pytest.raises(FindError, match="corrupted has token id"):
        few(ask("a", ":a ", "b", "c", corrupted=":z "), 6)
    with pytest.raises(StimuliError, match="has 21 tokens"):
        few(ask("a", "q" * 21, "Lima", "Bonn"), 100)
    with pytest.raises(FindError, match=r"need a tokenizer\.json"):
        pairs_of(None, stimulus)


# ---------------------------------------------------------------------------------------- names


def goal(name: str, sign: int = 1) -> Goal:
    return Goal(name, make_metric(name), sign)


def named(*names: str) -> Stimulus:
    return Stimulus(",".join(names), "target", "q", answers=dict.fromkeys(names, ("x",)))


def test_the_goal_names_one_answer_and_the_prompts_the_other() -> None:
    both = [named("memory", "context"), named("memory"), named("other", "third")]
    assert answer_names(both, goal("answer_rate:memory"), None) == Names("memory", "context")
    assert answer_names(both, goal("answer_rate:memory", -1), None) == Names("context", "memory")


def test_of_several_rivals_one_must_be_named() -> None:
    three = [named("memory", "context", "other")]
    with pytest.raises(FindError, match="found 'context', 'other'; name it with against"):
        answer_names(three, goal("answer_rate:memory"), None)
    assert answer_names(three, goal("answer_rate:memory"), "other") == Names("memory", "other")


@pytest.mark.parametrize(
    ("metric", "against", "message"),
    [
        ("answer_rate:memroy", None, "they have 'context', 'memory'"),
        ("line_pass_rate:fr", None, "they have 'context', 'memory'"),
        ("nll", None, "they have 'context', 'memory'"),
        ("answer_rate:memory", "memory", "no such other answer; they have 'context'"),
        ("answer_rate:memory", "contxt", "no such other answer; they have 'context'"),
    ],
)
def test_names_that_no_prompt_has_are_refused_with_those_there_are(
    metric: str, against: str | None, message: str
) -> None:
    with pytest.raises(FindError, match=message):
        answer_names([named("memory", "context")], goal(metric), against)


def test_without_a_rival_there_is_nothing_to_contrast() -> None:
    with pytest.raises(FindError, match="found none"):
        answer_names([named("memory")], goal("answer_rate:memory"), None)
