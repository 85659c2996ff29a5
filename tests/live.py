"""Live models beside their files: what a region of the file does, what modules take and give."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from oracles import load_model

from surgery.addresses import Region
from surgery.arch import Architecture, identify
from surgery.checkpoint import SINGLE, Checkpoint

LAYERS, HEADS, WIDTH = 2, 4, 32
IDS = torch.randint(3, 101, (3, 7), generator=torch.Generator().manual_seed(1))
REAL = torch.arange(7)[None] < torch.tensor([7, 5, 3])[:, None]
Tensor = torch.Tensor


class Live:
    """A model of `MODELS` and copies of it with other numbers in its file."""

    def __init__(self, name: str, base: Path, scratch: Path) -> None:
        self.name, self.base, self.scratch = name, base, scratch
        self.arch: Architecture = identify(Checkpoint.open(base))
        self.model = load_model(base)
        self.dim = self.arch.sizes["head_dim"]

    def scaled(self, regions: Sequence[Region], factor: float = 0.0) -> Any:
        """The live model of the file with `regions` multiplied by `factor`."""
        from safetensors.torch import load_file, save_file

        folder = self.scratch / "scaled"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.base, folder)
        tensors = load_file(folder / SINGLE)
        for region in regions:
            tensors[region.tensor][region.slices] *= factor
        save_file(tensors, folder / SINGLE, {"format": "pt"})
        return load_model(folder)


def run(model: Any, padded: bool = False) -> None:
    mask = REAL if padded else torch.ones_like(REAL)
    with torch.no_grad():
        model(input_ids=IDS, attention_mask=mask.long())


@contextmanager
def taken(
    arch: Architecture, model: Any, places: Sequence[tuple[str, int | None]]
) -> Iterator[Any]:
    """Inputs and outputs [batch, length, …] of modules as `(role, layer): (input, output)`."""
    kept: dict[tuple[str, int | None], tuple[Tensor, Tensor]] = {}

    def keep(place: tuple[str, int | None]) -> Callable[..., None]:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            made = output[0] if isinstance(output, tuple) else output
            # Copies: some models add to what a module put out, in place.
            kept[place] = (_by_position(inputs[0]).clone(), _by_position(made).clone())

        return hook

    with ExitStack() as stack:
        for role, layer in places:
            module = arch.module(model, role, layer)
            stack.enter_context(module.register_forward_hook(keep((role, layer))))
        yield kept


def _by_position(x: Tensor) -> Tensor:
    """`x` [batch, length, …], as modules that flatten the batch do not have it."""
    return x.detach().reshape(*IDS.shape, -1) if x.shape[0] == IDS.numel() else x.detach()


def inputs_of(live: Live, model: Any, role: str, layer: int, padded: bool = False) -> Tensor:
    """The input of a module in a run on `IDS`."""
    with taken(live.arch, model, [(role, layer)]) as kept:
        run(model, padded)
    return kept[role, layer][0]


def dense_layers(live: Live) -> list[int]:
    """The layers whose MLP is one module, by what the live model is made of."""
    blocks = [live.arch.block(live.model, layer) for layer in range(LAYERS)]
    return [
        i for i, b in enumerate(blocks) if not any("experts" in n for n, _ in b.named_modules())
    ]


def whole_of(live: Live, tensor: str) -> Region:
    return Region.whole(tensor, tuple(Checkpoint.open(live.base).info(tensor).shape))


def band_of(live: Live, tensor: str, axis: int, index: int) -> Region:
    return Region.band(tensor, whole_of(live, tensor).stop, axis, index, index + 1)


def block_input(live: Live, layer: int) -> Tensor:
    """The residual stream before block `layer`, in a run on `IDS`."""
    kept: list[Tensor] = []
    block = live.arch.block(live.model, layer)
    with block.register_forward_pre_hook(lambda module, inputs: kept.append(inputs[0])):
        run(live.model)
    return kept[0].detach()


def block_output(live: Live, model: Any, layer: int) -> Tensor:
    kept = []

    def keep(module: Any, inputs: Any, output: Any) -> None:
        kept.append(output[0] if isinstance(output, tuple) else output)

    with live.arch.block(model, layer).register_forward_hook(keep):
        run(model)
    return torch.as_tensor(kept[0].detach().reshape(*IDS.shape, -1))


def live_writers(live: Live) -> list[tuple[str, int | None]]:
    roles = (live.arch.roles[w.tensor] for w in live.arch.writers(range(LAYERS), True))
    return list(dict.fromkeys((role.role, role.layer) for role in roles))
