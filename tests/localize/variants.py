"""Right conversions of one model, made in as many ways: none of them may be called wrong."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from here import in_this_process

from surgery.export import export
from surgery.runtimes import onnxruntime

Variant = tuple[str, Path, Path, Callable[[], AbstractContextManager[Any]]]
"""Its name, the checkpoint, the ONNX file, and what must be entered while it runs."""


def variants(model: Path, onnx: Path, root: Path, causal: bool) -> Iterator[Variant]:
    for opset in (18, 22, 25):
        with in_this_process():
            made = export(model, root / f"opset-{opset}", opset=opset).model
        yield f"opset {opset}", model, made, nullcontext
    folder = Path(shutil.copytree(model, root / "linked"))
    with in_this_process():
        linked = export(folder, folder, layout="linked").model
    yield "linked", folder, linked, nullcontext
    yield "portable", model, onnx, nullcontext
    yield "two threads", model, onnx, partial(patch.dict, os.environ, {"OMP_NUM_THREADS": "2"})
    yield "no optimisations", model, onnx, _unoptimised
    yield "PyTorch's exporter", model, torch_export(model, root / "torch.onnx", causal), nullcontext


def _unoptimised() -> AbstractContextManager[Any]:
    real = onnxruntime.open_session

    def open_session(model: Any, folder: Path | None, threads: int, *more: Any) -> Any:
        return real(model, folder, threads, "disabled")

    return patch.object(onnxruntime, "open_session", open_session)


def torch_export(model: Path, path: Path, causal: bool) -> Path:
    """PyTorch's own exporter with its optimiser, batch and length free."""
    import torch
    import transformers

    kind = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
    options: dict[str, Any] = {} if causal else {"add_pooling_layer": False}
    loaded = kind.from_pretrained(model, **options).eval()

    class Wrapper(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = loaded

        def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any = None) -> Any:
            # Encoders number positions themselves, padding included.
            more = {"use_cache": False, "position_ids": position_ids} if causal else {}
            return self.model(input_ids=input_ids, attention_mask=attention_mask, **more)[0]

    ids = torch.arange(14).reshape(2, 7) + 3
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if causal:
        inputs["position_ids"] = torch.arange(7).expand(2, 7).clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Wrapper(), tuple(inputs.values()), path, dynamo=True, optimize=True,
            external_data=False, input_names=list(inputs), verbose=False,
            output_names=["logits" if causal else "last_hidden_state"],
            dynamic_shapes=dict.fromkeys(inputs, free),
        )  # fmt: skip
    return path
