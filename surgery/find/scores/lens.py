"""What each state of the residual stream already says of the next token.

The logit lens (nostalgebraist 2020) reads a state by the model's own final norm and head. The
tuned lens (Belrose et al. 2023, arXiv 2303.08112) first maps the state of layer l by an affine
translator, h ↦ W_l h + b_l, trained so that what is read is near, in KL, to what the model says
in the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.checkpoint import TensorFile
from surgery.errors import FindError, quote
from surgery.find.interface import Lab
from surgery.find.prompts.rows import Row, inputs_of
from surgery.find.scores.stream import Stream

ROWS = 16
"""Prompts of one training step."""
CHUNK = 25
"""Steps between two pieces that the journal keeps."""
PARTS, MOMENTS = ("weight", "bias"), ("exp_avg", "exp_avg_sq")

State = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Lens:
    """Translators of the states that enter each layer: weight [layers, width, width] and bias
    [layers, width], float32; y = W·h + b. What enters the final norm is read as it is."""

    weight: NDArray[np.float32]
    bias: NDArray[np.float32]

    def tensors(self) -> dict[str, NDArray[np.float32]]:
        """By the names under which a file has them."""
        layers = range(len(self.weight))
        weights = {f"weight.{layer}": self.weight[layer] for layer in layers}
        return weights | {f"bias.{layer}": self.bias[layer] for layer in layers}

    def translated(self, layer: int, state: Any) -> Any:
        """A torch state [..., width] that enters `layer`, translated; after the last, as it is."""
        import torch

        if layer == len(self.weight):
            return state
        weight, bias = torch.from_numpy(self.weight[layer]), torch.from_numpy(self.bias[layer])
        return state @ weight.T + bias


def identity(layers: int, width: int) -> Lens:
    """Translators that change nothing: the logit lens."""
    weight = np.tile(np.eye(width, dtype=np.float32), (layers, 1, 1))
    return Lens(weight, np.zeros((layers, width), np.float32))


def load_lens(path: Path, layers: int, width: int) -> Lens:
    """The translators of a safetensors file: `weight.L` [width, width] and `bias.L` [width] for
    every layer L; raises `FindError` for those of another model, `CheckpointError` for no file."""
    file = TensorFile.open(path)
    wanted = {
        **{f"weight.{layer}": (width, width) for layer in range(layers)},
        **{f"bias.{layer}": (width,) for layer in range(layers)},
    }
    if set(file.tensors) != set(wanted):
        raise FindError(
            f"{path}: expected the tensors weight.L and bias.L for layers 0 to {layers - 1}; found "
            f"{len(file.tensors)} tensors, first {quote(min(file.tensors, default='none'))}"
        )
    return Lens(
        np.stack([_tensor(file, f"weight.{n}", wanted) for n in range(layers)]),
        np.stack([_tensor(file, f"bias.{n}", wanted) for n in range(layers)]),
    )


def _tensor(
    file: TensorFile, name: str, wanted: Mapping[str, tuple[int, ...]]
) -> NDArray[np.float32]:
    shape = file.info(name).shape
    if shape != wanted[name]:
        raise FindError(
            f"{file.path}: {quote(name)} has shape {list(shape)}; expected {list(wanted[name])}"
        )
    numbers = file.read(name).astype(np.float32)
    if not np.isfinite(numbers).all():
        raise FindError(f"{file.path}: {quote(name)} holds NaN or infinities")
    return numbers


@dataclass(frozen=True)
class Training:
    """How a lens is trained: `steps` of Adam at a rate that falls linearly from `rate` to 0."""

    rows: tuple[Row, ...]
    steps: int
    rate: float
    seed: int

    def drawn(self, step: int) -> list[Row]:
        """The prompts of a step: by its number, so that a run that was stopped goes on as it
        would have gone."""
        generator = np.random.default_rng((self.seed, step))
        size = min(ROWS, len(self.rows))
        drawn = generator.choice(len(self.rows), size=size, replace=False)
        return [self.rows[index] for index in drawn]


def fit(lab: Lab, stream: Stream, training: Training) -> Lens:
    """Translators trained from the identity, on all positions of the prompts, to the least mean
    KL(the model's distribution ‖ the lens's), each layer's by itself."""
    lens = identity(lab.arch.layers, lab.arch.width)
    state: State = {"weight": lens.weight, "bias": lens.bias}
    state |= {f"{name}.{k}": np.zeros_like(state[name]) for name in PARTS for k in MOMENTS}
    for first in range(0, training.steps, CHUNK):
        lab.progress("training the lens", first, training.steps)
        steps = range(first, min(first + CHUNK, training.steps))

        def train(state: State = state, steps: range = steps) -> State:
            return _train(lab, stream, training, state, steps)

        state = lab.journal.arrays(f"lens after {steps.stop} steps", train)
    return Lens(state["weight"], state["bias"])


def _train(lab: Lab, stream: Stream, training: Training, state: State, steps: range) -> State:
    """The state after some steps more: numbers and both of Adam's moments, [layers, …] each."""
    import torch

    parts = {
        name: [torch.from_numpy(own.copy()).requires_grad_() for own in state[name]]
        for name in PARTS
    }
    optimiser = torch.optim.Adam([p for own in parts.values() for p in own])
    for name, own in parts.items():
        for layer, parameter in enumerate(own):
            optimiser.state[parameter] = {
                "step": torch.tensor(float(steps.start)),
                **{k: torch.from_numpy(state[f"{name}.{k}"][layer].copy()) for k in MOMENTS},
            }
    for step in steps:
        optimiser.param_groups[0]["lr"] = training.rate * (1 - step / training.steps)
        _differentiate(stream, inputs_of(lab.runtime, training.drawn(step)), parts)
        optimiser.step()
    return _collected(parts, optimiser)


def _collected(parts: Mapping[str, Sequence[Any]], optimiser: Any) -> State:
    found = {name: np.stack([p.detach().numpy() for p in own]) for name, own in parts.items()}
    for name, own in parts.items():
        for k in MOMENTS:
            found[f"{name}.{k}"] = np.stack([optimiser.state[p][k].numpy() for p in own])
    return found


def _differentiate(
    stream: Stream, inputs: Mapping[str, Any], parts: Mapping[str, Sequence[Any]]
) -> None:
    """Sets the gradient of each layer's mean KL over real positions."""
    import torch

    states = stream.states(inputs)
    real = inputs["attention_mask"] == 1
    with torch.no_grad():
        final = stream.logits(states[-1])[real].log_softmax(-1)
    with torch.enable_grad():
        for state, weight, bias in zip(states, parts["weight"], parts["bias"], strict=False):
            logs = stream.logits(state @ weight.T + bias)[real].log_softmax(-1)
            loss = (final.exp() * (final - logs)).sum(-1).mean()
            weight.grad, bias.grad = torch.autograd.grad(loss, (weight, bias))
