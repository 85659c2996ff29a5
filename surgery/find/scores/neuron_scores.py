"""What each MLP neuron adds to the log-probability of the model's own choice, w*.

w* is the token of the largest logit at the last position, and a score is positive where the neuron
supports it. A neuron's activation m is what the down projection reads of it; of n prompts in a
model of L layers of N neurons, scores are [n, L, N], float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.arch import Architecture
from surgery.find.prompts.rows import Inputs, is_real
from surgery.find.scores.readout import FrozenNorm, Readout

SLICE_BYTES = 64 << 20
"""Of logits that are made at once."""

Scores = NDArray[np.float32]


@dataclass(frozen=True)
class Recorded:
    """The last position of n prompts, as torch tensors.

    Of each layer, residual: the stream before the MLP adds to it, [n, width]; active: m, [n, N],
    times the scale of the norm after the MLP where there is one. choice: w*, [n]; scale: that of
    the final norm, [n, 1].
    """

    residual: tuple[Any, ...]
    active: tuple[Any, ...]
    choice: Any
    scale: Any


class Attribution:
    """Direct effect at the last position, of one model (arXiv 2505.16538, section 5).

    score = log p(w* | r + m·v) − log p(w* | r), r the stream after attention (of parallel blocks:
    all but what the MLP adds), v the neuron's column of the down projection; p through the final
    norm and the head, with the variance of the final state. Where what the MLP writes is normalised
    first, v passes that norm, with the variance of the MLP's whole output.

    Logits are then linear in m: those of r plus m times the head's product with v, which is made
    once for all prompts.
    """

    def __init__(self, model: Any, arch: Architecture) -> None:
        self._model, self._arch = model, arch
        self._readout = Readout(model, arch)
        after = arch.facts.modules["down_proj"].norm
        layers = range(arch.layers)
        self._norms = [
            FrozenNorm(arch.module(model, after, layer), arch) if after else None
            for layer in layers
        ]

    def record(self, inputs: Inputs) -> Recorded:
        """A run of prompts; raises `FindError` where the head is not read right."""
        import torch

        arch, layers = self._arch, range(self._arch.layers)
        with torch.no_grad(), _kept(self._model, arch, inputs) as kept:
            logits = last_logits(self._model, inputs)
            final = kept["final"]
            self._readout.check(final, logits)
            return Recorded(
                tuple(kept["block", n] + kept["attended", n] for n in layers),
                tuple(self._active(n, kept["active", n], kept["written", n]) for n in layers),
                logits.argmax(-1),
                self._readout.norm.scale(final),
            )

    def _active(self, layer: int, active: Any, written: Any) -> Any:
        norm = self._norms[layer]
        return active if norm is None else active * norm.scale(written)

    def scores(self, layer: int, recorded: Recorded, budget: int) -> Scores:
        """Of the neurons of one layer, [n, N]; at most `budget` neurons at a time."""
        import torch

        readout, columns = self._readout, self._columns(layer)
        size = max(1, min(budget, SLICE_BYTES // (4 * readout.vocab)))
        prompts, neurons = recorded.active[layer].shape
        found = np.empty((prompts, neurons), np.float32)
        with torch.no_grad():
            without = readout.constant + recorded.scale * readout.directions(
                recorded.residual[layer]
            )
            steps = recorded.scale * recorded.active[layer]
            for start in range(0, neurons, size):
                part = slice(start, start + size)
                directions = readout.directions(columns[part])
                for row in range(prompts):
                    added = without[row] + steps[row, part, None] * directions
                    both = torch.cat([without[row][None], added])
                    choice = recorded.choice[row].expand(len(both))
                    logp = log_probability(readout.finish(both), choice)
                    found[row, part] = (logp[1:] - logp[0]).numpy()
        return found

    def _columns(self, layer: int) -> Any:
        """What one unit of each neuron adds to the stream, [N, width]."""
        weight = self._arch.module(self._model, "down_proj", layer).weight.detach()
        columns = weight.T if self._arch.input_axis("down_proj") == 1 else weight
        norm = self._norms[layer]
        return columns if norm is None else norm.direction(columns)


def gradient_scores(model: Any, arch: Architecture, inputs: Inputs) -> Scores:
    """First order of taking the neuron away: m·∂ log p(w*)/∂m, summed over real positions."""
    import torch

    found: list[tuple[Any, Any]] = []

    def vary(module: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
        change = torch.zeros_like(given[0]).requires_grad_()
        found.append((given[0].detach(), change))
        return (given[0] + change, *given[1:])

    with torch.enable_grad(), ExitStack() as stack:
        for layer in range(arch.layers):
            down = arch.module(model, "down_proj", layer)
            stack.enter_context(down.register_forward_pre_hook(vary))
        logits = last_logits(model, inputs)
        logp = log_probability(logits, logits.argmax(-1))
        slopes = torch.autograd.grad(logp.sum(), [change for _, change in found])
    real = is_real(inputs)[..., None]
    of_layers = [
        torch.where(real, (active * slope).reshape(*real.shape[:2], -1), 0).sum(1)
        for (active, _), slope in zip(found, slopes, strict=True)
    ]
    return np.stack([scores.numpy() for scores in of_layers], axis=1)


def ablation_scores(
    model: Any,
    arch: Architecture,
    inputs: Inputs,
    neurons: Mapping[int, Sequence[int]],
    budget: int,
) -> Scores:
    """How much log p(w*) falls when a neuron is zero at every position: the whole model runs.

    `inputs` are of one prompt, `neurons` those to measure of each layer; of others the score is 0.
    As many run at a time as have `budget` positions together. [L, N].
    """
    import torch

    size = max(1, budget // inputs["input_ids"].shape[1])
    found = np.zeros((arch.layers, arch.sizes["mlp_width"]), np.float32)
    with torch.no_grad():
        logits = last_logits(model, inputs)
        choice = logits.argmax(-1)
        whole = float(log_probability(logits, choice))
        for layer, listed in neurons.items():
            for start in range(0, len(listed), size):
                part = list(listed[start : start + size])
                rows = {name: value.expand(len(part), -1) for name, value in inputs.items()}
                with _zeroed(arch.module(model, "down_proj", layer), part):
                    logp = log_probability(last_logits(model, rows), choice.expand(len(part)))
                found[layer, part] = whole - logp.numpy()
    return found


@contextmanager
def _zeroed(down: Any, neurons: Sequence[int]) -> Iterator[None]:
    """While entered, row i of a batch runs with `neurons[i]` zero."""
    import torch

    def zero(module: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
        # Some families flatten the batch, so rows are made again.
        active = given[0].clone()
        active.view(len(neurons), -1, active.shape[-1])[rows, :, neurons] = 0
        return (active, *given[1:])

    rows = torch.arange(len(neurons))
    with down.register_forward_pre_hook(zero):
        yield


def last_logits(model: Any, inputs: Inputs) -> Any:
    """Logits of the last position, [n, vocab]."""
    return model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1]


def log_probability(logits: Any, tokens: Any) -> Any:
    """log p of each row's own token, `tokens` [n], under its logits [n, vocab]: [n]."""
    return logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(-1)


