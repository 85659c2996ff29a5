"""An export that fails says at which stage, in which module and at which operator."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from surgery.errors import ExportError
from surgery.export.capture import capture
from tests.models import Zoo


def branch(torch: Any, y: Any) -> Any:
    return y + 1 if y.sum() > 0 else y


def odd_shape(torch: Any, y: Any) -> Any:
    return y.reshape(3, -1)


def bessel(torch: Any, y: Any) -> Any:
    return torch.special.bessel_j0(y)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (branch, ["stage trace", "GuardOnDataDependent"]),
        (odd_shape, ["stage trace", "at aten.view.default", "shape '[3, -1]' is invalid"]),
        (bessel, ["stage translate", "at prims.bessel_j0.default", "No ONNX function found"]),
    ],
)
def test_the_message_names_stage_module_and_operator(
    change: Callable[[Any, Any], Any],
    expected: list[str],
    zoo: Zoo,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch
    from transformers.models.llama.modeling_llama import LlamaMLP

    forward = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: change(torch, forward(self, x)))
    with pytest.raises(ExportError) as caught:
        capture(zoo.checkpoint("llama"), "causal-lm", report=tmp_path)
    text = str(caught.value)
    assert "in model.layers.0.mlp" in text and "\n" not in text
    assert all(part in text for part in expected), text
    # torch writes a report of what it does, and so of what fails there.
    assert len(list(tmp_path.glob("*.md"))) == ("translate" in text)
