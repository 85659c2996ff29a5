"""PyTorch through transformers with the weights of one block at a time in memory."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.arch import identify
from surgery.checkpoint import Checkpoint
from surgery.export.expressions import Expression
from surgery.export.load import load_empty
from surgery.export.parameters import parameters
from surgery.runtimes.interface import STREAM, Arrays, IdArrays, ModelRef
from surgery.runtimes.pytorch import TorchRuntime
from surgery.runtimes.streamed import Streamed


class StreamedTorch(Streamed, TorchRuntime):
    """`TorchRuntime` to the bit. `live` is the transformers model, whose parameters are on the
    meta device: each block, and each module outside of blocks, has its numbers while it runs."""

    def __init__(self, model: ModelRef, threads: int) -> None:
        self._checkpoint = Checkpoint.open(model.path)
        super().__init__(model, threads)
        self._arch = identify(self._checkpoint)
        self._expressions = parameters(self.live, self._arch, self._checkpoint)
        self._parts = self._gated()
        self._held: list[tuple[Any, str, Any]] = []
        self._reader = ThreadPoolExecutor(1)
        self._ahead: tuple[Any, Future[list[Any]]] | None = None
        for number, cut in enumerate(model.cuts):
            module = self._arch.module(self.live, cut.role, cut.layer)
            module.register_forward_pre_hook(self._watch(number), with_kwargs=True)

    def infer_impl(self, inputs: IdArrays, split: int) -> Arrays:
        found: Arrays = {}
        self._alone(lambda: found.update(super(StreamedTorch, self).infer_impl(inputs, split)))
        return found

    def embedding(self, ids: NDArray[np.int64]) -> NDArray[Any]:
        named = self.live.get_input_embeddings()
        [name] = [name for name, module in self.live.named_modules() if module is named]
        expression = self._expressions[f"{name}.weight"]
        first = int(ids.min())
        rows = self._tensor(expression.rows(self._checkpoint, first, int(ids.max()) + 1))
        taken: NDArray[Any] = rows.to(getattr(self._torch, self.model.dtype)).numpy()[ids - first]
        return taken

    def _load(self) -> Any:
        return load_empty(self.model.path, self._task, self.model.dtype)

    def _quiet(self) -> AbstractContextManager[None]:
        return nullcontext()  # the whole run is: what tasks enter in turn, they leave in turn

    def _gated(self) -> dict[Any, list[tuple[Any, str, str]]]:
        """The blocks, and the modules outside of them, with what parameters each needs; each
        waits at a gate before it runs."""
        blocks = {self._arch.block(self.live, n): None for n in range(self._arch.layers)}
        names = {module: name for name, module in self.live.named_modules()}
        inside = {names[block] + ".": block for block in blocks}
        parts: dict[Any, list[tuple[Any, str, str]]] = {}
        for name in self._expressions:
            path, _, own = name.rpartition(".")
            module = self.live.get_submodule(path)
            block = next((b for prefix, b in inside.items() if name.startswith(prefix)), module)
            parts.setdefault(block, []).append((module, own, name))
        for part in parts:
            part.register_forward_pre_hook(lambda module, args: self._lockstep.gate(module))
        return parts

    def _change(self, part: Any) -> None:
        for module, own, empty in self._held:
            module._parameters[own] = empty
        self._held = []
        for (module, own, _), numbers in zip(self._places(part), self._fetched(part), strict=True):
            self._held.append((module, own, module._parameters[own]))
            module._parameters[own] = numbers
        if not self.model.cuts:  # two parts in memory are one too many for a streamed run
            self._read_ahead(part)

    def _places(self, part: Any) -> list[tuple[Any, str, str]]:
        return self._parts.get(part, [])

    def _fetched(self, part: Any) -> list[Any]:
        """The parameters of a part, which may have been read while the last one ran."""
        ahead, self._ahead = self._ahead, None
        return ahead[1].result() if ahead and ahead[0] is part else self._read(part)

    def _read_ahead(self, part: Any) -> None:
        """Parts run in the order in which the model holds them, mostly: the next one is read."""
        order = list(self._parts)
        following = order[order.index(part) + 1 :] if part in self._parts else []
        if following:
            self._ahead = (following[0], self._reader.submit(self._read, following[0]))

    def _read(self, part: Any) -> list[Any]:
        return [self._numbers(self._expressions[name]) for _, _, name in self._places(part)]

    def _numbers(self, expression: Expression) -> Any:
        """A parameter with its numbers in the dtype that is computed in, read band by band."""
        torch = self._torch
        shape = expression.shape(self._checkpoint)
        made = torch.empty(shape, dtype=getattr(torch, self.model.dtype))
        first = 0
        for band in expression.stream(self._checkpoint):
            whole = made if not shape else made[first : first + len(band)]
            whole.copy_(self._tensor(band))
            first += len(band) if shape else 0
        return torch.nn.Parameter(made, requires_grad=False)

    def _tensor(self, array: NDArray[Any]) -> Any:
        """A torch tensor of the same numbers; numpy's bfloat16 is none of torch's."""
        if array.dtype.name != "bfloat16":
            return self._torch.from_numpy(array)
        return self._torch.from_numpy(array.view(np.int16)).view(self._torch.bfloat16)

    def _watch(self, cut: int) -> Any:
        def before(module: Any, given: Any, named: Any) -> None:
            [value] = [*given, *named.values()][:1]
            self._keep(STREAM, cut, value.detach().numpy())

        return before
