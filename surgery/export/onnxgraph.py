"""The structure of an ONNX graph: every name made once, before it is used, by a known operator."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.errors import OnnxError, quote
from surgery.export.external import check_tensor

# Operators of onnxruntime's own domain have no schema in the onnx package; it knows them itself.
FOREIGN_DOMAINS = ("com.microsoft",)
_DECLARED = (
    "ai.onnx.training", "ai.onnx.preview", "com.microsoft.experimental", "com.microsoft.nchwc",
    "org.pytorch.aten",
)  # fmt: skip
"""Domains that ONNX Runtime declares in every file it saves, whether a node is of them or not: the
declaration is taken, a node is not."""
_MAX_DEPTH = 32


@dataclass(frozen=True)
class Scope:
    """What a graph may use: operator sets by domain, the model's functions, the data folder."""

    opsets: dict[str, int]
    functions: frozenset[tuple[str, str]]
    folder: Path
    file: str


def check_opsets(model: Any, file: str) -> dict[str, int]:
    """Domain to version of every operator set; unknown or too new ones raise `OnnxError`."""
    from onnx import defs

    newest = {"": defs.onnx_opset_version()}
    for schema in defs.get_all_schemas_with_history():
        newest[schema.domain] = max(newest.get(schema.domain, 0), schema.since_version)
    newest |= {function.domain: 2**63 for function in model.functions if function.domain}
    newest |= dict.fromkeys((*FOREIGN_DOMAINS, *_DECLARED), 2**63)
    found = {}
    for opset in model.opset_import:
        domain = "" if opset.domain == "ai.onnx" else opset.domain
        if domain not in newest:
            raise OnnxError(f"{file}: unknown operator domain {quote(domain)}")
        if not 1 <= opset.version <= newest[domain]:
            raise OnnxError(
                f"{file}: opset {opset.version} of domain {quote(domain)}; "
                f"the newest one known here is {newest[domain]}"
            )
        found[domain] = opset.version
    return found


def check_graph(
    graph: Any, scope: Scope, outer: frozenset[str] = frozenset(), depth: int = 0
) -> None:
    """Checks one graph and the graphs inside its nodes; `outer` are names visible from outside."""
    if depth > _MAX_DEPTH:
        raise OnnxError(f"{scope.file}: graphs nested deeper than {_MAX_DEPTH}")
    given = [value.name for value in graph.input]
    weights = _initializers(graph, scope)
    _refuse_twice(given, "graph input", scope.file)
    _refuse_twice(weights, "initializer", scope.file)
    made = [name for node in graph.node for name in node.output if name]
    # An initializer may be an input's default value; a node's output may be neither.
    _refuse_twice([*{*given, *weights}, *made], "value", scope.file)
    known = _check_nodes(graph.node, scope, outer | {*given, *weights}, depth)
    for value in graph.output:
        if value.name not in known:
            raise OnnxError(f"{scope.file}: graph output {quote(value.name)} is made by no node")


def check_function(function: Any, scope: Scope) -> None:
    """Checks a function of the model: its nodes see its inputs alone."""
    opsets = {("" if o.domain == "ai.onnx" else o.domain): o.version for o in function.opset_import}
    inner = Scope(opsets or scope.opsets, scope.functions, scope.folder, scope.file)
    known = _check_nodes(function.node, inner, frozenset(function.input), 0)
    missing = [name for name in function.output if name not in known]
    if missing:
        raise OnnxError(f"{scope.file}: function output {quote(missing[0])} is made by no node")


def _initializers(graph: Any, scope: Scope) -> list[str]:
    for tensor in graph.initializer:
        check_tensor(tensor, scope.folder, scope.file)
    for sparse in graph.sparse_initializer:
        check_tensor(sparse.values, scope.folder, scope.file)
        check_tensor(sparse.indices, scope.folder, scope.file)
    names = [tensor.name for tensor in graph.initializer]
    return names + [sparse.values.name for sparse in graph.sparse_initializer]


def _refuse_twice(names: list[str], what: str, file: str) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise OnnxError(f"{file}: {what} {quote(name)} is given twice")
        seen.add(name)


def _check_nodes(nodes: Any, scope: Scope, visible: frozenset[str], depth: int) -> set[str]:
    known = set(visible)
    for node in nodes:
        _check_operator(node, scope)
        for name in node.input:
            if name and name not in known:
                raise OnnxError(_unknown_input(nodes, node, name, scope.file))
        for attribute in node.attribute:
            for tensor in _attribute_tensors(attribute):
                check_tensor(tensor, scope.folder, scope.file)
            for graph in [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]:
                check_graph(graph, scope, frozenset(known), depth + 1)
        known.update(name for name in node.output if name)
    return known


def _unknown_input(nodes: Any, node: Any, name: str, file: str) -> str:
    later = any(name in other.output for other in nodes)
    problem = "is made only later: a cycle, or nodes out of order" if later else "is made nowhere"
    return f"{file}: input {quote(name)} of node {quote(node.name or node.op_type)} {problem}"


def _attribute_tensors(attribute: Any) -> Iterator[Any]:
    if attribute.HasField("t"):
        yield attribute.t
    yield from attribute.tensors
    sparse = [attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else []
    for item in [*sparse, *attribute.sparse_tensors]:
        yield item.values
        yield item.indices


def _check_operator(node: Any, scope: Scope) -> None:
    from onnx import defs

    domain = "" if node.domain == "ai.onnx" else node.domain
    if (domain, node.op_type) in scope.functions:
        return
    if domain not in scope.opsets:
        raise OnnxError(
            f"{scope.file}: node {quote(node.op_type)} uses domain {quote(domain)}, not imported"
        )
    if domain in FOREIGN_DOMAINS:
        return
    try:
        defs.get_schema(node.op_type, scope.opsets[domain], domain)
    except defs.SchemaError:
        raise OnnxError(
            f"{scope.file}: unknown operator {quote(node.op_type)} of domain {quote(domain)} "
            f"at opset {scope.opsets[domain]}"
        ) from None
