"""Parameters of a live transformers model, swapped while a context lasts."""

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
    before: list[tuple[Any, str, Any]] = []
    try:
        for tensor, change in changes.items():
            places = _places(model, arch, tensor)
            before += [(module, name, getattr(module, name)) for module, name in places]
            new = _parameter(change(getattr(*places[0])))
            for module, name in places:
                setattr(module, name, new)
        yield
    finally:
        for module, name, old in before:
            setattr(module, name, old)


def _places(model: Any, arch: Architecture, tensor: str) -> list[tuple[Any, str]]:
    """(module, name) of every parameter of the model that the tensor is loaded into."""
    role = arch.roles[tensor]
    module = arch.module(model, role.role, role.layer)
    if not arch.tied:
        return [(module, role.kind)]
    wanted = getattr(module, role.kind)
    return [
        (holder, name)
        for holder in model.modules()
        for name, parameter in holder.named_parameters(recurse=False)
        if parameter is wanted
    ]


def _parameter(values: Any) -> Any:
    import torch

    return torch.nn.Parameter(values, requires_grad=False)
