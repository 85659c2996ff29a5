"""PyTorch through transformers, in float32, in float64 as the reference, or in a narrower type."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.export.load import forward_inputs, load_model
from surgery.export.quiet import quiet
from surgery.export.tasks import find_task
from surgery.runtimes.interface import Arrays, IdArrays, ModelRef, Runtime

DTYPES = ("float32", "float64", "float16", "bfloat16")


class TorchRuntime(Runtime):
    """A checkpoint folder on the CPU.

    With dtype `float64` every operation is float64, also those a model casts to float32 by name
    (RMS norms, rotary angles). Constants that the model itself makes in float32, such as rotary
    frequencies, keep their float32 values: they are what every runtime is given. `live` is the
    transformers model.
    """

    def __init__(self, model: ModelRef, threads: int) -> None:
        super().__init__(model, threads)
        self._task = find_task(model.task)
        if model.dtype not in DTYPES:
            raise ValueError(f"torch computes in {', '.join(DTYPES)}, not {model.dtype}")
        with quiet():
            import torch

        torch.set_num_threads(threads)
        self._torch = torch
        self.live = self._load()
        if model.dtype == "float64":
            self.live.double()
        if model.stored:
            self.live.to(getattr(torch, model.dtype))

    def _load(self) -> Any:
        stored = self.model.stored or self.model.dtype
        return load_model(self.model.path, self._task, stored, self.model.attention)

    @property
    def input_names(self) -> tuple[str, ...]:
        return forward_inputs(self.live, self._task)

    @property
    def output_names(self) -> tuple[str, ...]:
        layers = self.live.config.num_hidden_layers if self._task.cache else 0
        cache = [f"present.{n}.{part}" for n in range(layers) for part in ("key", "value")]
        return (self._task.output, *self._pooled, *cache)

    @property
    def _pooled(self) -> tuple[str, ...]:
        pooler = getattr(self.live, "pooler", None)
        return (self._task.pooled,) if self._task.pooled and pooler is not None else ()

    def infer_impl(self, inputs: IdArrays, split: int) -> Arrays:
        feed = {name: self._torch.from_numpy(inputs[name]) for name in self.input_names}
        options = {"use_cache": self._task.cache} if self._task.causal else {}
        with self._quiet(), self._torch.no_grad(), self._precision():
            result = self.live(**feed, **options)
        outputs = {name: result[name] for name in (self._task.output, *self._pooled)}
        if self._task.cache:
            for number, layer in enumerate(result.past_key_values.layers):
                outputs[f"present.{number}.key"] = layer.keys
                outputs[f"present.{number}.value"] = layer.values
        return {name: self._array(value) for name, value in outputs.items()}

    def _array(self, value: Any) -> NDArray[Any]:
        """As numpy's array: bfloat16, which numpy has not, as float32."""
        wide = value.float() if value.dtype == self._torch.bfloat16 else value
        array: NDArray[Any] = wide.numpy()
        return array

    def embedding(self, ids: NDArray[np.int64]) -> NDArray[Any]:
        weight = self.live.get_input_embeddings().weight
        rows: NDArray[Any] = weight.detach()[self._torch.from_numpy(ids)].numpy()
        return rows

    def _quiet(self) -> AbstractContextManager[None]:
        return quiet()

    def _precision(self) -> AbstractContextManager[Any]:
        return widen(self._torch) if self.model.dtype == "float64" else nullcontext()


def widen(torch: Any) -> AbstractContextManager[Any]:
    """While entered, every torch call that asks for float32 by name gets float64.

    Without it padding gives NaN. Eager attention adds the smallest float64 number to the scores
    it masks and takes the softmax in float32: there that number is -inf, and a row of padding,
    which may attend to nothing, is NaN in each place. Later layers spread it to real rows, for 0
    times NaN is NaN. In float64 throughout the mask stays finite, and such a row is a plain mean.
    """

    def wide(value: Any) -> Any:
        return torch.float64 if value is torch.float32 else value

    def run(self: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        named = {name: wide(value) for name, value in (kwargs or {}).items()}
        return func(*(wide(value) for value in args), **named)

    base = torch.overrides.TorchFunctionMode
    mode: AbstractContextManager[Any] = type("Widen", (base,), {"__torch_function__": run})()
    return mode
