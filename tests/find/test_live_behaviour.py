"""A live model's behaviour is measured as the report measures it: the very numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from here import in_this_process

from surgery import api
from surgery.arch import identify
from surgery.checkpoint import Checkpoint
from surgery.differential import Limits, Workload, make_workload
from surgery.differential.compare import compare
from surgery.differential.corners import Ran
from surgery.differential.measures import Measure
from surgery.differential.workload import end_tokens
from surgery.errors import FindError
from surgery.evidence import EDITS, Evidence
from surgery.export import find_task
from surgery.find.behaviour import ask, changes, observe
from surgery.metrics import make_metric
from surgery.policy import TargetRule, load_policy
from surgery.runtimes.child import Job, Outcome, default_threads, run
from surgery.runtimes.generate import GROUP
from surgery.runtimes.interface import ModelRef
from surgery.runtimes.pytorch import TorchRuntime
from surgery.stimuli.prompts import load_stimuli

FIXTURE = Path(__file__).resolve().parents[2] / "fixtures" / "capitals-gpt2"
TASK = find_task("causal-lm")
MORE = (
    TargetRule(metric="answer_logprob:remembered", min_change=0.0),
    TargetRule(metric="exact_match:stated", max_change=0.0),
    TargetRule(metric="nll", set="preserve", max_change=1.0),
    TargetRule(metric="perplexity", set="preserve", max_change=1.0),
    TargetRule(metric="kl", set="preserve", max_change=1.0),
)


@dataclass(frozen=True)
class Case:
    """The original and the edited model, what the differential asks them, and what it finds."""

    models: tuple[Path, Path]
    workload: Workload
    evidence: Evidence

    def ask(self, measures: Sequence[Measure] | None = None) -> Workload:
        own = self.workload
        return ask(
            own.tokenizer,
            own.stimuli,
            own.measures if measures is None else measures,
            vocab=own.vocab,
            positions=own.space.positions,
            eos=end_tokens(Checkpoint.open(FIXTURE)),
        )

    def runtimes(self) -> list[TorchRuntime]:
        threads = default_threads()
        return [TorchRuntime(ModelRef("torch", path, TASK.name), threads) for path in self.models]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Every twelfth prompt of the fixture, `remember.yaml`, its policy and more rules."""
    root = tmp_path_factory.mktemp("behaviour")
    api.apply(FIXTURE / "remember.yaml", FIXTURE, root / "edited")
    base = Checkpoint.open(FIXTURE)
    files = [FIXTURE / "stimuli" / f"{name}.jsonl" for name in ("target", "preserve")]
    policy = load_policy(FIXTURE / "remember.policy.yaml")
    policy = policy.model_copy(update={"target": (*policy.target, *MORE)})
    stimuli = load_stimuli(files)[::12]
    workload = make_workload(base, identify(base), TASK, stimuli, policy)
    prompts = tuple(b for b in workload.batches if b.stimulus_set != "probe")
    workload = replace(workload, batches=prompts)
    models = (FIXTURE, root / "edited")
    pairs = zip(EDITS["T"], models, strict=True)
    ran = {name: _ran(root / name, own, workload) for name, own in pairs}
    return Case(models, workload, compare(Ran(ran, {}), workload, TASK))


def _ran(folder: Path, model: Path, workload: Workload) -> Outcome:
    """A corner in PyTorch, as the differential runs it, but in this process."""
    folder.mkdir()
    job = Job(
        ModelRef("torch", model, TASK.name),
        folder,
        workload.batches,
        generations=workload.generations,
        continuations=tuple(answer.tokens for answer in workload.answers),
    )
    with in_this_process():
        return run(job, Limits())


def test_effects_and_intervals_are_those_of_the_differential_to_the_bit(case: Case) -> None:
    asked = case.ask()
    original, edited = case.runtimes()
    before = observe(original, asked, group=GROUP)
    after = observe(edited, asked, before, group=GROUP)
    found = changes(before, after)
    assert [own.effect() for own in found] == list(case.evidence.effects)
    names = {(effect.metric, effect.stimulus_set) for effect in case.evidence.effects}
    theirs = [i for i in case.evidence.intervals if (i.quantity, i.stimulus_set) in names]
    ours = [i for own in found for c in case.workload.confidences for i in own.intervals(c)]
    # `kl` is a quantity of every run besides, of sums that are rounded otherwise.
    assert {i for i in ours if i.quantity != "kl"} == {i for i in theirs if i.quantity != "kl"}
    assert {rule.metric for rule in MORE} <= {i.quantity for i in ours}
    [own, same] = (
        {i.confidence: (i.estimate, i.low, i.high) for i in rows if i.quantity == "kl"}
        for rows in (ours, theirs)
    )
    assert own == {confidence: pytest.approx(found) for confidence, found in same.items()}


def test_the_edit_of_the_fixture_does_what_its_policy_asks(case: Case) -> None:
    own = {(e.metric, e.stimulus_set): e.change("T") for e in case.evidence.effects}
    assert own["answer_rate:remembered", "target"] >= 0.4
    assert own["answer_logprob:remembered", "target"] > 0.5
    assert 0 < own["kl", "preserve"] < 0.02
    nll = own["nll", "preserve"]
    assert own["perplexity", "preserve"] == pytest.approx(math.expm1(nll))


def test_larger_groups_write_the_same_responses(case: Case) -> None:
    [runtime, _] = case.runtimes()
    asked = case.ask([m for m in case.workload.measures if m.metric.needs == "responses"])
    assert not asked.batches, "no logits are needed"
    one, other = (observe(runtime, asked, group=size) for size in (GROUP, 50))
    assert [own.total for own in one.scores] == [own.total for own in other.scores]


def test_the_original_is_no_distance_from_itself(case: Case) -> None:
    [runtime, _] = case.runtimes()
    asked = case.ask([Measure("kl", "preserve", make_metric("kl"))])
    before = observe(runtime, asked)
    assert before.scores[0].total == 0
    [found] = changes(before, observe(runtime, asked, before))
    assert found.effect().change("T") == 0
    assert [(i.low, i.high) for i in found.intervals(0.95)] == [(0, 0)]


def test_what_has_nothing_to_measure_is_refused(case: Case) -> None:
    [runtime, _] = case.runtimes()
    asked = case.ask([Measure("answer_rate:x", "target", make_metric("answer_rate:x"))])
    with pytest.raises(FindError, match="answer_rate:x has nothing to measure on the target set"):
        observe(runtime, asked)


@pytest.mark.parametrize("name", ["nll", "answer_rate:remembered", "answer_logprob:remembered"])
def test_a_model_that_gives_no_numbers_has_no_behaviour(case: Case, name: str) -> None:
    [runtime, _] = case.runtimes()
    runtime.live.lm_head.weight.data[7] = float("nan")
    asked = case.ask([Measure(name, "target", make_metric(name))])
    with pytest.raises(FindError, match="not finite"):
        observe(runtime, asked)
