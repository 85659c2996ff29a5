"""An answer's tokens follow its prompt as one text, and every corner is asked for them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from surgery.arch import identify
from surgery.checkpoint import Checkpoint
from surgery.differential import make_workload
from surgery.differential.answers import forced_answers, logprobs_of
from surgery.differential.measures import Measure, responders_of
from surgery.differential.rounds import needed, only
from surgery.differential.workload import Workload
from surgery.errors import StimuliError
from surgery.export import find_task
from surgery.metrics import make_metric
from surgery.policy import BUILT_IN, Policy, TargetRule
from surgery.runtimes.child import Outcome
from surgery.stimuli import Stimulus
from surgery.stimuli.prompts import Tokenizer

FIXTURE = Path(__file__).resolve().parents[2] / "fixtures" / "capitals-gpt2"
PROMPT = "Q: What is the capital of Peru? A:"
RULE = TargetRule(metric="answer_logprob:right", min_change=0.0)
POLICY = Policy(schema=1, target=(RULE,))
MEASURES = (Measure(RULE.metric, "target", make_metric(RULE.metric)),)


def stimulus(name: str = "a", **given: object) -> Stimulus:
    own = {"prompt": PROMPT, "answers": {"right": ("Lima", "Quito"), "other": ("Oslo",)}, **given}
    return Stimulus(name, "target", **own)  # type: ignore[arg-type]


def workload(*stimuli: Stimulus, policy: Policy = POLICY) -> Workload:
    base = Checkpoint.open(FIXTURE)
    return make_workload(base, identify(base), find_task("causal-lm"), stimuli, policy)


def test_prompt_and_answer_are_tokens_of_one_text() -> None:
    tokenizer = Tokenizer(FIXTURE)
    own = workload(stimulus(), stimulus("b", answers={"right": ("Lima",)}), stimulus("c"))
    asked = [(answer.stimulus, answer.answer) for answer in own.answers]
    assert asked == [("a", "Lima"), ("a", "Quito"), ("b", "Lima"), ("c", "Lima"), ("c", "Quito")]
    for answer in own.answers:
        tokens = answer.tokens
        assert tokens.prompt == tokenizer.encode(PROMPT)
        assert (*tokens.prompt, *tokens.following) == tokenizer.encode(f"{PROMPT} {answer.answer}")
        assert tokenizer.decode(tokens.following).strip() == answer.answer


def test_a_prompt_of_token_ids_is_followed_by_the_answer_alone() -> None:
    tokenizer = Tokenizer(FIXTURE)
    ids = tokenizer.encode(PROMPT)
    [one, *_] = workload(stimulus(prompt=None, input_ids=ids)).answers
    assert one.tokens.prompt == ids
    assert one.tokens.following == tokenizer.encode(" Lima")


def test_without_a_metric_that_asks_no_answer_is_run() -> None:
    assert workload(stimulus(), policy=BUILT_IN).answers == ()


def test_an_answer_without_room_is_refused() -> None:
    long = stimulus(input_ids=(5,) * 64, prompt=None)
    with pytest.raises(StimuliError, match=r"stimulus 'a', answer 'Lima': has 6\d tokens"):
        forced_answers([long], MEASURES, {"a": (5,) * 64}, Tokenizer(FIXTURE), 64)


def test_a_prompt_without_room_for_a_response_is_refused() -> None:
    """Else its response would be empty, and without a bad word."""
    measure = Measure("word_rate:bad", "target", make_metric("word_rate:bad"))
    full = {"a": (5,) * 64}
    with pytest.raises(StimuliError, match="fills the 64 positions of this model"):
        responders_of([stimulus()], [measure], full, None, 64)
    assert responders_of([stimulus()], [measure], {"a": (5,) * 60}, None, 64) == {4: ("a",)}


def test_responses_to_token_ids_alone_still_need_a_tokenizer() -> None:
    rule = TargetRule(metric="word_rate:bad", max_change=0.0)
    bare = Stimulus("a", "target", input_ids=(5, 6))
    own = workload(bare, policy=Policy(schema=1, target=(rule,)))
    assert own.tokenizer is not None and own.responders == (("a",),)


def test_log_probabilities_come_back_by_stimulus_and_answer() -> None:
    own = workload(stimulus(), stimulus("b"))
    rows = [(-1.0,), (-2.0, -3.0), (-4.0,), (-5.0,)]
    found = logprobs_of(own.answers, rows)
    assert found == {
        "a": {"Lima": (-1.0,), "Quito": (-2.0, -3.0)},
        "b": {"Lima": (-4.0,), "Quito": (-5.0,)},
    }
    with pytest.raises(ValueError, match="shorter"):
        logprobs_of(own.answers, rows[:3])


def test_a_later_round_adds_its_answers() -> None:
    rounds = []
    for continuations in ([], [[-1.0]]):
        result = {"batches": [], "generations": [], "continuations": continuations, "busy": 1.0}
        rounds.append(Outcome("ok", "", 1.0, 1, 1, Path(), result=result))
    first, second = rounds
    assert first.then(second).continuations() == ((-1.0,),)


def test_what_rules_need_still_runs_once_a_fault_is_certain() -> None:
    own = workload(stimulus(), replace(stimulus("b"), set="preserve"))
    look = own.batches_only(own.batches[:1])
    assert (look.answers, look.generations, look.measures) == ((), (), ())
    kept = needed(own, look, POLICY, "why")
    assert {answer.stimulus for answer in kept.answers} == {"a"}
    assert only(own, own.batches[0].name).answers == ()
