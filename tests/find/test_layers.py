"""Layers: lenses against hidden states read by hand, ablation against hooks written anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from finding import lab_of
from models import Zoo, deep
from safetensors.numpy import save_file

from surgery.errors import CheckpointError, FindError
from surgery.find.interface import Lab, Ranking
from surgery.find.journal import Journal
from surgery.find.layers import Layers
from surgery.find.prompts.rows import token_rows
from surgery.find.scores import lens as lens_module
from surgery.find.scores.lens import Training, fit, load_lens
from surgery.find.scores.readings import Read
from surgery.find.scores.stream import Stream
from surgery.stimuli import Stimulus
from surgery.stimuli.prompts import load_stimuli

Matrix = np.ndarray[Any, Any]

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"
CAPITALS = FIXTURES / "capitals-gpt2"
TUNED: dict[str, Any] = {"method": "tuned_lens", "steps": 2}


def prompts(name: str, every: int, first: int = 0) -> tuple[Stimulus, ...]:
    return load_stimuli([CAPITALS / "stimuli" / f"{name}.jsonl"])[first::every]


@pytest.fixture
def capitals(tmp_path: Path) -> Lab:
    """Six conflict prompts; the goal is more remembered capitals."""
    train = prompts("train", 80)
    return lab_of(CAPITALS, train, tmp_path / "journal", "answer_rate:remembered", 1, budget=4)


def told(ranking: Ranking, name: str) -> Matrix:
    """A column by layer."""
    layers = np.argsort(ranking.column("layer"))
    return np.array(ranking.column(name))[layers]


# ---------------------------------------------------------------- written anew


def literal_logs(lab: Lab, change: Callable[[Any, int, Any], Any] | None = None) -> Matrix:
    """Log-probabilities [prompts, states, vocab] that GPT-2's own norm and head give of its
    `hidden_states`, prompt by prompt and unpadded; `change` may make others of them."""
    model = lab.live
    found = []
    for ids in token_rows(lab, lab.train):
        with torch.no_grad():
            output = model(torch.tensor([ids]), output_hidden_states=True)
            # The last of them has the final norm behind it already.
            states = list(output.hidden_states[:-1])
            if change is not None:
                states = [change(model, layer, state) for layer, state in enumerate(states)]
            read = [model.lm_head(model.transformer.ln_f(state)) for state in states]
            logits = torch.stack([*read, output.logits])[:, 0, -1]
            found.append(logits.double().log_softmax(-1).numpy())
    return np.array(found)


def token(lab: Lab, stimulus: Stimulus, name: str) -> int:
    assert lab.tokenizer is not None
    return lab.tokenizer.encode((stimulus.answers or {})[name][0])[0]


def literal_columns(lab: Lab, logs: Matrix) -> dict[str, Matrix]:
    """What the ranking tells of each layer, from log-probabilities [prompts, states, vocab]."""
    margin, answer, rank, top, top_rank, kl, turn = ([] for _ in range(7))
    for own, stimulus in zip(logs, lab.train, strict=True):
        right, stated = (token(lab, stimulus, name) for name in ("remembered", "stated"))
        last = int(own[-1].argmax())
        margin.append(own[:, right] - own[:, stated])
        answer.append(own[:, right])
        rank.append((own > own[:, [right]]).sum(axis=1))
        top.append(own[:, last])
        top_rank.append((own > own[:, [last]]).sum(axis=1))
        kl.append((np.exp(own[-1]) * (own[-1] - own)).sum(axis=1))
        wrong = [state for state, row in enumerate(own) if row.argmax() != last]
        turn.append(max(wrong, default=-1))
    before, after = np.mean(margin, axis=0)[:-1], np.mean(margin, axis=0)[1:]
    return {
        "score": before - after,
        "before": before,
        "after": after,
        "answer": np.mean(answer, axis=0)[1:],
        "rank": np.median(rank, axis=0)[1:],
        "top": np.mean(top, axis=0)[1:],
        "top_rank": np.median(top_rank, axis=0)[1:],
        "kl": np.mean(kl, axis=0)[1:],
        # The layer after the last state whose first token is another one.
        "turns": np.array([np.mean(np.array(turn) == layer) for layer in range(4)]),
    }


def assert_told(ranking: Ranking, wanted: dict[str, Matrix]) -> None:
    assert ranking.columns == ("layer", *wanted)
    for name, numbers in wanted.items():
        np.testing.assert_allclose(told(ranking, name), numbers, rtol=1e-4, atol=1e-5)
    assert ranking.column("score") == sorted(ranking.column("score"), reverse=True)


# ---------------------------------------------------------------- the logit lens


def test_the_logit_lens_is_the_norm_and_the_head_of_every_hidden_state(capitals: Lab) -> None:
    ranking = Layers().rank(capitals)
    logs = literal_logs(capitals)
    assert_told(ranking, literal_columns(capitals, logs))
    first = ranking.facts["before_first_layer"]
    kl = (np.exp(logs[:, -1]) * (logs[:, -1] - logs[:, 0])).sum(axis=-1)
    assert first["kl"] == pytest.approx(kl.mean(), rel=1e-4)
    assert first["turned"] + told(ranking, "turns").sum() == pytest.approx(1)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gptj", "opt", "mixtral"])
def test_the_lens_of_the_last_state_is_the_model(family: str, zoo: Zoo, tmp_path: Path) -> None:
    """Whatever a family does after its final norm; and states are those of transformers."""
    lab = lab_of(zoo.checkpoint(family, **deep(family, 3)), (), tmp_path)
    stream = Stream(lab.live, lab.arch)
    ids = torch.tensor([[5, 9, 14, 33], [7, 8, 2, 60]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    states = stream.states(inputs)
    with torch.no_grad():
        output = lab.live(**inputs, output_hidden_states=True, use_cache=False)
        assert torch.allclose(stream.logits(states[-1]), output.logits, atol=1e-5)
        for own, hidden in zip(states[:-1], output.hidden_states[:-1], strict=True):
            assert torch.allclose(own, hidden, atol=1e-6)
        again = lab.live(**inputs, use_cache=False).logits
    assert torch.equal(again, output.logits), "something is left in the model"


@pytest.mark.parametrize("part", ["attn", "mlp"])
def test_parts_are_read_between_attention_and_mlp(part: str, capitals: Lab) -> None:
    """In GPT-2 that is the state after attention: what enters the second norm of the block."""
    ranking = Layers(part=part).rank(capitals)
    model, kept = capitals.live, {}
    before, between, after = [], [], []
    for ids, stimulus in zip(token_rows(capitals, capitals.train), capitals.train, strict=True):
        hooks = [
            block.ln_2.register_forward_pre_hook(
                lambda module, given, layer=layer: kept.__setitem__(layer, given[0])
            )
            for layer, block in enumerate(model.transformer.h)
        ]
        with torch.no_grad():
            output = model(torch.tensor([ids]), output_hidden_states=True)
            for hook in hooks:
                hook.remove()
            right, stated = (token(capitals, stimulus, n) for n in ("remembered", "stated"))

            def margin(state: Any, right: int = right, stated: int = stated) -> float:
                logits = model.lm_head(model.transformer.ln_f(state))[0, -1]
                return float(logits[right] - logits[stated])

            before.append([margin(state) for state in output.hidden_states[:-1]])
            between.append([margin(kept[layer]) for layer in range(4)])
            last = output.logits[0, -1]
            after.append([*before[-1][1:], float(last[right] - last[stated])])
    pair = (before, between) if part == "attn" else (between, after)
    wanted = np.mean(pair[0], axis=0) - np.mean(pair[1], axis=0)
    np.testing.assert_allclose(told(ranking, "score"), wanted, rtol=1e-4, atol=1e-5)


def test_a_prediction_turns_where_it_begins_to_stay_first() -> None:
    first = np.array([[0, 1, 0, 1], [1, 1, 1, 1], [0, 0, 0, 1]], float)
    none = np.zeros((3, 4))
    read = Read(none, none, none, none, none, none, first, none[:, :0])
    assert read.turns().tolist() == [3, 0, 3]


# ---------------------------------------------------------------- ablation


@contextmanager
def silenced(model: Any, layer: int, part: str) -> Iterator[None]:
    """GPT-2's attention, MLP or both give zeros."""
    block = model.transformer.h[layer]

    def nothing(module: Any, given: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (torch.zeros_like(output[0]), *output[1:])
        return torch.zeros_like(output)

    parts = {"attn": [block.attn], "mlp": [block.mlp], "both": [block.attn, block.mlp]}[part]
    hooks = [module.register_forward_hook(nothing) for module in parts]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("part", ["attn", "mlp", "both"])
def test_ablation_is_the_model_without_the_layer(part: str, capitals: Lab) -> None:
    ranking = Layers(method="ablation", part=part).rank(capitals)

    def margins() -> Matrix:
        logs = literal_logs(capitals)[:, -1]
        pairs = zip(logs, capitals.train, strict=True)
        names = ("remembered", "stated")
        found = [[own[token(capitals, s, name)] for name in names] for own, s in pairs]
        return np.subtract(*np.transpose(found))

    base, moved = margins(), []
    for layer in range(4):
        with silenced(capitals.live, layer, part):
            moved.append(margins() - base)
    np.testing.assert_allclose(told(ranking, "score"), np.mean(moved, axis=1), atol=1e-5)
    spread = np.std(moved, axis=1) / np.sqrt(len(base))
    np.testing.assert_allclose(told(ranking, "spread"), spread, atol=1e-5)
    assert ranking.facts["margin"] == pytest.approx(base.mean(), abs=1e-5)
    assert np.array_equal(base, margins()), "something is left in the model"


def test_what_is_lowered_is_scored_the_other_way(capitals: Lab, tmp_path: Path) -> None:
    """To lower the one answer is to raise the other."""
    raised = Layers(method="ablation").rank(capitals)
    goal = replace(capitals.goal, name="answer_rate:stated", sign=-1)
    same = replace(capitals, goal=goal, journal=Journal(tmp_path / "same"))
    assert Layers(method="ablation").rank(same).rows == raised.rows
    other = replace(same, goal=replace(goal, sign=1), journal=Journal(tmp_path / "other"))
    np.testing.assert_allclose(
        told(Layers(method="ablation").rank(other), "score"), -told(raised, "score"), atol=1e-9
    )


def test_layers_are_proposed_in_the_order_they_were_chosen(capitals: Lab) -> None:
    finder = Layers(method="ablation", part="mlp")
    ranking = finder.rank(capitals)
    layers = [int(ranking.rows[index][0]) for index in (1, 0)]
    [entry] = finder.propose(capitals, ranking, [1, 0]).entries
    assert entry == {"op": "layers", "layers": layers, "factor": 0.0, "part": "mlp"}


# ---------------------------------------------------------------- the tuned lens


def kl_of(lab: Lab, weight: Matrix | None, bias: Matrix | None) -> Matrix:
    """Mean KL(final ‖ lens) over every position of GPT-2's own hidden states, by layer."""
    model, sums, count = lab.live, np.zeros(4), 0
    for ids in token_rows(lab, lab.train):
        with torch.no_grad():
            output = model(torch.tensor([ids]), output_hidden_states=True)
            final = output.logits[0].double().log_softmax(-1)
            for layer, state in enumerate(output.hidden_states[:-1]):
                own = state if weight is None else state @ torch.from_numpy(weight[layer]).T
                own = own if bias is None else own + torch.from_numpy(bias[layer])
                logs = model.lm_head(model.transformer.ln_f(own))[0].double().log_softmax(-1)
                sums[layer] += float((final.exp() * (final - logs)).sum())
        count += len(ids)
    return sums / count


def test_training_brings_the_lens_nearer_on_text_it_has_not_seen(capitals: Lab) -> None:
    lab = replace(capitals, train=prompts("train", 6))
    lens = fit(lab, Stream(lab.live, lab.arch), training(lab, 12))
    held = replace(capitals, train=(*prompts("target", 40), *prompts("preserve", 40)))
    before, after = kl_of(held, None, None), kl_of(held, lens.weight, lens.bias)
    assert (after < 0.8 * before).all(), (before, after)


def training(lab: Lab, steps: int) -> Training:
    return Training(tuple(token_rows(lab, lab.train)), steps, 3e-3, lab.seed)


def test_a_lens_that_is_loaded_reads_as_the_one_that_was_trained(
    capitals: Lab, tmp_path: Path
) -> None:
    trained = Layers(**TUNED).rank(capitals)
    assert trained.facts["lens"] == {"prompts": 6, "steps": 2, "rate": 1e-3, "seed": 0}
    path = tmp_path / "lens.safetensors"
    kept = Layers(**TUNED).propose(capitals, trained, [0]).tensors
    save_file(dict(kept), path)
    fresh = replace(capitals, journal=Journal(tmp_path / "fresh"))
    loaded = Layers(method="tuned_lens", lens=path).rank(fresh)
    assert loaded.rows == trained.rows
    assert not loaded.arrays
    drawn = Layers(**TUNED).draw(capitals, trained, [0], np.random.default_rng(0))
    assert drawn.entries and not drawn.tensors
    weight = np.stack([kept[f"weight.{layer}"] for layer in range(4)])
    bias = np.stack([kept[f"bias.{layer}"] for layer in range(4)])

    def translate(model: Any, layer: int, state: Any) -> Any:
        return state @ torch.from_numpy(weight[layer]).T + torch.from_numpy(bias[layer])

    assert_told(loaded, literal_columns(capitals, literal_logs(capitals, translate)))


def test_a_lens_goes_on_where_its_training_stopped(
    capitals: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stop(Exception):
        pass

    def stop(what: str, done: int, of: int) -> None:
        if done:
            raise Stop

    monkeypatch.setattr(lens_module, "CHUNK", 2)
    stream, four = Stream(capitals.live, capitals.arch), training(capitals, 4)
    whole = fit(capitals, stream, four)
    journal = Journal(tmp_path / "again")
    with pytest.raises(Stop):
        fit(replace(capitals, journal=journal, progress=stop), stream, four)
    [_] = journal.folder.iterdir()
    went_on = fit(replace(capitals, journal=journal), stream, four)
    assert np.array_equal(whole.weight, went_on.weight)
    assert np.array_equal(whole.bias, went_on.bias)


def test_the_lens_is_trained_as_one_optimiser_trains_it(
    capitals: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adam's moments and step count are carried from piece to piece."""
    stream, five = Stream(capitals.live, capitals.arch), training(capitals, 5)
    whole = fit(capitals, stream, five)
    monkeypatch.setattr(lens_module, "CHUNK", 2)
    pieces = fit(replace(capitals, journal=Journal(tmp_path / "pieces")), stream, five)
    np.testing.assert_allclose(whole.weight, pieces.weight, rtol=0, atol=1e-7)


def test_a_lens_of_another_model_is_refused(capitals: Lab, tmp_path: Path) -> None:
    path = tmp_path / "lens.safetensors"
    trained = Layers(**TUNED).rank(capitals)
    tensors = {name: np.asarray(array) for name, array in trained.arrays.items()}
    save_file({**tensors, "bias.3": tensors["bias.3"][:5].copy()}, path)
    with pytest.raises(FindError, match=r"'bias.3' has shape \[5\]; expected \[128\]"):
        load_lens(path, 4, 128)
    save_file({name: array for name, array in tensors.items() if name != "bias.3"}, path)
    with pytest.raises(FindError, match="for layers 0 to 3; found 7 tensors"):
        load_lens(path, 4, 128)
    save_file({**tensors, "bias.3": np.full(128, np.nan, np.float32)}, path)
    with pytest.raises(FindError, match=r"'bias.3' holds NaN"):
        load_lens(path, 4, 128)
    path.write_bytes(b"pickle")
    with pytest.raises(CheckpointError):
        load_lens(path, 4, 128)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "part": ({"method": "tuned_lens", "part": "mlp"}, "its part is both"),
    "lens": ({"lens": Path("x")}, "a lens is for tuned_lens, not for logit_lens"),
    "steps": ({"method": "tuned_lens", "steps": 0}, "at least one step"),
    "rate": ({"method": "tuned_lens", "rate": float("inf")}, "at a rate above 0"),
}


@pytest.mark.parametrize("why", WRONG)
def test_a_search_without_meaning_is_refused(why: str, capitals: Lab) -> None:
    options, said = WRONG[why]
    with pytest.raises(FindError, match=said):
        Layers(**options).rank(capitals)


def test_a_model_without_a_final_norm_has_no_lens(zoo: Zoo, tmp_path: Path) -> None:
    lab = lab_of(zoo.checkpoint("opt-unbiased"), (), tmp_path)
    with pytest.raises(FindError, match="has no final norm"):
        Stream(lab.live, lab.arch)
