"""Which checkpoint tensors a live model's parameters are made of.

transformers renames some tensors when it loads them and keeps experts in stacks; the facts of a
family say where (`LiveFact`). So the parameters of a captured graph are found without a model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from surgery.arch import Architecture, Role
from surgery.arch.facts import ModuleFact
from surgery.checkpoint import Checkpoint
from surgery.errors import CheckpointError, ExportError, quote
from surgery.export.expressions import Concat, Expression, Stack, Tensor

_Place = tuple[int | None, int]
"""Expert, and which part of the parameter."""


def sources(arch: Architecture, prefix: str) -> dict[str, Expression]:
    """Parameter name to what it is made of, for every tensor of the file.

    `prefix` is what the live model puts before its base model's names.
    """
    pieces: dict[str, dict[_Place, Expression]] = defaultdict(dict)
    for tensor, role in arch.roles.items():
        module = arch.facts.modules[role.role]
        live = module.live if role.kind == "weight" else None
        part = live.part[0] if live and live.part else 0
        pieces[_parameter(module, role, prefix)][role.expert, part] = Tensor(tensor)
    return {name: _joined(found) for name, found in pieces.items()}


def source(
    names: Sequence[str], known: Mapping[str, Expression], checkpoint: Checkpoint
) -> Expression:
    """What a parameter is made of that the model calls by any of `names`, being tied.

    Raises `ExportError` where there is nothing, or where tensors the model ties differ.
    """
    found = [known[name] for name in names if name in known]
    if not found:
        raise ExportError(f"{checkpoint.root}: has no tensor for parameter {quote(names[0])}")
    for other in found[1:]:
        if not _same(found[0], other, checkpoint):
            both = " and ".join(quote(", ".join(one.tensors())) for one in (found[0], other))
            raise ExportError(
                f"{checkpoint.root}: the config ties {both}, but they differ; set "
                "tie_word_embeddings to false"
            )
    return found[0]


def parameters(model: Any, arch: Architecture, checkpoint: Checkpoint) -> dict[str, Expression]:
    """Every parameter's name in a transformers `model`, tied ones too, to what it is made of.

    Names that the model ties and that each have a tensor are each made of their own, as
    transformers loads them. Raises `CheckpointError` for one that has no tensor of its shape.
    """
    known = sources(arch, "" if model.base_model is model else f"{model.base_model_prefix}.")
    named = dict(model.named_parameters(remove_duplicate=False))
    tied: dict[int, list[str]] = defaultdict(list)
    for name, parameter in named.items():
        tied[id(parameter)].append(name)
    found = {}
    for name, parameter in named.items():
        own = next((known[n] for n in (name, *tied[id(parameter)]) if n in known), None)
        shape = own.shape(checkpoint) if own else None
        if own is None or shape != tuple(parameter.shape):
            raise CheckpointError(
                f"{checkpoint.root}: expected numbers {list(parameter.shape)} for parameter "
                f"{quote(name)}; found {'no tensor' if shape is None else list(shape)}"
            )
        found[name] = own
    return found


def _parameter(module: ModuleFact, role: Role, prefix: str) -> str:
    live = module.live
    path = (live.path if live else module.path).format(layer=role.layer, expert=role.expert)
    named = live.parameter if live and role.kind == "weight" else role.kind
    suffix = "bias" if module.type == "bias" else named
    return f"{'' if module.root else prefix}{path}.{suffix}"


def _joined(pieces: Mapping[_Place, Expression]) -> Expression:
    experts: dict[int | None, list[Expression]] = defaultdict(list)
    for expert, part in sorted(pieces, key=lambda place: (place[0] or 0, place[1])):
        experts[expert].append(pieces[expert, part])
    whole = [parts[0] if len(parts) == 1 else Concat(tuple(parts)) for parts in experts.values()]
    return whole[0] if None in experts else Stack(tuple(whole))


def _same(one: Expression, other: Expression, checkpoint: Checkpoint) -> bool:
    if one.shape(checkpoint) != other.shape(checkpoint):
        return False
    return one.read(checkpoint).tobytes() == other.read(checkpoint).tobytes()
