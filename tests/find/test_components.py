"""Components against decompositions of whole matrices, literal loops and finite differences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from finding import lab_of, planted
from models import Zoo, deep
from recipes import plan_of

from surgery.edits.lm_head_spectrum import spectrum
from surgery.errors import EditError, FindError
from surgery.find import components
from surgery.find.components import Components
from surgery.find.interface import Lab
from surgery.find.prompts.watched import Sides, Watched, sides, watch
from surgery.find.scores import head_input
from surgery.find.scores.circuits import readings, spectra
from surgery.find.scores.component_effects import removal_effects
from surgery.find.scores.head_input import Shift, first_said, shift
from surgery.find.scores.weights import StoredReader
from surgery.stimuli import Stimulus
from surgery.stimuli.prompts import Tokenizer, load_stimuli

Matrix = np.ndarray[Any, Any]

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"
CAPITALS = FIXTURES / "capitals-gpt2"
ROTARY = "turns queries and keys by their positions"


def prompts(*names: str, every: int = 1) -> tuple[Stimulus, ...]:
    files = [CAPITALS / "stimuli" / f"{name}.jsonl" for name in names]
    return tuple(s for file in files for s in load_stimuli([file])[::every])


@pytest.fixture(scope="module")
def capitals(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """Every thirtieth conflict and plain prompt; the goal is fewer stated capitals."""
    train = prompts("train", "preserve", every=30)
    journal = tmp_path_factory.mktemp("capitals") / "journal"
    return lab_of(CAPITALS, train, journal, "answer_rate:stated", -1, budget=4)


# ---------------------------------------------------------------- the output head


def literal_shift(lab: Lab, rows: list[tuple[Stimulus, str | None]]) -> Matrix:
    """E[v_iᵀh] prompt by prompt, without padding, from the whole SVD of the head. With a word, h
    is taken at the step whose argmax is the word's first token, the response so far added."""
    from transformers import AutoTokenizer, GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(CAPITALS).eval()
    tokenizer = AutoTokenizer.from_pretrained(CAPITALS)
    _, _, vt = np.linalg.svd(model.lm_head.weight.detach().double().numpy())
    for row in vt:
        row *= np.sign(row[np.abs(row).argmax()])
    found = []
    for stimulus, word in rows:
        ids = tokenizer(stimulus.prompt, return_tensors="pt")["input_ids"]
        first = None if word is None else tokenizer(word)["input_ids"][0]
        for _ in range(1 if word is None else 4):
            with torch.no_grad():
                # After the final norm: this is what lm_head multiplies.
                h = model.transformer(ids).last_hidden_state[0, -1]
                top = int(model.lm_head(h).argmax())
            if first is None or top == first:
                found.append(vt @ h.double().numpy())
                break
            ids = torch.cat([ids, torch.tensor([[top]])], dim=1)
    return np.array(found)


def test_the_shift_is_that_of_a_literal_loop_and_a_whole_decomposition(capitals: Lab) -> None:
    _, vectors = spectrum(StoredReader(capitals.checkpoint), "lm_head.weight", 128)
    found = shift(capitals, vectors, None)
    bad = literal_shift(
        capitals, [(s, (s.answers or {})["stated"][0]) for s in capitals.of_set("target")]
    )
    good = literal_shift(capitals, [(s, None) for s in capitals.of_set("preserve")])
    assert 3 < found.bad_steps == len(bad) < len(capitals.of_set("target"))
    assert found.good_steps == len(good)
    assert found.left_out == 0
    size = np.abs(found.bad).max()
    np.testing.assert_allclose(found.bad, bad.mean(axis=0), rtol=0, atol=1e-5 * size)
    np.testing.assert_allclose(found.good, good.mean(axis=0), rtol=0, atol=1e-5 * size)


def test_components_of_the_head_come_by_their_shift(capitals: Lab) -> None:
    signed, absolute = (Components(absolute=choice).rank(capitals) for choice in (False, True))
    for ranking in (signed, absolute):
        assert ranking.columns == ("component", "score", "bad", "good", "sigma")
        assert ranking.column("score") == sorted(ranking.column("score"), reverse=True)
        assert sorted(ranking.column("component")) == list(range(128))
    delta = np.subtract(signed.column("bad"), signed.column("good"))
    np.testing.assert_allclose(signed.column("score"), delta)
    assert sorted(absolute.column("score")) == sorted(np.abs(delta).tolist())
    proposal = Components().propose(capitals, signed, [0, 5])
    components = [int(signed.rows[index][0]) for index in (0, 5)]
    [entry] = proposal.entries
    assert entry == {"op": "lm_head_spectrum", "components": components, "factor": 0.1}
    assert not proposal.untie


