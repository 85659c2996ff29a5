"""How a graph uses its initializers: as which operand, transposed or not, for which module.

Exporters rename what they fold (`val_41`, `onnx::MatMul_107`), but a node still says which module
it came from: PyTorch's in its metadata (`pkg.torch.onnx.name_scopes`), the older one's in the
node's own name (`/model/layers.0/self_attn/q_proj/MatMul`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

PRODUCTS = ("MatMul", "Gemm", "FusedMatMul", "MatMulInteger", "DynamicQuantizeMatMul")
LOOKUP = "Gather"
_SCOPES = "pkg.torch.onnx.name_scopes"
_QUOTED = re.compile(r"'([^']*)'")
_MAX_SCOPES = 4096


@dataclass(frozen=True)
class Use:
    """One use: the operator, which operand, whether it sees the initializer transposed, and the
    module paths its node names, innermost first."""

    op: str
    operand: int
    transposed: bool
    scopes: tuple[str, ...]


def uses(graph: Any) -> dict[str, list[Use]]:
    """Every use of each initializer, through casts, transpositions and dequantisation."""
    origins = {tensor.name: (tensor.name, False) for tensor in graph.initializer}
    found: dict[str, list[Use]] = {}
    for node in graph.node:
        turns = _passes(node)
        if turns is not None and node.input and node.input[0] in origins:
            name, transposed = origins[node.input[0]]
            origins[node.output[0]] = name, transposed ^ turns
            continue
        for operand, value in enumerate(node.input):
            if value in origins:
                name, transposed = origins[value]
                use = Use(node.op_type, operand, transposed ^ _turns(node, operand), _scopes(node))
                found.setdefault(name, []).append(use)
    return found


def _passes(node: Any) -> bool | None:
    """Whether a node that only hands its operand on transposes it; None for any other node."""
    if node.op_type in ("Cast", "Identity", "DequantizeLinear"):
        return False
    if node.op_type == "Transpose":
        order = [list(a.ints) for a in node.attribute if a.name == "perm"]
        return True if order == [[1, 0]] else None
    return None


def _turns(node: Any, operand: int) -> bool:
    """Whether a product transposes this operand itself."""
    flags = {"Gemm": ("transA", "transB"), "FusedMatMul": ("transA", "transB")}
    names = flags.get(node.op_type, ())
    if operand >= len(names):
        return False
    return any(a.name == names[operand] and a.i for a in node.attribute)


def _scopes(node: Any) -> tuple[str, ...]:
    found = list(_from_metadata(node))
    if not found and node.name.startswith("/"):
        found = [".".join(node.name[1:].split("/")[:-1])]
    return tuple(path for path in found if path)


def _from_metadata(node: Any) -> Iterator[str]:
    for entry in node.metadata_props:
        if entry.key == _SCOPES:
            paths = _QUOTED.findall(entry.value[:_MAX_SCOPES])
            yield from reversed(paths[:-1])  # the last is the operation itself