@contextmanager
def _kept(model: Any, arch: Architecture, inputs: Inputs) -> Iterator[dict[Any, Any]]:
    """What enters and leaves modules at the last position while the model runs on `inputs`, by
    name and layer: `block` and `active` enter the block and the down projection, `attended` and
    `written` are what attention and the MLP write; `final` enters the final norm."""
    kept: dict[Any, Any] = {}
    shape = inputs["input_ids"].shape

    def last(value: Any) -> Any:
        # Copies: some models add to what a module put out, in place.
        return value.reshape(*shape, -1)[:, -1].clone()

    def enters(name: Any) -> Callable[..., None]:
        def hook(module: Any, given: Any, named: Any) -> None:
            kept[name] = last(given[0] if given else next(iter(named.values())))

        return hook

    def leaves(name: Any) -> Callable[..., None]:
        return lambda module, given, result: kept.__setitem__(name, last(result))

    with ExitStack() as stack:

        def watch_input(module: Any, name: Any) -> None:
            hook = module.register_forward_pre_hook(enters(name), with_kwargs=True)
            stack.enter_context(hook)

        watch_input(arch.module(model, "final_norm"), "final")
        attends = arch.facts.modules["o_proj"].norm or "o_proj"
        for layer in range(arch.layers):
            down = arch.module(model, "down_proj", layer)
            watch_input(arch.block(model, layer), ("block", layer))
            watch_input(down, ("active", layer))
            stack.enter_context(down.register_forward_hook(leaves(("written", layer))))
            writer = arch.module(model, attends, layer)
            stack.enter_context(writer.register_forward_hook(leaves(("attended", layer))))
        yield kept