def test_a_file_of_scores_names_what_is_proposed(capitals: Lab, tmp_path: Path) -> None:
    """Addresses are integers, as a recipe that takes the best of a file reads them."""
    ranking = Components().rank(capitals)
    lines = [ranking.columns, *ranking.rows]
    (tmp_path / "scores.csv").write_text("\n".join(",".join(map(str, line)) for line in lines))
    entry = {"op": "lm_head_spectrum", "file": "scores.csv", "top": 3, "factor": 0.1}
    [edit] = plan_of(tmp_path, CAPITALS, [entry]).edits
    [proposed] = Components().propose(capitals, ranking, [0, 1, 2]).entries
    assert list(edit.components) == proposed["components"]


def test_a_tied_head_is_that_of_the_embedding_and_is_untied(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = lab_of(zoo.checkpoint("qwen3"), (), tmp_path / "journal")
    moved = Shift(np.arange(32.0), np.zeros(32), 1, 1, 0)
    monkeypatch.setattr(components, "shift", lambda lab, vectors, bad: moved)
    ranking = Components().rank(lab)
    embedding = lab.live.model.embed_tokens.weight.detach().double().numpy()
    sigma = np.linalg.svd(embedding, compute_uv=False)
    np.testing.assert_allclose(ranking.column("sigma"), sigma[::-1], rtol=1e-6)
    proposal = Components().propose(lab, ranking, [0])
    assert proposal.untie
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        before = lab.live(ids).logits
        with planted(lab, proposal, tmp_path):
            assert not torch.allclose(lab.live(ids).logits, before, atol=1e-3)


def test_a_step_that_is_not_reproduced_is_left_out(
    capitals: Lab, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of two steps, one is made to name a token that is not the most likely there."""
    whole = head_input.bad_steps(capitals, None)
    wrong = head_input.Steps(whole.rows[:2], (whole.tokens[0], whole.tokens[1] + 1))
    monkeypatch.setattr(head_input, "bad_steps", lambda lab, bad: wrong)
    fresh = replace(capitals, journal=type(capitals.journal)(tmp_path / "fresh"))
    found = shift(fresh, np.eye(128), None)
    assert (found.bad_steps, found.left_out) == (1, 1)
    right = replace(wrong, rows=whole.rows[:1], tokens=whole.tokens[:1])
    monkeypatch.setattr(head_input, "bad_steps", lambda lab, bad: right)
    fresh = replace(capitals, journal=type(capitals.journal)(tmp_path / "other"))
    alone = shift(fresh, np.eye(128), None)
    np.testing.assert_allclose(found.bad, alone.bad, atol=1e-5)


def test_the_step_is_the_first_token_of_the_first_word() -> None:
    tokenizer = Tokenizer(FIXTURES / "polyglot-llama")
    text = "Die Stadt Theben, The capital"
    tokens = tokenizer.encode(text)
    step = first_said(tokenizer, tokens, ["capital", "The"])
    assert step is not None
    assert text.startswith(tokenizer.decode(tokens[:step]).rstrip())
    assert tokenizer.decode(tokens[step:]).lstrip().startswith("The capital")
    assert first_said(tokenizer, tokens, ["Thebes", "cap"]) is None


# ---------------------------------------------------------------- what heads write


def dense(model: Any, family: str, layer: int, head: int) -> dict[str, Matrix]:
    """W_Q, W_K, W_V [width, head_dim] and W_O [head_dim, width] of a live model's head."""

    def own(weight: Any, index: int, size: int) -> Matrix:
        """Rows of a Linear's weight, transposed."""
        return np.asarray(weight.detach().double().numpy()[index * size : (index + 1) * size].T)

    if family == "gpt2":
        attention = model.transformer.h[layer].attn
        fused = attention.c_attn.weight.detach().double().numpy().reshape(32, 3, 4, 8)
        out = attention.c_proj.weight.detach().double().numpy()[8 * head : 8 * head + 8]
        return {**dict(zip("qkv", fused[:, :, head].transpose(1, 0, 2), strict=True)), "o": out}
    layers = model.model.decoder.layers if family == "opt" else model.model.layers
    attention = layers[layer].self_attn
    output = attention.out_proj if family == "opt" else attention.o_proj
    group = head if family == "opt" else head // 2
    return {
        "q": own(attention.q_proj.weight, head, 8),
        "k": own(attention.k_proj.weight, group, 8),
        "v": own(attention.v_proj.weight, group, 8),
        "o": own(output.weight.T, head, 8).T,
    }


COMPOSED: dict[str, Callable[[dict[str, Matrix], Matrix], Matrix]] = {
    "q": lambda later, ov: ov @ (later["q"] @ later["k"].T),
    "k": lambda later, ov: (later["q"] @ later["k"].T) @ ov.T,
    "v": lambda later, ov: ov @ (later["v"] @ later["o"]),
}
NORM: dict[str, Callable[[dict[str, Matrix]], Matrix]] = {
    "q": lambda later: later["q"] @ later["k"].T,
    "k": lambda later: later["q"] @ later["k"].T,
    "v": lambda later: later["v"] @ later["o"],
}


@pytest.mark.parametrize(("family", "ways"), [("gpt2", "qkv"), ("opt", "qkv"), ("llama", "v")])
def test_composition_is_that_of_whole_matrices(
    family: str, ways: str, zoo: Zoo, tmp_path: Path
) -> None:
    lab = lab_of(zoo.checkpoint(family, **deep(family, 2)), (), tmp_path)
    sender = spectra(lab.arch, lab.checkpoint, 0, False)
    found = readings(lab.arch, lab.checkpoint, sender, 1, ways, False)
    for head, to, (way, name) in product(range(4), range(4), enumerate(ways)):
        first, later = dense(lab.live, family, 0, head), dense(lab.live, family, 1, to)
        ov = first["v"] @ first["o"]
        u, s, vt = np.linalg.svd(ov)
        norm = np.linalg.norm(NORM[name](later))
        whole = np.linalg.norm(COMPOSED[name](later, ov)) / (np.linalg.norm(ov) * norm)
        assert found.wholes[way, head, to] == pytest.approx(whole, rel=1e-9)
        for i in range(8):
            part = s[i] * np.outer(u[:, i], vt[i])
            wanted = np.linalg.norm(COMPOSED[name](later, part)) / (s[i] * norm)
            assert found.parts[way, head, i, to] == pytest.approx(wanted, rel=1e-9)


def test_the_ranking_tells_the_strongest_reader_of_each_component(zoo: Zoo, tmp_path: Path) -> None:
    lab = lab_of(zoo.checkpoint("gpt2", **deep("gpt2", 3)), (), tmp_path)
    ranking = Components(method="composition", on="head").rank(lab)
    assert len(ranking.rows) == 2 * 4 * 8
    assert ranking.column("score") == sorted(ranking.column("score"), reverse=True)
    for row in ranking.rows[::7]:
        told = dict(zip(ranking.columns, row, strict=True))
        layer, head, component = (int(told[name]) for name in ("layer", "head", "component"))
        sender = spectra(lab.arch, lab.checkpoint, layer, False)
        every = {
            to: readings(lab.arch, lab.checkpoint, sender, to, "qkv", False)
            for to in range(layer + 1, 3)
        }
        assert told["score"] == max(own.parts[:, head, component].max() for own in every.values())
        place = int(told["way"]), head, component, int(told["to_head"])
        reader = every[int(told["to_layer"])]
        assert reader.parts[place] == told["score"]
        assert reader.wholes[place[0], head, place[3]] == told["whole"]
    pairs = [pair["composition"] for pair in ranking.facts["strongest"]]
    assert pairs == sorted(pairs, reverse=True)
    assert len(pairs) == 20


def test_queries_and_keys_that_are_turned_do_not_compose(zoo: Zoo, tmp_path: Path) -> None:
    lab = lab_of(zoo.checkpoint("llama"), (), tmp_path)
    ranking = Components(method="composition", on="head").rank(lab)
    assert set(ranking.column("way")) == {0.0}
    assert ranking.facts["ways"] == ["v"]
    assert ROTARY in ranking.facts["left_out"]
    with pytest.raises(EditError, match=ROTARY):
        Components(method="composition", on="head", way="q").rank(lab)


@pytest.mark.parametrize("fold", [False, True])
def test_singular_values_are_those_of_whole_matrices(fold: bool, zoo: Zoo, tmp_path: Path) -> None:
    lab = lab_of(zoo.checkpoint("gpt2"), (), tmp_path)
    ranking = Components(method="singular", on="head", fold_norm=fold).rank(lab)
    wanted = {}
    for layer, head in product(range(2), range(4)):
        own = dense(lab.live, "gpt2", layer, head)
        values = own["v"]
        if fold:
            scale = lab.live.transformer.h[layer].ln_1.weight.detach().double().numpy()
            values = scale[:, None] * values
            values = values - values.mean(axis=0)
        s = np.linalg.svd(values @ own["o"], compute_uv=False)[:8]
        for i in range(8):
            wanted[layer, head, i] = (s[i], s[i] ** 2 / (s**2).sum())
    found = {tuple(map(int, row[:3])): row[3:] for row in ranking.rows}
    assert found.keys() == wanted.keys()
    for place, numbers in wanted.items():
        assert found[place] == pytest.approx(numbers, rel=1e-6)
    assert ranking.column("score") == sorted(ranking.column("score"), reverse=True)


def watched_rows() -> Watched:
    return Watched(((5, 7, 9, 11, 3), (4, 8, 6)), ((21,), (30, 31)), ((40, 41), ()), left_out=0)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "gptj"])
