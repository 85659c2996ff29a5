"""Right conversions of one model, made in as many ways: none of them may be called wrong."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import onnx
from here import in_this_process

from surgery.export import export
from surgery.export.tasks import Task
from surgery.runtimes import session

Entered = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Made:
    """A right conversion of checkpoint `model`, and what must be entered while it runs."""

    model: Path
    onnx: Path
    entered: Entered = nullcontext


@dataclass(frozen=True)
class Clean:
    """What variants are made of: the model, its portable export, and an empty folder for them."""

    model: Path
    onnx: Path
    root: Path
    task: Task

    def export(self, name: str, **how: Any) -> Made:
        with in_this_process():
            made = export(self.model, self.root / name, task=self.task.name, **how)
        return Made(self.model, made.model)

    def linked(self) -> Made:
        folder = Path(shutil.copytree(self.model, self.root / "linked"))
        with in_this_process():
            made = export(folder, folder, layout="linked", task=self.task.name)
        return Made(folder, made.model)

    def threads(self, number: int) -> Made:
        entered = partial(patch.dict, os.environ, {"OMP_NUM_THREADS": str(number)})
        return Made(self.model, self.onnx, entered)

    def optimised(self, level: str) -> Made:
        return Made(self.model, self.onnx, partial(_at_level, level))

    def saved(self, level: str) -> Made:
        """The file that ONNX Runtime writes once it has optimised the graph; beside it the data
        that it names."""
        import onnxruntime as ort

        for data in self.onnx.parent.glob("*.data"):
            shutil.copy(data, self.root)
        options, path = ort.SessionOptions(), self.root / f"saved-{level}.onnx"
        options.graph_optimization_level = _level(level)
        options.optimized_model_filepath = str(path)
        options.log_severity_level = 3
        ort.InferenceSession(str(self.onnx), options, providers=["CPUExecutionProvider"])
        return Made(self.model, path)

    def anonymous(self) -> Made:
        """No value and no weight has a name that says anything."""
        model, path = onnx.load(str(self.onnx)), self.root / "anonymous.onnx"
        kept = {value.name for value in (*model.graph.input, *model.graph.output)}
        names: dict[str, str] = {}

        def new(name: str) -> str:
            return name if name in kept or not name else names.setdefault(name, f"v{len(names)}")

        for tensor in model.graph.initializer:
            tensor.name = new(tensor.name)
        for number, node in enumerate(model.graph.node):
            node.name = f"n{number}"
            node.input[:] = [new(name) for name in node.input]
            node.output[:] = [new(name) for name in node.output]
        del model.graph.value_info[:], model.metadata_props[:]
        onnx.save(model, str(path))
        return Made(self.model, path)

    def external(self) -> Made:
        """Weights in a file of their own."""
        folder = self.root / "external"
        folder.mkdir()
        onnx.save(
            onnx.load(str(self.onnx)), str(folder / "model.onnx"), save_as_external_data=True,
            location="model.onnx.data", size_threshold=1024,
        )  # fmt: skip
        return Made(self.model, folder / "model.onnx")

    def torch(self, attention: str, optimise: bool = True, opset: int | None = None) -> Made:
        path = self.root / f"torch-{attention}-{optimise}-{opset}.onnx"
        return Made(
            self.model, torch_export(self.model, path, self.task.causal, attention, optimise, opset)
        )


VARIANTS: dict[str, Callable[[Clean], Made]] = {
    "portable": lambda of: Made(of.model, of.onnx),
    "linked": Clean.linked,
    "opset 18": lambda of: of.export("opset-18", opset=18),
    "opset 20": lambda of: of.export("opset-20", opset=20),
    "opset 22": lambda of: of.export("opset-22", opset=22),
    "opset 25": lambda of: of.export("opset-25", opset=25),
    "two threads": lambda of: of.threads(2),
    "four threads": lambda of: of.threads(4),
    "no optimisations": lambda of: of.optimised("DISABLE_ALL"),
    "basic optimisations": lambda of: of.optimised("ENABLE_BASIC"),
    "extended optimisations": lambda of: of.optimised("ENABLE_EXTENDED"),
    "saved after basic optimisations": lambda of: of.saved("ENABLE_BASIC"),
    "saved after extended optimisations": lambda of: of.saved("ENABLE_EXTENDED"),
    "names that say nothing": Clean.anonymous,
    "weights in a file of their own": Clean.external,
    "PyTorch's exporter, eager attention": lambda of: of.torch("eager"),
    "PyTorch's exporter, fused attention": lambda of: of.torch("sdpa"),
    "PyTorch's exporter, not optimised": lambda of: of.torch("sdpa", optimise=False),
    "PyTorch's exporter, opset 20": lambda of: of.torch("eager", opset=20),
}
"""By name, in the order they are made; those of PyTorch's exporter are of graphs without a
cache."""


def names(task: Task) -> Iterator[str]:
    """The variants of a model that is exported for `task`."""
    return (name for name in VARIANTS if not (task.cache and name.startswith("PyTorch")))


def _level(name: str) -> Any:
    import onnxruntime as ort

    return getattr(ort.GraphOptimizationLevel, f"ORT_{name}")


def _at_level(level: str) -> AbstractContextManager[Any]:
    """While entered, every session is optimised so far and no further."""
    return patch.dict(session.LEVELS, dict.fromkeys(session.LEVELS, f"ORT_{level}"))


def torch_export(
    model: Path,
    path: Path,
    causal: bool,
    attention: str = "sdpa",
    optimise: bool = True,
    opset: int | None = None,
) -> Path:
    """PyTorch's own exporter, batch and length free."""
    import torch
    import transformers

    kind = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
    options: dict[str, Any] = {} if causal else {"add_pooling_layer": False}
    options |= {"attn_implementation": attention, "dtype": torch.float32}
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
            Wrapper(), tuple(inputs.values()), path, dynamo=True, optimize=optimise,
            external_data=False, input_names=list(inputs), verbose=False, opset_version=opset,
            output_names=["logits" if causal else "last_hidden_state"],
            dynamic_shapes=dict.fromkeys(inputs, free),
        )  # fmt: skip
    return path
