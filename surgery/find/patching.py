"""One head's output exchanged and everything after it but the other heads computed again.

Path patching (Wang et al. 2022, arXiv 2211.00593, section 3.1), as PH3 uses it (arXiv 2402.18154):
the sender's output z is taken from the corrupted prompt, all other heads keep their clean outputs,
MLPs and norms follow. What is exchanged at one position then changes the residual stream at that
position alone, because only attention mixes positions: so later blocks run on one token for each
prompt and head. The model's own blocks run, with their attention's projections left out and the
input of `o_proj` given, so that norms, parallel MLPs and scales are those of the family.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from surgery.arch import Architecture

ATTENTION_INPUTS = ("q_proj", "k_proj", "v_proj", "qkv_proj")


@dataclass(frozen=True)
class Recorded:
    """One run of n prompts at p of their positions (1: the last; or all), as torch tensors.

    z: what each layer's `o_proj` reads, [n, p, heads * head_dim]; residual: what enters each
    block and, last of all, the final norm, [n, p, width].
    """

    z: tuple[Any, ...]
    residual: tuple[Any, ...]


class Patching:
    """A decoder whose heads are exchanged one at a time; `model` is a live transformers model."""

    def __init__(self, model: Any, arch: Architecture) -> None:
        self._model, self._arch = model, arch
        self._blocks = [arch.block(model, layer) for layer in range(arch.layers)]
        self._readers = [*self._blocks, arch.module(model, "final_norm")]
        self._outputs = [arch.module(model, "o_proj", layer) for layer in range(arch.layers)]
        self._inputs = [
            (arch.module(model, role, layer), arch.shape(role, "weight")[1 - arch.input_axis(role)])
            for role in ATTENTION_INPUTS
            if role in arch.facts.modules
            for layer in range(arch.layers)
        ]
        self._head = model.get_output_embeddings()
        self._tuples = False

    def record(self, inputs: Mapping[str, Any], whole: bool = False) -> Recorded:
        """A run of left-padded prompts: `input_ids`, `attention_mask` and, where the model takes
        them, `position_ids`, all [n, length]; at the last position, or at all."""
        import torch

        z: list[Any] = [None] * self._arch.layers
        residual: list[Any] = [None] * len(self._readers)

        def keep(into: list[Any], layer: int) -> Callable[..., None]:
            def hook(module: Any, given: Any, named: Any) -> None:
                value = given[0] if given else next(iter(named.values()))
                into[layer] = value if whole else value[:, -1:].clone()

            return hook

        def note(module: Any, given: Any, result: Any) -> None:
            self._tuples = isinstance(result, tuple)

        with ExitStack() as stack, torch.no_grad():
            stack.enter_context(self._blocks[0].register_forward_hook(note))
            for into, modules in ((z, self._outputs), (residual, self._readers)):
                for layer, module in enumerate(modules):
                    hook = keep(into, layer)
                    stack.enter_context(module.register_forward_pre_hook(hook, with_kwargs=True))
            self._model.base_model(**inputs, use_cache=False)
        return Recorded(tuple(z), tuple(residual))

    def logits(self, first: int, residual: Any, z: Sequence[Any], tokens: Any) -> Any:
        """Logits [m, p, k] of `tokens` [m, k] when the blocks from `first` on run with what
        enters that block, [m, p, width], and what each layer's `o_proj` reads, `z[layer]`
        [m, p, heads * head_dim]; with `first` the number of layers, the final norm alone."""
        with self._frozen(first, residual, z), self._selected(tokens):
            return self._model(inputs_embeds=residual, use_cache=False).logits

    def _pass_by(self, hidden: Any, *given: Any, **named: Any) -> Any:
        """A block that does nothing: some families' blocks give attention weights as well."""
        return (hidden, None) if self._tuples else hidden

    def written(self, layer: int, z: Any) -> Any:
        """What heads' outputs z [..., heads * head_dim] of a layer add to the residual stream,
        [..., width]: through `o_proj` and, in some families, a norm after it."""
        norm = self._arch.facts.modules["o_proj"].norm
        added = self._outputs[layer](z)
        return self._arch.module(self._model, norm, layer)(added) if norm else added

    @contextmanager
    def _frozen(self, first: int, residual: Any, z: Sequence[Any]) -> Iterator[None]:
        """Blocks before `first` are passed by, attention is given."""

        def enter(module: Any, given: Any, named: Any) -> Any:
            return _with_first(residual, given, named)

        def read(layer: int) -> Callable[..., Any]:
            return lambda module, given: (z[layer], *given[1:])

        with ExitStack() as stack:
            for block in self._blocks[:first]:
                stack.enter_context(_replaced(block, self._pass_by))
            for module, width in self._inputs:
                stack.enter_context(_replaced(module, _zeros(width)))
            hook = self._readers[first].register_forward_pre_hook(enter, with_kwargs=True)
            stack.enter_context(hook)
            for layer in range(first, self._arch.layers):
                hook = self._outputs[layer].register_forward_pre_hook(read(layer))
                stack.enter_context(hook)
            yield

    @contextmanager
    def _selected(self, tokens: Any) -> Iterator[None]:
        """While entered, the head computes the logits of each row's own tokens alone."""
        weight, bias = self._head.weight, getattr(self._head, "bias", None)

        def forward(hidden: Any) -> Any:
            found = hidden @ weight[tokens].transpose(1, 2)
            return found if bias is None else found + bias[tokens][:, None]

        with _replaced(self._head, forward):
            yield


def _zeros(width: int) -> Callable[..., Any]:
    """A projection to so many features that costs nothing."""
    return lambda hidden: hidden.new_zeros(1).expand(*hidden.shape[:-1], width)


def _with_first(value: Any, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """A call's arguments with another first one, however it is passed."""
    if given:
        return (value, *given[1:]), named
    return given, {**named, next(iter(named)): value}


@contextmanager
def _replaced(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """While entered, the module computes `forward`."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
