"""Directions are differences of means over prompts that are run one by one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from finding import lab_of, planted
from models import Zoo, deep
from oracles import load_model, logits

from surgery.arch import identify
from surgery.checkpoint import Checkpoint
from surgery.errors import FindError
from surgery.find import direction
from surgery.find.direction import Direction
from surgery.stimuli import Stimulus

BLOCKS = {"gpt2": "transformer.h.{}", "llama": "model.layers.{}", "gptj": "transformer.h.{}"}
LAYERS = 3


def stimuli(seed: int = 0) -> list[Stimulus]:
    rng = np.random.default_rng(seed)
    lengths = (3, 7, 5, 1, 6, 4, 2, 7)
    return [
        Stimulus(
            f"s{n}",
            ("target", "preserve", "probe", "target")[n % 4],
            input_ids=tuple(int(i) for i in rng.integers(3, 101, length)),
        )
        for n, length in enumerate(lengths)
    ]


def literal_streams(path: Path, family: str, position: str) -> dict[str, Any]:
    """[prompts, layers, width] of each set: one prompt at a time, no padding, hooks on blocks."""
    model = load_model(path)
    found: dict[str, list[Any]] = {}
    for stimulus in stimuli():
        kept: list[Any] = []
        handles = [
            model.get_submodule(BLOCKS[family].format(n)).register_forward_hook(
                lambda m, i, o, kept=kept: kept.append(o[0] if isinstance(o, tuple) else o)
            )
            for n in range(LAYERS)
        ]
        with torch.no_grad():
            model(input_ids=torch.tensor([stimulus.input_ids]))
        for handle in handles:
            handle.remove()
        tokens = [value[0].numpy().astype(np.float64) for value in kept]
        own = [x[-1] if position == "last" else x.mean(0) for x in tokens]
        found.setdefault(stimulus.set, []).append(own)
    return {name: np.array(own) for name, own in found.items()}


def literal_direction(first: Any, second: Any, orthogonalize: bool) -> Any:
    r = np.mean(first, axis=0) - np.mean(second, axis=0)
    if orthogonalize:
        unit = np.mean(second, axis=0) / np.linalg.norm(np.mean(second, axis=0))
        r = r - np.dot(r, unit) * unit
    return r / np.linalg.norm(r)


@pytest.mark.parametrize("family", BLOCKS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"position": "mean"},
        {"orthogonalize": True},
        {"to_set": "preserve", "from_set": "target", "position": "mean", "orthogonalize": True},
    ],
)
def test_directions_are_those_of_prompts_run_one_by_one(
    family: str, options: dict[str, Any], zoo: Zoo, tmp_path: Path
) -> None:
    path = zoo.checkpoint(family, **deep(family, LAYERS))
    finder = Direction(**options)
    ranking = finder.rank(lab_of(path, stimuli(), tmp_path / "journal"))
    streams = literal_streams(path, family, finder.position)
    first, second = streams[finder.to_set], streams[finder.from_set]
    for row in ranking.rows:
        layer = int(row[0])
        r = literal_direction(first[:, layer], second[:, layer], finder.orthogonalize)
        np.testing.assert_allclose(ranking.arrays["directions"][layer], r, atol=1e-5)
        along = [x[:, layer] @ r for x in (first, second)]
        within = np.sqrt((np.var(along[0], ddof=1) + np.var(along[1], ddof=1)) / 2)
        apart = (np.mean(along[0]) - np.mean(along[1])) / within
        named = dict(zip(ranking.columns, row, strict=True))
        np.testing.assert_allclose(named["separation"], apart, rtol=1e-3)
        np.testing.assert_allclose(named["to_set"], np.mean(along[0]), atol=1e-4)
        np.testing.assert_allclose(named["from_set"], np.mean(along[1]), atol=1e-4)
        assert named["score"] == named["separation"]
    assert ranking.column("score") == sorted(ranking.column("score"), reverse=True)


def test_a_direction_against_the_neutral_mean_leaves_it(zoo: Zoo, tmp_path: Path) -> None:
    path = zoo.checkpoint("gpt2", **deep("gpt2", LAYERS))
    ranking = Direction(orthogonalize=True).rank(lab_of(path, stimuli(), tmp_path / "journal"))
    neutral = literal_streams(path, "gpt2", "last")["preserve"].mean(0)
    along = (ranking.arrays["directions"] * neutral).sum(1) / np.linalg.norm(neutral, axis=1)
    assert np.abs(along).max() < 1e-5


def test_a_proposal_takes_that_layers_direction_out_of_the_model(zoo: Zoo, tmp_path: Path) -> None:
    path = zoo.checkpoint("gpt2", **deep("gpt2", LAYERS))
    lab = lab_of(path, stimuli(), tmp_path / "journal")
    finder = Direction()
    ranking = finder.rank(lab)
    proposal = finder.propose(lab, ranking, [1])
    r = ranking.arrays["directions"][int(ranking.column("layer")[1])]
    kept: list[Any] = []
    with (
        planted(lab, proposal, tmp_path / "recipe"),
        lab.live.transformer.ln_f.register_forward_pre_hook(lambda m, i: kept.append(i[0])),
    ):
        logits(lab.live)
    along = [float((x.double() @ torch.from_numpy(r)).abs().max()) for x in kept]
    assert max(along) < 1e-5
    assert dict(proposal.entries[0])["vector"] == {"file": lab.tensors, "key": "direction"}
    assert proposal.untie is lab.arch.tied is True


def test_random_directions_are_unit_unlike_each_other_and_the_seeds(
    zoo: Zoo, tmp_path: Path
) -> None:
    lab = lab_of(zoo.checkpoint("gpt2"), stimuli(), tmp_path / "journal")
    finder = Direction()
    ranking = finder.rank(lab)

    def drawn(seed: int) -> Any:
        proposal = finder.draw(lab, ranking, [0], np.random.default_rng(seed))
        assert proposal.entries == finder.propose(lab, ranking, [0]).entries
        return proposal.tensors["direction"].astype(np.float64)

    assert (drawn(1) == drawn(1)).all()
    vectors = np.array([drawn(seed) for seed in range(300)])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-6)
    # Of 32 coordinates each has mean 0 and variance 1/32 whatever the direction.
    assert np.abs(vectors.mean(0)).max() < 0.05
    np.testing.assert_allclose(vectors.var(0), 1 / 32, rtol=0.4)


def test_a_search_goes_on_where_it_stopped(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = lab_of(zoo.checkpoint("gpt2"), stimuli(), tmp_path / "journal", budget=2)
    first = Direction().rank(lab)
    monkeypatch.setattr(direction, "streams", lambda *given: pytest.fail("run again"))
    again = Direction().rank(lab)
    assert again.rows == first.rows
    assert (again.arrays["directions"] == first.arrays["directions"]).all()


@pytest.mark.parametrize(
    ("family", "options", "said"),
    [
        ("gemma2", {}, "direction is not exact on gemma2"),
        ("bloom", {}, "direction is not exact on bloom"),
        ("gpt2", {"position": "first"}, "position is 'first'; expected last or mean"),
        (
            "gpt2",
            {"to_set": "preserve"},
            "to_set is 'preserve' and from_set 'preserve'; expected two",
        ),
        ("gpt2", {"to_set": "all"}, "expected two of target, preserve, probe"),
        ("gpt2", {"method": "ablation"}, "no training prompt of set target has an answer"),
    ],
)
def test_what_cannot_be_found_is_said(
    family: str, options: dict[str, Any], said: str, zoo: Zoo, tmp_path: Path
) -> None:
    lab = lab_of(zoo.checkpoint(family), stimuli(), tmp_path / "journal")
    with pytest.raises(FindError, match=said):
        Direction(**options).rank(lab)


def test_what_norms_rescale_can_be_asked_for(zoo: Zoo, tmp_path: Path) -> None:
    lab = lab_of(zoo.checkpoint("gemma2"), stimuli(), tmp_path / "journal")
    finder = Direction(approximate=True)
    [entry] = finder.propose(lab, finder.rank(lab), [0]).entries
    assert entry["approximate"] is True


def test_an_encoder_is_refused(zoo: Zoo, tmp_path: Path) -> None:
    lab = lab_of(zoo.checkpoint("gpt2"), stimuli(), tmp_path / "journal")
    bert = replace(lab, arch=identify(Checkpoint.open(zoo.checkpoint("bert"))))
    with pytest.raises(FindError, match="find direction needs a decoder; bert is an"):
        Direction().rank(bert)


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        ({"target": [(5, 6)], "preserve": [(7, 8), (9, 10)]}, "needs two prompts each"),
        ({"target": [(5, 6)] * 2, "preserve": [(5, 6)] * 2}, "have the same mean after block"),
        ({"target": [(5, 6)] * 2, "preserve": [(7, 8)] * 2}, "are all alike where --position"),
        ({"target": [(5, 6), (6, 7)]}, "hold none of set preserve"),
    ],
)
def test_prompts_that_give_no_direction_are_refused(
    prompts: dict[str, Any], said: str, zoo: Zoo, tmp_path: Path
) -> None:
    train = [
        Stimulus(f"{name}-{n}", name, input_ids=ids)
        for name, own in prompts.items()
        for n, ids in enumerate(own)
    ]
    lab = lab_of(zoo.checkpoint("gpt2"), train, tmp_path / "journal")
    with pytest.raises(FindError, match=said):
        Direction().rank(lab)
