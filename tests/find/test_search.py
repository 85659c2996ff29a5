"""A search takes what serves best, holds it against chance, and goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import numpy as np
import pytest

from surgery import api
from surgery.cli import main
from surgery.errors import FindError, InputError, OutputError
from surgery.find import FINDERS
from surgery.find import opening as opening_module
from surgery.find import search as search_module
from surgery.find import trials as trials_module
from surgery.find.interface import Finder, Lab, Proposal, Ranking
from surgery.find.result import Change, Control, Found
from surgery.plan import plan

MODEL = Path(__file__).resolve().parents[2] / "fixtures" / "capitals-gpt2"
LAYER_0 = (2, 0, 3, 1)
"""Heads of the first layer, those first whose removal makes the model remember more."""


@dataclass(frozen=True, kw_only=True)
class Given(Finder):
    """Ranks heads in a given order; one piece of work for each in the journal."""

    kind: ClassVar[str] = "given"
    methods: ClassVar[tuple[str, ...]] = ("order",)
    sizes: ClassVar[tuple[int, ...]] = (1, 2)

    method: str = "order"
    stop: int = 99
    done: ClassVar[list[int]] = []

    def rank(self, lab: Lab) -> Ranking:
        for number in range(3):
            if number == self.stop:
                raise KeyboardInterrupt
            lab.journal.array(f"piece {number}", lambda number=number: self._piece(number))
        rows = [(0, head, 4 - place) for place, head in enumerate(LAYER_0)]
        rows += [(layer, head, 0) for layer in (2, 3) for head in range(4)]
        return Ranking(("layer", "head", "score"), tuple(rows))

    def _piece(self, number: int) -> Any:
        self.done.append(number)
        return np.array(number)

    def propose(self, lab: Lab, ranking: Ranking, chosen: Sequence[int]) -> Proposal:
        rows = [ranking.rows[index] for index in chosen]
        heads = [f"L{layer:.0f}H{head:.0f}" for layer, head, _ in rows]
        return Proposal(({"op": "heads", "heads": heads, "factor": 0.0},))


@dataclass(frozen=True)
class Case:
    """Few prompts of the fixture, and a place for what is found."""

    root: Path

    def find(self, **options: Any) -> Found:
        given = {"train": [self.root / "train.jsonl"], "holdout": [self.root / "holdout.jsonl"]}
        return api.find("given", MODEL, self.root / "r.yaml", **{**given, **options})

    def files(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted(self.root.glob("r.*"))}


@pytest.fixture
def case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Case:
    def some(name: str, every: int) -> str:
        lines = (MODEL / "stimuli" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        return "\n".join(lines[::every]) + "\n"

    (tmp_path / "train.jsonl").write_text(some("train", 12))
    (tmp_path / "holdout.jsonl").write_text(some("target", 9) + some("preserve", 20))
    monkeypatch.setenv("SURGERY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(search_module, "DRAWS", 4)
    monkeypatch.setattr(Given, "done", [])
    monkeypatch.setitem(FINDERS._members, "given", f"{__name__}:Given")
    return Case(tmp_path)


def test_the_best_number_is_taken_and_the_effect_is_beyond_chance(case: Case) -> None:
    found = case.find(raised="answer_rate:remembered")
    assert [trial.size for trial in found.trials] == [1, 2]
    best = max(found.trials, key=lambda trial: (trial.change, trial.logprob or 0.0))
    assert len(found.chosen) == best.size
    assert found.above_chance and found.effect.change > 0.3
    assert found.effect.low <= found.effect.change <= found.effect.high
    assert [cost.metric for cost in found.costs] == ["kl", "nll", "answer_rate:remembered"]
    report = json.loads((case.root / "r.json").read_text())
    assert report["held_out"]["change"] == found.effect.change
    assert report["random"]["draws"] == 4 == len(report["random"]["changes"])


def test_what_is_written_is_a_recipe_that_applies_and_every_candidate(case: Case) -> None:
    found = case.find(top=1)
    applied = plan(case.root / "r.yaml", MODEL)
    assert applied.recipe.text.startswith("# Found by surgery")
    assert [edit.op for edit in applied.edits] == ["heads"]
    rows = (case.root / "r.csv").read_text().splitlines()
    assert rows[0] == "layer,head,score" and rows[1] == "0,2,4"
    assert len(rows) == 1 + len(found.ranking.rows)


def test_random_edits_leave_out_what_was_chosen_and_follow_the_seed(case: Case) -> None:
    drawn: list[list[str]] = []
    propose = Given.propose

    def watch(self: Given, lab: Lab, ranking: Ranking, chosen: Sequence[int]) -> Proposal:
        proposal = propose(self, lab, ranking, chosen)
        drawn.append(proposal.entries[0]["heads"])
        return proposal

    with patch.object(Given, "propose", watch):
        case.find(top=2)
        once, drawn[:] = drawn[:], []
        case.find(top=2)
        assert drawn == once
        drawn[:] = []
        case.find(top=2, seed=1)
    assert once[0] == ["L0H2", "L0H0"] and len(once) == 5
    assert all(len(heads) == 2 and not set(heads) & set(once[0]) for heads in once[1:])
    assert drawn[1:] != once[1:]


def test_the_same_search_writes_the_same_bytes(case: Case) -> None:
    case.find(top=1)
    first = case.files()
    case.find(top=1)
    assert set(first) == {"r.yaml", "r.csv", "r.json"} and case.files() == first


def test_an_interrupted_search_goes_on_where_it_stopped(case: Case) -> None:
    calls: list[str] = []
    real, observe = opening_module.open_lab, trials_module.observe

    def counted(*args: Any) -> Any:
        calls.append("ran")
        return observe(*args)

    with patch.object(trials_module, "observe", counted):
        case.find(top=1)
    whole, all_calls = case.files(), len(calls)
    for path in case.root.glob("r.*"):
        path.unlink()
    Given.done[:], calls[:] = [], []

    def stopping(*args: Any) -> Any:
        lab, prompts = real(*args)

        def progress(stage: str, done: int, total: int) -> None:
            if stage == "random edits" and done == 2:
                raise KeyboardInterrupt

        return replace(lab, progress=progress), prompts

    with patch("surgery.find.run.open_lab", stopping), pytest.raises(KeyboardInterrupt):
        case.find(top=1)
    assert Given.done == [0, 1, 2] and not case.files()
    with patch.object(trials_module, "observe", counted):
        case.find(top=1)
    assert Given.done == [0, 1, 2], "what was scored is not scored again"
    assert len(calls) < all_calls, "nor is what was measured measured again"
    assert case.files() == whole
    assert not list((case.root / "cache" / "find").iterdir())


def test_other_prompts_begin_anew(case: Case) -> None:
    with pytest.raises(KeyboardInterrupt):
        case.find(top=1, stop=2)
    assert Given.done == [0, 1]
    lines = (case.root / "train.jsonl").read_text().splitlines()[1:]
    (case.root / "train.jsonl").write_text("\n".join(lines))
    case.find(top=1)
    assert Given.done == [0, 1, 0, 1, 2]


def test_what_does_nothing_is_no_better_than_chance(case: Case) -> None:
    found = case.find(top=1, lowered="answer_rate:remembered")
    assert not found.above_chance and "does not move as wanted" in found.why_not
    heading = (case.root / "r.yaml").read_text().splitlines()[2]
    assert heading.startswith("# No better than chance")


def test_without_a_goal_the_first_named_answers_are_to_be_given_more_often(case: Case) -> None:
    assert case.find(top=1).effect.metric == "answer_rate:remembered"


def refused(case: Case, error: type[InputError], words: str, **options: Any) -> None:
    """A search that ends in one line and leaves nothing."""
    before = {path.name for path in case.root.iterdir()}
    with pytest.raises(error, match=words):
        case.find(**options)
    assert {path.name for path in case.root.iterdir()} - {"cache"} == before - {"cache"}


def test_prompts_that_were_trained_on_are_no_holdout(case: Case) -> None:
    held = case.root / "train.jsonl"
    refused(case, FindError, "training stimulus", holdout=[held])


def test_too_few_prompts_choose_no_number(case: Case) -> None:
    few = case.root / "few.jsonl"
    few.write_text("\n".join((case.root / "train.jsonl").read_text().splitlines()[:20]))
    refused(case, FindError, "or --top", train=[few])


def test_more_than_there_are_cannot_be_taken(case: Case) -> None:
    refused(case, FindError, "--top 13: 12 given can be", top=13)


def test_a_goal_that_says_nothing_about_the_prompts_is_refused(case: Case) -> None:
    refused(case, FindError, "says nothing", raised="answer_rate:nobody")
    refused(case, InputError, "unknown metric", raised="nonsense")
    refused(case, InputError, "leave one out", raised="nll", lowered="nll")


def test_files_of_others_and_checkpoints_are_not_written_over(case: Case) -> None:
    (case.root / "r.csv").write_text("mine")
    refused(case, OutputError, "not of an earlier search", top=1)
    with pytest.raises(OutputError):
        api.find(
            "given",
            MODEL,
            MODEL / "r.yaml",
            train=[case.root / "train.jsonl"],
            holdout=[case.root / "holdout.jsonl"],
        )
    assert not (MODEL / "r.yaml").exists()


@pytest.mark.parametrize(
    ("holdout", "more", "code", "words"),
    [
        ("holdout", (), 0, "ABOVE CHANCE"),
        ("few", (), 1, "NO BETTER: the 95 % interval"),
        ("holdout", ("--top", "17"), 2, "16 heads can be proposed"),
        ("holdout", ("--method", "all"), 2, "'all' is not one of"),
    ],
)
def test_the_command_exits_by_what_it_found(
    case: Case,
    holdout: str,
    more: tuple[str, ...],
    code: int,
    words: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    few = (case.root / "holdout.jsonl").read_text().splitlines()[:5]
    (case.root / "few.jsonl").write_text("\n".join(few))
    prompts = ("--train", case.root / "train.jsonl", "--holdout", case.root / f"{holdout}.jsonl")
    output = ("--top", "1", "--output", case.root / "r.yaml", *more)
    words_given = ["surgery", "find", "heads", "--model", MODEL, *prompts, *output]
    with patch("sys.argv", list(map(str, words_given))), pytest.raises(SystemExit) as ended:
        main()
    said = capfd.readouterr()
    assert ended.value.code == code and words in said.out + said.err
    assert (case.root / "r.yaml").exists() == (code < 2)


def outcome(change: float, low: float, high: float, draws: Sequence[float], sign: int = 1) -> Found:
    effect = Change("m", "target", "share", 20, 0.5, 0.5 + change, change, low, high)
    nothing = Proposal(())
    ranking = Ranking(("layer", "score"), ())
    return Found("k", "m", sign, 0, ranking, (), nothing, (), effect, Control(tuple(draws)), ())


NAN = float("nan")


@pytest.mark.parametrize(
    ("found", "why"),
    [
        (outcome(0.4, 0.2, 0.6, [0.0] * 20), ""),
        (outcome(-0.4, -0.6, -0.2, [0.0] * 20, sign=-1), ""),
        (outcome(0.4, 0.2, 0.6, [0.0] * 18 + [0.5] * 2), "random draws"),
        (outcome(-0.4, -0.6, -0.2, [0.0] * 18 + [-0.5] * 2, sign=-1), "random draws"),
        (outcome(0.4, -0.1, 0.6, [0.0] * 20), "holds no change"),
        (outcome(-0.4, -0.6, 0.1, [0.0] * 20, sign=-1), "holds no change"),
        (outcome(0.4, NAN, NAN, [0.0] * 20), "8 or more"),
        (outcome(0.0, -0.1, 0.1, [-0.1] * 20), "as wanted"),
        (outcome(NAN, NAN, NAN, [0.0] * 20), "nothing was measured"),
        (outcome(0.4, 0.2, 0.6, [NAN] * 20), "nothing was measured"),
    ],
)
def test_better_than_chance_is_beyond_the_draws_and_beyond_its_own_doubt(
    found: Found, why: str
) -> None:
    assert found.above_chance == (not why) and why in found.why_not
