"""Which checkpoint tensor a parameter name means."""

from __future__ import annotations

from collections.abc import Iterable


def find_tensor(name: str, tensors: Iterable[str]) -> str | None:
    """The tensor called `name`, or so but for the base model's prefix, which a file may lack.

    `transformer.wte.weight` and `wte.weight` name the same tensor, in either direction. None
    where there is no such tensor, or more than one.
    """
    known = list(tensors)
    if name in known:
        return name
    _, _, bare = name.partition(".")
    near = [tensor for tensor in known if tensor == bare or tensor.partition(".")[2] == name]
    return near[0] if len(near) == 1 else None
