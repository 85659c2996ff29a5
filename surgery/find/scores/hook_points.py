"""Hook points of a live model: what an autoencoder reads there, and what goes on from there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from surgery.arch import Architecture
from surgery.edits.autoencoders.hooks import MLP_INPUT, Point, named_modules
from surgery.errors import FindError

Change = Callable[[Any], Any]


@contextmanager
def tapped(
    model: Any, arch: Architecture, point: Point, shape: tuple[int, int], change: Change
) -> Iterator[None]:
    """While entered, the activation [batch, length, width] at `point` becomes what `change` makes
    of it, in runs of `shape` (batch, length). Raises `FindError` for a point that is not there.
    """
    module, side = module_at(model, arch, point)

    def changed(value: Any) -> Any:
        # Some families flatten batch and length before their MLP.
        return change(value.reshape(*shape, -1)).reshape(value.shape)

    def before(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (changed(inputs[0]), *inputs[1:])

    def after(module: Any, inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (changed(output[0]), *output[1:])
        return changed(output)

    if side == "input":
        handle = module.register_forward_pre_hook(before)
    else:
        handle = module.register_forward_hook(after)
    with handle:
        yield


def module_at(model: Any, arch: Architecture, point: Point) -> tuple[Any, str]:
    """The live module whose `input` or `output` is the activation at `point`.

    Raises `FindError` where there is none.
    """
    sequential = arch.facts.norms != "post" and not arch.facts.parallel
    if point.site == "hook_resid_mid" and sequential:
        return arch.module(model, "mlp_norm", point.layer), "input"
    found = [(path, side) for path, side, site in named_modules(arch) if site == point.site]
    inside_mlp = point.site in (MLP_INPUT, "hook_mlp_out")
    if not found or (inside_mlp and point.layer in arch.sparse):
        raise FindError(
            f"{arch.family} has no single activation at {point}; give an autoencoder of the "
            "residual stream, of hook_attn_out or of attn.hook_z"
        )
    path, side = found[0]
    return model.base_model.get_submodule(path.format(layer=point.layer)), side