def test_an_effect_is_the_slope_of_taking_the_component_out(
    family: str, zoo: Zoo, tmp_path: Path
) -> None:
    """The reference: one head's slice of the live model's `o_proj` loses a thousandth of its part
    along v_i, in float64, and the margin is read from the logits by hand, without padding."""
    lab = lab_of(zoo.checkpoint(family), (), tmp_path)
    watched = watched_rows()
    found = [spectra(lab.arch, lab.checkpoint, layer, False) for layer in range(2)]
    effects = removal_effects(lab, watched, found)
    model = lab.live.double()
    base = literal_margins(model, watched)
    size = lab.arch.sizes["head_dim"]
    for layer, head, i in [(0, 0, 0), (0, 3, 2), (1, 2, 0), (1, 3, 5)]:
        weight = lab.arch.module(model, "o_proj", layer).weight
        v = torch.from_numpy(found[layer].right[head][:, i])
        before = weight.detach().clone()
        own = slice(head * size, (head + 1) * size)
        with torch.no_grad():
            if family == "gpt2":
                weight[own] -= 1e-4 * torch.outer(before[own] @ v, v)
            else:
                weight[:, own] -= 1e-4 * torch.outer(v, v @ before[:, own])
        slope = (literal_margins(model, watched) - base) / 1e-4
        with torch.no_grad():
            weight.copy_(before)
        np.testing.assert_allclose(
            effects[:, layer, head, i], slope, rtol=0.01, atol=1e-3 * np.abs(effects).max()
        )


