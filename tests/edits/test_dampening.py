"""`neurons` with `auroc`: rows of the projection before the activation, and their biases."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recipes import apply_edits, plan_of, stored

from surgery.checkpoint import Checkpoint
from surgery.errors import InputError

SCORES = {(0, 0): 0.5, (0, 3): 0.75, (0, 4): 1.0, (1, 47): 0.6, (1, 2): 0.1}
AURA = {(0, 3): 0.5, (0, 4): 0.0, (1, 47): 0.8}
METHODS: dict[str, tuple[dict[str, Any], dict[tuple[int, int], float]]] = {
    "aura": ({"method": "aura"}, AURA),
    "det0": ({"method": "det0"}, dict.fromkeys(AURA, 0.0)),
    "damp": ({"method": "damp", "factor": 0.3, "top": 2}, {(0, 3): 0.3, (0, 4): 0.3}),
}
FC = {
    "gpt2": "transformer.h.{}.mlp.c_fc.",
    "bert": "bert.encoder.layer.{}.intermediate.dense.",
    "llama-biased": "model.layers.{}.mlp.gate_proj.",
    "phi3": "model.layers.{}.mlp.gate_up_proj.",
}
SIDE = {"llama-biased": {"on": "gate"}, "phi3": {"on": "up"}}
EDIT = {"op": "neurons", "auroc": {"file": "auroc.csv"}}


def write_scores(folder: Path, scores: dict[tuple[int, int], object] | None = None) -> None:
    rows = [f"{layer},{neuron},{score}" for (layer, neuron), score in (scores or SCORES).items()]
    (folder / "auroc.csv").write_text("\n".join(["layer,neuron,auroc", *rows]))


@pytest.mark.parametrize("model", FC)
@pytest.mark.parametrize("method", METHODS)
def test_rows_and_biases_of_experts_are_scaled_and_nothing_else(
    model: str, method: str, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    write_scores(tmp_path)
    fields, factors = METHODS[method]
    base = base_of(model)
    output = apply_edits(tmp_path, base, [{**EDIT, **SIDE.get(model, {}), **fields}])
    for name in Checkpoint.open(base).tensors:
        expected = stored(base, name).copy()
        for (layer, neuron), factor in factors.items():
            if name.startswith(FC[model].format(layer)):
                lines = expected.T if model == "gpt2" and expected.ndim == 2 else expected
                lines[neuron + (48 if model == "phi3" else 0)] *= np.float32(factor)
        expected[expected == 0] = 0  # zeros are positive ones
        assert stored(output, name).tobytes() == expected.tobytes(), name


@pytest.mark.parametrize(
    ("fields", "scores", "said"),
    [
        ({}, SCORES, "say method: aura, det0 or damp"),
        ({"method": "damp"}, SCORES, "a factor goes with damp, and only it"),
        ({"method": "aura", "factor": 0.5}, SCORES, "a factor goes with damp, and only it"),
        ({"method": "aura", "neurons": ["L0N1"]}, SCORES, "auroc goes with top"),
        ({"method": "aura"}, {(0, 1): 0.5, (1, 1): 0.2}, "no neuron has an auroc above 0.5"),
        ({"method": "aura"}, {(0, 1): 1.5}, "outside 0 to 1"),
        ({"method": "aura"}, {(0, 1): ""}, "line 2 is not layer,neuron,auroc in numbers"),
        ({"method": "aura"}, {(0, 1): "nan"}, "its auroc is no number"),
        ({"method": "aura"}, {(0, 1): 0.9, (0, 2): "0.7\n0,1,0.8"}, "names a neuron twice"),
        ({"method": "aura"}, {(2, 1): 0.9}, "layer 2 is out of range"),
        ({"method": "aura"}, {(0, 128): 0.9}, "neuron 128 is out of range"),
    ],
)
def test_scores_that_say_nothing_are_refused(
    fields: dict[str, Any],
    scores: dict[tuple[int, int], object],
    said: str,
    base_of: Callable[..., Path],
    tmp_path: Path,
) -> None:
    write_scores(tmp_path, scores)
    with pytest.raises(InputError, match=said):
        plan_of(tmp_path, base_of("gpt2"), [{**EDIT, **fields}])


@pytest.mark.parametrize("field", [{"method": "aura"}, {"on": "up"}])
def test_a_method_goes_with_scores(
    field: dict[str, Any], base_of: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="method and on go with auroc"):
        plan_of(tmp_path, base_of("gpt2"), [{"op": "neurons", "neurons": ["L0N1"], **field}])
