"""Parts of a live transformers model: parameters swapped for a while, one expert of many."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from surgery.arch import Architecture


@contextmanager
def swapped(
    model: Any, arch: Architecture, changes: Mapping[str, Callable[[Any], Any]]
) -> Iterator[None]:
    """The parameters of stored tensors become what `changes` make of them.

    Where the edited checkpoint stays tied, so do they: a parameter is swapped wherever it is used.
    """
    import torch

    before: list[tuple[Any, str, Any]] = []
    try:
        for tensor, change in changes.items():
            places = _places(model, arch, tensor)
            old = getattr(*places[0])
            before += [(module, name, old) for module, name in places]
            new = torch.nn.Parameter(old.detach().clone(), requires_grad=False)
            for module, name in places:
                setattr(module, name, new)
            # A parameter can hold several tensors of the file, so one is changed within it.
            part = arch.parameter(model, tensor)
            part.copy_(change(part))
        yield
    finally:
        for module, name, old in reversed(before):
            setattr(module, name, old)


def _places(model: Any, arch: Architecture, tensor: str) -> list[tuple[Any, str]]:
    """(module, name) of every parameter of the model that the tensor is loaded into."""
    holder = arch.holder(model, tensor)
    if not arch.tied:
        return [holder]
    wanted = getattr(*holder)
    return [
        (module, name)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter is wanted
    ]