def literal_margins(model: Any, watched: Watched) -> Matrix:
    found = []
    for row, wanted, unwanted in zip(watched.rows, watched.wanted, watched.unwanted, strict=True):
        with torch.no_grad():
            p = model(torch.tensor([row]), use_cache=False).logits[0, -1].softmax(-1)
        margin = p[list(wanted)].sum().log()
        found.append(float(margin - (p[list(unwanted)].sum().log() if unwanted else 0)))
    return np.array(found)


def test_components_of_heads_are_proposed_head_by_head(zoo: Zoo, tmp_path: Path) -> None:
    lab = lab_of(zoo.checkpoint("gpt2"), (), tmp_path)
    finder = Components(method="singular", on="head", factor=0.5, fold_norm=True)
    ranking = finder.rank(lab)
    places = {tuple(map(int, row[:3])): index for index, row in enumerate(ranking.rows)}
    chosen = [places[1, 2, 5], places[0, 3, 1], places[1, 2, 0]]
    shared = {"op": "head_spectrum", "circuit": "ov", "factor": 0.5, "fold_norm": True}
    assert list(finder.propose(lab, ranking, chosen).entries) == [
        {**shared, "heads": ["L1H2"], "components": [5, 0]},
        {**shared, "heads": ["L0H3"], "components": [1]},
    ]


