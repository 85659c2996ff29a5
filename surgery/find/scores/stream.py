"""The residual stream of a live decoder between its blocks, and what the model makes of one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from surgery.arch import Architecture
from surgery.errors import FindError


class Stream:
    """The states that enter each block and, last of all, the final norm, of a live transformers
    `model`. Raises `FindError` for a model without that norm."""

    def __init__(self, model: Any, arch: Architecture) -> None:
        if "final_norm" not in arch.facts.modules:
            raise FindError(f"this {arch.family} has no final norm for a lens to read by")
        self._model = model
        self._norm = arch.module(model, "final_norm")
        self._readers = [*(arch.block(model, n) for n in range(arch.layers)), self._norm]
        self._blocks = arch.facts.block.removesuffix(".{layer}")

    def states(self, inputs: Mapping[str, Any]) -> list[Any]:
        """One run of left-padded prompts [n, length]: layers + 1 states [n, length, width]."""
        import torch

        found: list[Any] = [None] * len(self._readers)

        def keep(layer: int) -> Callable[..., None]:
            def hook(module: Any, given: Any, named: Any) -> None:
                # Cloned at once: some families add to these tensors in place.
                found[layer] = (given[0] if given else next(iter(named.values()))).clone()

            return hook

        with ExitStack() as stack, torch.no_grad():
            for layer, module in enumerate(self._readers):
                hook = module.register_forward_pre_hook(keep(layer), with_kwargs=True)
                stack.enter_context(hook)
            self._model.base_model(**inputs, use_cache=False)
        return found

    def logits(self, state: Any) -> Any:
        """Logits [n, length, vocab] of the model if `state` [n, length, width] entered its final
        norm: by its own norm, head and whatever follows; gradients go through."""

        def enter(module: Any, given: Any) -> Any:
            return (state, *given[1:])

        with self._without_blocks(), self._norm.register_forward_pre_hook(enter):
            return self._model(inputs_embeds=state, use_cache=False).logits

    @contextmanager
    def _without_blocks(self) -> Iterator[None]:
        import torch

        path, _, name = self._blocks.rpartition(".")
        holder = self._model.base_model.get_submodule(path)
        blocks = getattr(holder, name)
        setattr(holder, name, torch.nn.ModuleList())
        try:
            yield
        finally:
            setattr(holder, name, blocks)
