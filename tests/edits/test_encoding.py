"""Activations of features are those of each format's own loader, feature by feature."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sae_folders import (
    WRITERS,
    Arrays,
    D,
    N,
    arrays,
    dictionary_learning,
    files_of,
    save,
    save_json,
)

from surgery.edits.autoencoders import opened
from surgery.edits.autoencoders.encoding import read_encoder
from surgery.errors import CheckpointError, EditError

HOOK = "blocks.1.hook_resid_post"


def tokens() -> Any:
    return np.random.default_rng(1).normal(size=(2, 5, D)).astype(np.float32)


def added(name: str, root: Path) -> Any:
    """What each feature adds to each token, [batch, length, n, d], as the package reads it."""
    with opened(name, files_of(root), pickle=True) as sae:
        encoder = read_encoder(sae)
    features = encoder(torch.from_numpy(tokens()))
    return (features[..., None] * encoder.rows).numpy()


def relu(a: Arrays, x: Any) -> list[float]:
    return [max(0.0, float(x @ a["W_enc"][:, i] + a["b_enc"][i])) for i in range(N)]


def topk(f: list[float], k: int) -> list[float]:
    least = sorted(f)[-k]
    return [value if value >= least else 0.0 for value in f]


def jump(f: list[float], threshold: Any) -> list[float]:
    return [value if value > threshold[i] else 0.0 for i, value in enumerate(f)]


def gated(a: Arrays, x: Any) -> list[float]:
    found = []
    for i in range(N):
        read = float(x @ a["W_enc"][:, i])
        size = max(0.0, np.exp(a["r_mag"][i]) * read + a["b_mag"][i])
        found.append(size if read + a["b_gate"][i] > 0 else 0.0)
    return found


def spread(f: list[float], a: Arrays) -> Any:
    return np.array([value * row for value, row in zip(f, a["W_dec"], strict=True)])


def llama_scope(a: Arrays, x: Any) -> Any:
    """As its own loader: decoder rows are made unit, and encoders scaled to match."""
    norms = np.linalg.norm(a["W_dec"], axis=1)
    unit = {
        "W_enc": a["W_enc"] * norms, "b_enc": a["b_enc"] * norms,
        "W_dec": a["W_dec"] / norms[:, None],
    }  # fmt: skip
    s = np.sqrt(D) / 8
    return spread(jump(relu(unit, s * x), [0.5 * s] * N), unit) / s


LITERAL = {
    "saelens": lambda a, x: spread(jump(relu(a, x), a["threshold"]), a),
    "sparsify": lambda a, x: spread(topk(relu(a, x - a["b_dec"]), 4), a),
    "dictionary_learning": lambda a, x: spread(topk(relu(a, x - a["b_dec"]), 4), a),
    "gemma_scope": lambda a, x: spread(jump(relu(a, x), a["threshold"]), a),
    "gemma_scope_2": lambda a, x: spread(jump(relu(a, x), a["threshold"]), a),
    "llama_scope": llama_scope,
}


def assert_literal(found: Any, literal: Any, a: Arrays) -> None:
    wide = {name: values.astype(np.float64) for name, values in a.items()}
    expected = np.array([[literal(wide, x) for x in row] for row in tokens().astype(np.float64)])
    active = (expected != 0).any(-1)
    assert active.any()
    assert not active.all()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_encodes_as_its_own_loader_does(name: str, tmp_path: Path) -> None:
    a = arrays()
    assert_literal(added(WRITERS[name](tmp_path, a), tmp_path), LITERAL[name], a)


@pytest.mark.parametrize(
    ("kind", "literal"),
    [
        ("AutoEncoder", lambda a, x: spread(relu(a, x - a["b_dec"]), a)),
        ("AutoEncoderNew", lambda a, x: spread(relu(a, x), a)),
        ("JumpReluAutoEncoder", lambda a, x: spread(jump(relu(a, x), a["threshold"]), a)),
        ("BatchTopKSAE", lambda a, x: spread(jump(relu(a, x - a["b_dec"]), [0.5] * N), a)),
        (
            "GatedAutoEncoder",
            lambda a, x: spread(
                gated({**a, **dict.fromkeys(("b_gate", "b_mag", "r_mag"), a["b_enc"])},
                      x - a["b_dec"]),
                a,
            ),
        ),
    ],
)  # fmt: skip
def test_every_class_of_dictionary_learning_encodes_as_it_is_written(
    kind: str, literal: Any, tmp_path: Path
) -> None:
    a = arrays()
    assert_literal(added(dictionary_learning(tmp_path, a, kind), tmp_path), literal, a)


def lens(root: Path, a: Arrays, **config: Any) -> str:
    save(root / "sae/sae_weights.safetensors", a)
    metadata = {"hook_name": HOOK}
    save_json(root / "sae/cfg.json", {"d_in": D, "d_sae": N, "metadata": metadata, **config})
    return "sae"


def test_top_k_of_saelens_can_compare_features_by_what_they_write(tmp_path: Path) -> None:
    a = arrays()

    def literal(a: Arrays, x: Any) -> Any:
        norms = np.linalg.norm(a["W_dec"], axis=1)
        before = relu(a, x - a["b_dec"])
        kept = topk([f * norm for f, norm in zip(before, norms, strict=True)], 3)
        return spread([f / norm for f, norm in zip(kept, norms, strict=True)], a)

    config = {"architecture": "topk", "k": 3, "rescale_acts_by_decoder_norm": True}
    assert_literal(added(lens(tmp_path, a, **config), tmp_path), literal, a)


def test_gated_and_older_top_k_of_saelens_are_read(tmp_path: Path) -> None:
    a = arrays()
    gates = {name: arrays(seed)["b_enc"] for seed, name in enumerate(("b_gate", "b_mag", "r_mag"))}
    both = {**a, **gates}
    name = lens(tmp_path / "gated", both, architecture="gated")
    assert_literal(added(name, tmp_path / "gated"),
                   lambda a, x: spread(gated(a, x - a["b_dec"]), a), both)  # fmt: skip
    old = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 2}}
    assert_literal(added(lens(tmp_path / "old", a, **old), tmp_path / "old"),
                   lambda a, x: spread(topk(relu(a, x - a["b_dec"]), 2), a), a)  # fmt: skip


@pytest.mark.parametrize(
    ("config", "left_out", "said"),
    [
        ({"architecture": "topk"}, (), "top-k with k None; expected 1 to 12"),
        ({"architecture": "topk", "k": 13}, (), "top-k with k 13"),
        ({"architecture": "topk", "k": 0}, (), "expected a positive integer"),
        ({"architecture": "topk", "k": "3"}, (), "expected a positive integer"),
        ({"architecture": "gated"}, (), "is gated and has no b_gate, b_mag, r_mag"),
        ({"architecture": "jumprelu"}, ("threshold",), "jumprelu and has no threshold"),
        ({"architecture": "matryoshka"}, (), "has the activation 'matryoshka'; expected relu"),
        ({"normalize_activations": "layer_norm"}, (), "which an encoder needs"),
        ({}, ("W_enc",), "has no W_enc"),
    ],
)
def test_what_no_file_says_is_not_guessed(
    config: dict[str, Any], left_out: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    a = {name: values for name, values in arrays().items() if name not in left_out}
    with pytest.raises((CheckpointError, EditError), match=said) as caught:
        added(lens(tmp_path, a, **config), tmp_path)
    assert json.dumps(str(caught.value)).isprintable()


def test_numbers_that_are_none_are_refused(tmp_path: Path) -> None:
    a = arrays()
    a["W_enc"][3, 4] = np.nan
    with pytest.raises(EditError, match="W_enc holds NaN"):
        added(lens(tmp_path, a), tmp_path)
