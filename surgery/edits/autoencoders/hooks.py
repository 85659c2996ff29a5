"""Hook points, as TransformerLens calls them or by the path of a module.

`blocks.3.hook_resid_post` and `model.layers.3` are one place: the output of block 3. A path stands
for the module's output unless it ends in `.input`; `.output` may be said. What the first matrix of
an MLP reads is `blocks.3.mlp.input`, or the input of the MLP or of that matrix, or the output of
the norm before it. TransformerLens calls that `blocks.3.ln2.hook_normalized` (`ln1` where attention
reads the same, or where norms follow what blocks write) in a model that is loaded without
processing, but for an RMS norm, whose weight it applies after the hook: there the name means
nothing here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from surgery.arch import Architecture
from surgery.edits.autoencoders.interface import Autoencoder
from surgery.errors import EditError, quote

MLP_INPUT = "mlp.input"
_NAME = re.compile(r"blocks\.(\d{1,6})\.([A-Za-z0-9_.]+)")
_OUTPUTS = {"o_proj": "hook_attn_out", "down_proj": "hook_mlp_out"}
_STREAM = {"o_proj": "hook_resid_mid", "down_proj": "hook_resid_post"}
_ADDS_STREAM = {("bloom", "o_proj"), ("bloom", "down_proj"), ("mpt", "down_proj")}
"""Where the module around a projection gives back the stream with what it adds to it."""


@dataclass(frozen=True)
class Point:
    """Hook point `site` of block `layer`, as TransformerLens names it."""

    layer: int
    site: str

    def __str__(self) -> str:
        return f"blocks.{self.layer}.{self.site}"


def point_of(sae: Autoencoder, given: str | None, arch: Architecture) -> Point:
    """Where `sae` belongs: by its own files, by the recipe's `given`, or by both alike.

    Raises `EditError` where neither says it, or where they disagree.
    """
    named = None if sae.hook is None else parse(sae.hook, arch)
    point = named if given is None else parse(given, arch)
    if point is None:
        found = sae.hook if given is None else given
        raise EditError(
            f"{sae.path}: {'names no hook point' if found is None else _unknown(found, arch)}; "
            f"say hook: blocks.{sae.layer or 0}.hook_resid_post, or what it is"
        )
    if named not in (None, point) or sae.layer not in (None, point.layer):
        raise EditError(
            f"{sae.path}: belongs to {named or f'layer {sae.layer}'}, the hook is said to be "
            f"{point}; leave hook out or correct it"
        )
    return point


def parse(name: str, arch: Architecture) -> Point | None:
    """The point `name` means in a model of `arch`; None where it means none."""
    path, _, side = name.rpartition(".")
    if side not in ("input", "output"):
        path, side = name, "output"
    for template, at, site in named_modules(arch):
        pattern = re.escape(template).replace(re.escape("{layer}"), r"(\d{1,6})")
        prefixes = "|".join(map(re.escape, arch.facts.prefixes))
        match = re.fullmatch(f"(?:{prefixes}){pattern}", path)
        if match and at == side:
            return Point(int(match[1]), site)
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    site = MLP_INPUT if match[2] == _normalized(arch) else match[2]
    return Point(int(match[1]), site)


def _normalized(arch: Architecture) -> str | None:
    """What TransformerLens calls the normalised stream that the MLP reads."""
    if arch.facts.norm == "rms":
        return None
    return "ln2.hook_normalized" if _norm_before(arch) == "mlp_norm" else "ln1.hook_normalized"


def _norm_before(arch: Architecture) -> str:
    """The role of the norm whose output the MLP reads."""
    return arch.facts.modules[arch.mlp_inputs[0]].norm or "attention_norm"


def named_modules(arch: Architecture) -> Iterator[tuple[str, str, str]]:
    """Path of a module, `input` or `output`, and the site that is."""
    facts = arch.facts
    yield facts.block, "input", "hook_resid_pre"
    yield facts.block, "output", "hook_resid_post"
    yield facts.modules["o_proj"].path, "input", "attn.hook_z"
    for role, site in _OUTPUTS.items():
        module = facts.modules.get(role)
        if module is None:
            continue
        if module.norm is None:
            yield module.path, "output", site
            around = module.path.rpartition(".")[0]
            adds = (arch.family, role) in _ADDS_STREAM
            if around != facts.block:
                yield around, "output", _STREAM[role] if adds else site
        elif facts.norms == "both":
            yield facts.modules[module.norm].path, "output", site
    if arch.mlp_inputs:
        yield from _before_mlp(arch)


def _before_mlp(arch: Architecture) -> Iterator[tuple[str, str, str]]:
    """The same for the modules that give or take what the MLP reads."""
    facts, first = arch.facts, arch.facts.modules[arch.mlp_inputs[0]].path
    around = first.rpartition(".")[0]
    yield facts.modules[_norm_before(arch)].path, "output", MLP_INPUT
    yield from ((facts.modules[role].path, "input", MLP_INPUT) for role in arch.mlp_inputs)
    if around != facts.block:
        yield around, "input", MLP_INPUT


def _unknown(name: str, arch: Architecture) -> str:
    return f"{quote(name)} is no hook point of {arch.family}"
