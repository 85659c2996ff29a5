"""The fixtures are what their READMEs say, measured in plain transformers."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from surgery import api
from surgery.metrics.answer_rate import starts_with

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
CAPITALS = FIXTURES / "capitals-gpt2"
POLYGLOTS = (FIXTURES / "polyglot-llama", FIXTURES / "polyglot-llama-tuned")
NAMES = ["capitals-gpt2", "polyglot-llama", "polyglot-llama-tuned"]


def stimuli(fixture: Path, name: str) -> list[dict[str, Any]]:
    text = (fixture / "stimuli" / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def answer(folder: Path, prompts: Iterable[str], new_tokens: int) -> list[str]:
    """Greedy continuations by transformers' own `generate`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    batch = tokenizer(list(prompts), return_tensors="pt", padding=True)
    with torch.no_grad():
        made = model.generate(**batch, max_new_tokens=new_tokens, do_sample=False)
    start = batch["input_ids"].shape[1]
    return [str(text) for text in tokenizer.batch_decode(made[:, start:], skip_special_tokens=True)]


def rate(folder: Path, lines: list[dict[str, Any]], name: str) -> float:
    told = answer(folder, [line["prompt"] for line in lines], 5)
    pairs = zip(told, lines, strict=True)
    return sum(starts_with(text, tuple(line["answers"][name])) for text, line in pairs) / len(lines)


@pytest.mark.parametrize("name", NAMES)
def test_a_fixture_is_at_most_8_mb_with_tokenizer_stimuli_and_readme(name: str) -> None:
    folder = FIXTURES / name
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 8_000_000
    for file in ("README.md", "tokenizer.json", "stimuli/target.jsonl", "stimuli/preserve.jsonl"):
        assert (folder / file).is_file()


def test_capitals_knows_its_capitals_and_is_torn_under_conflict() -> None:
    plain, conflict = stimuli(CAPITALS, "preserve"), stimuli(CAPITALS, "target")
    assert len(plain) >= 100
    assert rate(CAPITALS, plain, "remembered") >= 0.95
    for name in ("remembered", "stated"):
        assert 0.30 <= rate(CAPITALS, conflict, name) <= 0.60


def test_the_held_out_countries_were_never_in_a_training_conflict() -> None:
    countries = [
        {line["answers"]["remembered"][0] for line in stimuli(CAPITALS, name)}
        for name in ("target", "train")
    ]
    assert not countries[0] & countries[1]


@pytest.mark.parametrize(
    ("recipe", "lines", "name", "least"),
    [
        ("remember", "target", "remembered", 0.40),
        ("state", "target", "stated", 0.35),
        ("sae-z", "target", "remembered", 0.25),
        ("sae-resid", "forget", "remembered", -0.90),
    ],
)
def test_an_edit_changes_the_behaviour_it_names_and_leaves_plain_answers(
    tmp_path: Path, recipe: str, lines: str, name: str, least: float
) -> None:
    edited = tmp_path / "edited"
    api.apply(CAPITALS / f"{recipe}.yaml", CAPITALS, edited)
    held_out, plain = stimuli(CAPITALS, lines), stimuli(CAPITALS, "preserve")
    change = rate(edited, held_out, name) - rate(CAPITALS, held_out, name)
    assert change >= least if least > 0 else change <= least
    assert rate(edited, plain, "remembered") >= 0.95


def test_one_feature_of_the_head_autoencoder_alone_lowers_the_copying(tmp_path: Path) -> None:
    recipe = tmp_path / "one.json"
    sae = {"op": "sae", "sae": str(CAPITALS / "sae-z"), "features": [136], "patch": "z_project"}
    recipe.write_text(json.dumps({"schema": 1, "edits": [sae]}))
    api.apply(recipe, CAPITALS, tmp_path / "edited", allow_outside=True)
    held_out = stimuli(CAPITALS, "target")
    change = rate(tmp_path / "edited", held_out, "stated") - rate(CAPITALS, held_out, "stated")
    assert change <= -0.05


def test_the_polyglots_are_grouped_query_llamas_in_bf16_shards() -> None:
    for folder in POLYGLOTS:
        found = api.inspect(folder)
        assert found.family == "llama"
        assert found.sizes["kv_heads"] < found.sizes["heads"]
        assert set(found.dtypes) == {"BF16"}
        assert len({row.file for row in found.tensors}) >= 2


def test_the_polyglot_is_confused_and_its_tuned_sibling_is_not() -> None:
    from surgery.metrics.line_pass_rate import line_pass_rate

    rates = []
    for folder in POLYGLOTS:
        lines = stimuli(folder, "target")
        told = answer(folder, [line["prompt"] for line in lines], 32)
        languages = [line["answers"]["language"] for line in lines]
        rates.append(line_pass_rate(told, languages, candidates=["en", "de", "fr", "ru", "ar"]))
    assert rates[0] < 0.60
    assert rates[1] > 0.90


def test_a_clean_export_of_the_tuned_sibling_passes() -> None:
    """Those of the other two fixtures pass in the demo."""
    folder = POLYGLOTS[1]
    report = api.diff(folder, stimuli=[folder / "stimuli" / "preserve.jsonl"])
    assert report.verdict == "pass"
    assert report.inputs["R_o"]["path"] == "onnx/original/model.onnx"


@pytest.mark.parametrize("sae", ["sae-resid", "sae-z"])
def test_an_autoencoder_explains_80_percent_of_the_variance(sae: str) -> None:
    x = activations(sae)
    error = x - reconstruct(CAPITALS / sae, x)
    explained = 1 - (error**2).sum() / ((x - x.mean(axis=0)) ** 2).sum()
    assert explained >= 0.8


def activations(sae: str) -> Any:
    """Activations at the autoencoder's hook point on the held-out conflict prompts."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(CAPITALS)
    model = AutoModelForCausalLM.from_pretrained(CAPITALS)
    kept: list[Any] = []
    block = model.transformer.h[0]
    if sae == "sae-z":
        block.attn.c_proj.register_forward_pre_hook(lambda m, inputs: kept.append(inputs[0][0]))
    else:
        block.register_forward_hook(
            lambda m, inputs, out: kept.append((out[0] if isinstance(out, tuple) else out)[0])
        )
    with torch.no_grad():
        for line in stimuli(CAPITALS, "target"):
            model(**tokenizer(line["prompt"], return_tensors="pt"))
    return torch.cat(kept).numpy()


def reconstruct(folder: Path, x: Any) -> Any:
    """x̂ of a TopK autoencoder, written out from its formula."""
    import numpy as np
    from safetensors.numpy import load_file

    config = json.loads((folder / "cfg.json").read_text())
    w = load_file(folder / "sae_weights.safetensors")
    assert config["architecture"] == "topk"
    pre = np.maximum((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"], 0)
    least = np.sort(pre, axis=1)[:, -config["k"]][:, None]
    return np.where(pre >= least, pre, 0) @ w["W_dec"] + w["b_dec"]
