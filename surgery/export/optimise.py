"""A folded graph with less to do: constants computed, operators without effect gone.

onnxscript's passes read every initializer that has a value. Parameters have none yet, so while the
passes run they are inputs of the graph, which no pass evaluates, merges or drops.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from surgery.export.capture import placeholder
from surgery.export.expressions import Expressions
from surgery.export.fold import drop_unused
from surgery.export.quiet import quiet

FOLD_LIMIT = 1024
"""Elements of the largest constant that is computed from others, or that one is computed from."""

ROUNDS = 4
"""How often constants are computed and rules applied, at most: one may make room for the other."""

RULES = (
    "add_0_rule",
    "sub_0_rule",
    "mul_by_1_rule",
    "div_by_1_rule",
    "dropout_inference_rule",
    "no_op_cast_rule",
    "no_op_expand_rule",
    "no_op_transpose_rule",
    "transpose_transpose_rule",
    "unsqueeze_unsqueeze_rule",
    "reshape_reshape_rule",
    "squeeze_reshape_1d_rule",
    "collapse_slice_rule",
    "collapse_slice2_rule",
    "materialize_reshape_shape_rule",
)
"""onnxscript's rules (onnxscript.rewriter.rules.common) that transformers have a use for and that
change no number. Its default set holds convolutions too, and one rule whose time grows with the
square of the graph."""


def optimise(model: Any, expressions: Expressions) -> None:
    """Optimises the folded `onnx_ir.Model` in place; its outputs stay what they are.

    Types and, as far as they are known, shapes of all values are noted in it.
    """
    named = {node.name for node in model.graph}
    with quiet(), _as_inputs(model.graph, expressions):
        _reduce(model)
        _tidy(model)
    _name(model.graph, named)
    drop_unused(model, expressions)


def _reduce(model: Any) -> None:
    """Computes constants and applies the rules, until neither finds anything.

    Both need shapes: a split is one into so many parts only where the size is known.
    """
    from onnx_ir.passes import common
    from onnxscript.optimizer import fold_constants_ir
    from onnxscript.rewriter import RewritePass
    from onnxscript.rewriter.rules import common as rules

    rewrite = RewritePass([getattr(rules, name) for name in RULES])
    for _ in range(ROUNDS):
        common.ShapeInferencePass()(model)
        folded = fold_constants_ir(
            model,
            onnx_shape_inference=True,
            input_size_limit=FOLD_LIMIT,
            output_size_limit=FOLD_LIMIT,
        )
        rewritten = rewrite(model)
        common.RemoveUnusedNodesPass()(model)
        if not (folded.modified or rewritten.modified):
            return


def _tidy(model: Any) -> None:
    """Constants as initializers, each once, as are nodes; shapes and types of all values."""
    from onnx_ir.passes import common

    for step in (
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.ShapeInferencePass(),
        common.ClearMetadataAndDocStringPass(),
    ):
        step(model)


@contextlib.contextmanager
def _as_inputs(graph: Any, expressions: Expressions) -> Iterator[None]:
    """While entered, the parameters are inputs without a value."""
    parameters = [graph.initializers.pop(name) for name in expressions]
    own = len(graph.inputs)
    for parameter in parameters:
        parameter.const_value = None
    graph.inputs.extend(parameters)
    try:
        yield
    finally:
        del graph.inputs[own:]
        for parameter in parameters:
            parameter.const_value = placeholder(parameter)
            graph.register_initializer(parameter)


def _name(graph: Any, named: set[str]) -> None:
    """Nodes that a pass has made are called after what they give: that has kept its name."""
    for node in graph:
        if node.name not in named:
            node.name = node.outputs[0].name