def test_components_without_a_direction_of_their_own_are_no_candidates(
    zoo: Zoo, tmp_path: Path
) -> None:
    """A head whose W_O reads two dimensions alone has six components of singular value 0."""
    from safetensors.numpy import load_file, save_file

    source = zoo.checkpoint("gpt2")
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "model.safetensors")
    tensors["transformer.h.0.attn.c_proj.weight"][2:8] = 0
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ranking = Components(method="singular", on="head").rank(lab_of(tmp_path, (), tmp_path / "j"))
    own = [row[2] for row in ranking.rows if row[:2] == (0.0, 0.0)]
    assert own == [0.0, 1.0]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "method": ({"method": "effect"}, "on lm_head are found by eigenshift; not by effect"),
    "place": ({"on": "head"}, "on head are found by singular, composition, effect; not by eigen"),
    "answers": ({"against": "rude"}, "no prompt of set target has answers called 'rude'"),
}


@pytest.mark.parametrize("why", WRONG)
def test_a_search_without_meaning_is_refused(why: str, capitals: Lab) -> None:
    options, said = WRONG[why]
    with pytest.raises(FindError, match=said):
        Components(**options).rank(capitals)


def test_an_encoder_has_no_next_token(zoo: Zoo, tmp_path: Path) -> None:
    from surgery.arch import identify
    from surgery.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(zoo.checkpoint("bert"))
    lab = lab_of(zoo.checkpoint("gpt2"), (), tmp_path)
    encoder = replace(lab, checkpoint=checkpoint, arch=identify(checkpoint))
    with pytest.raises(FindError, match="needs a decoder; bert is an encoder"):
        Components().rank(encoder)


def test_eigenshift_needs_good_prompts(capitals: Lab, tmp_path: Path) -> None:
    bad = tuple(capitals.of_set("target"))
    lab = replace(capitals, train=bad, journal=type(capitals.journal)(tmp_path))
    with pytest.raises(FindError, match="give prompts of set preserve"):
        Components().rank(lab)


# ---------------------------------------------------------------- what is watched


def test_the_tokens_watched_open_the_answers(capitals: Lab) -> None:
    tokenizer = capitals.tokenizer
    assert tokenizer is not None
    watched = watch(capitals, None)
    stimuli = capitals.of_set("target")
    assert len(watched.rows) + watched.left_out == len(stimuli)
    for stimulus, wanted, unwanted in zip(stimuli, watched.wanted, watched.unwanted, strict=True):
        answers = stimulus.answers or {}
        assert wanted == tokenizer.encode(answers["remembered"][0])[:1]
        assert unwanted == tokenizer.encode(answers["stated"][0])[:1]
    turned = watch(replace(capitals, goal=replace(capitals.goal, sign=1)), None)
    assert (turned.wanted, turned.unwanted) == (watched.unwanted, watched.wanted)


def test_the_answers_opposed_to_the_goal_can_be_named(capitals: Lab) -> None:
    """Whichever way the goal goes; of a goal that names no answers they are the unwanted ones."""
    [first, *_] = capitals.of_set("target")
    answers = {"stated": ("Lima",), "remembered": ("Oslo",), "third": ("Quito",)}
    stimuli = [replace(first, answers=answers)]
    lower, rise = capitals.goal, replace(capitals.goal, sign=1)
    assert sides(lower, stimuli, None) == [Sides(("Oslo", "Quito"), ("Lima",))]
    assert sides(lower, stimuli, "third") == [Sides(("Quito",), ("Lima",))]
    assert sides(rise, stimuli, "third") == [Sides(("Lima",), ("Quito",))]
    for sign in (1, -1):
        bare = replace(capitals.goal, name="line_pass_rate:en", sign=sign)
        assert sides(bare, stimuli, "third") == [Sides((), ("Quito",))]
        with pytest.raises(FindError, match="name it with against"):
            sides(bare, stimuli, None)
    with pytest.raises(FindError, match="the answers that the goal is named after"):
        sides(lower, stimuli, "stated")


def test_prompts_whose_answers_open_alike_are_left_out(capitals: Lab, tmp_path: Path) -> None:
    [first, second, *_] = capitals.of_set("target")
    answers = {"remembered": ("San Marino",), "stated": ("San Jose",)}
    alike = replace(first, answers=answers)
    lab = replace(capitals, train=(alike, second))
    watched = watch(lab, None)
    assert (len(watched.rows), watched.left_out) == (1, 1)
    with pytest.raises(FindError, match="has an answer told by its first token"):
        watch(replace(capitals, train=(alike,)), None)
