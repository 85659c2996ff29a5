"""One head's output exchanged and everything after it but the other heads computed again.

Path patching (Wang et al. 2022, arXiv 2211.00593, section 3.1), as PH3 uses it (arXiv 2402.18154):
the sender's output z is taken from the corrupted prompt, all other heads keep their clean outputs,
MLPs and norms follow. What is exchanged at one position then changes the residual stream at that
position alone, because only attention mixes positions: so later blocks run on one token for each
prompt and head. The model's own blocks run, with their attention's projections left out and what
`o_proj` gives put in, so that norms, parallel MLPs and scales are those of the family.
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

    z: what each layer's `o_proj` reads, [n, p, heads * head_dim]; attention: what it gives,
    [n, p, width]; residual: what enters each block and, last of all, the final norm (the output
    head where there is none), [n, p, width].
    """

    z: tuple[Any, ...]
    attention: tuple[Any, ...]
    residual: tuple[Any, ...]

    def last(self) -> Recorded:
        """The last position alone."""
        return self.each(lambda own: own[:, -1:])

    def of(self, prompts: Any) -> Recorded:
        """Some of the prompts."""
        return self.each(lambda own: own[prompts])

    def each(self, change: Callable[[Any], Any]) -> Recorded:
        """Every tensor changed."""
        kinds = (self.z, self.attention, self.residual)
        return Recorded(*(tuple(map(change, kind)) for kind in kinds))

    @staticmethod
    def joined(parts: Sequence[Recorded]) -> Recorded:
        """The prompts of several, equally long, as one."""
        import torch

        def join(kind: str) -> tuple[Any, ...]:
            every = zip(*(getattr(part, kind) for part in parts), strict=True)
            return tuple(map(torch.cat, every))

        return Recorded(join("z"), join("attention"), join("residual"))


class Patching:
    """A decoder whose heads are exchanged one at a time; `model` is a live transformers model."""

    def __init__(self, model: Any, arch: Architecture) -> None:
        self._model, self._arch = model, arch
        self._head = model.get_output_embeddings()
        # An old OPT has no norm there: the head then is what reads the stream last.
        normed = "final_norm" in arch.facts.modules
        last = arch.module(model, "final_norm") if normed else self._head
        self._readers = [*(arch.block(model, layer) for layer in range(arch.layers)), last]
        self._outputs = [arch.module(model, "o_proj", layer) for layer in range(arch.layers)]
        self._inputs = [
            (arch.module(model, role, layer), arch.shape(role, "weight")[1 - arch.input_axis(role)])
            for role in ATTENTION_INPUTS
            if role in arch.facts.modules
            for layer in range(arch.layers)
        ]

    @property
    def layers(self) -> int:
        return self._arch.layers

    @property
    def heads(self) -> int:
        """In each layer."""
        return self._arch.sizes["heads"]

    def record(
        self, inputs: Mapping[str, Any], whole: bool = False, budget: int | None = None
    ) -> Recorded:
        """A run of left-padded prompts: `input_ids`, `attention_mask` and, where the model takes
        them, `position_ids`, all [n, length]; at the last position, or at all. As many prompts run
        at a time as have at most `budget` tokens, or one."""
        prompts, length = inputs["input_ids"].shape
        step = prompts if budget is None else max(1, budget // length)
        parts = [slice(start, start + step) for start in range(0, prompts, step)]
        feeds = ({name: own[part] for name, own in inputs.items()} for part in parts)
        return Recorded.joined([self._recorded(feed, whole) for feed in feeds])

    def _recorded(self, inputs: Mapping[str, Any], whole: bool) -> Recorded:
        import torch

        z: list[Any] = [None] * self.layers
        attention: list[Any] = [None] * self.layers
        residual: list[Any] = [None] * len(self._readers)

        def keep(into: list[Any], layer: int, value: Any) -> None:
            # Cloned at once: some families add to these tensors in place.
            into[layer] = (value if whole else value[:, -1:]).clone()

        def before(into: list[Any], layer: int) -> Callable[..., None]:
            return lambda module, given, named: keep(
                into, layer, given[0] if given else next(iter(named.values()))
            )

        def after(layer: int) -> Callable[..., None]:
            return lambda module, given, result: keep(attention, layer, result)

        with ExitStack() as stack, torch.no_grad():
            for into, modules in ((z, self._outputs), (residual, self._readers)):
                for layer, module in enumerate(modules):
                    hook = module.register_forward_pre_hook(before(into, layer), with_kwargs=True)
                    stack.enter_context(hook)
            for layer, module in enumerate(self._outputs):
                stack.enter_context(module.register_forward_hook(after(layer)))
            stack.enter_context(_replaced(self._head, _shortened))
            self._model(**inputs, use_cache=False)
        return Recorded(tuple(z), tuple(attention), tuple(residual))

    def projected(self, layer: int, z: Any) -> Any:
        """What the layer's `o_proj` gives of heads' outputs z [..., heads * head_dim]."""
        return self._outputs[layer](z)

    def written(self, layer: int, z: Any) -> Any:
        """What heads' outputs z [..., heads * head_dim] of a layer add to the residual stream,
        [..., width]: through `o_proj` and, in some families, a norm after it."""
        norm = self._arch.facts.modules["o_proj"].norm
        added = self.projected(layer, z)
        return self._arch.module(self._model, norm, layer)(added) if norm else added

    def logits(self, first: int, residual: Any, attention: Sequence[Any], tokens: Any) -> Any:
        """Logits [m, p, k] of `tokens` [m, k] when the blocks from `first` on run with what
        enters that block, [m, p, width], and what the `o_proj` of each of them gives, in turn
        [m, p, width]; with `first` the number of layers, the final norm alone."""
        with self._from(first), self._given(first, residual, attention), self._selected(tokens):
            return self._model(inputs_embeds=residual, use_cache=False).logits

    @contextmanager
    def _from(self, first: int) -> Iterator[None]:
        """While entered, the model has no blocks before `first`."""
        import torch

        path, _, name = self._arch.facts.block.rpartition(".{layer}")[0].rpartition(".")
        holder = self._model.base_model.get_submodule(path)
        every = getattr(holder, name)
        setattr(holder, name, torch.nn.ModuleList(list(every)[first:]))
        try:
            yield
        finally:
            setattr(holder, name, every)

    @contextmanager
    def _given(self, first: int, residual: Any, attention: Sequence[Any]) -> Iterator[None]:
        """While entered, block `first` reads `residual`, and attention gives `attention`."""

        def enter(module: Any, given: Any, named: Any) -> Any:
            return _with_first(residual, given, named)

        with ExitStack() as stack:
            for module, width in self._inputs:
                stack.enter_context(_replaced(module, _zeros(width)))
            for module, value in zip(self._outputs[first:], attention, strict=True):
                stack.enter_context(_replaced(module, _constant(value)))
            hook = self._readers[first].register_forward_pre_hook(enter, with_kwargs=True)
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


def _shortened(hidden: Any) -> Any:
    """In place of logits that nobody reads."""
    return hidden[..., :1]


def _constant(value: Any) -> Callable[..., Any]:
    return lambda *given, **named: value


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
