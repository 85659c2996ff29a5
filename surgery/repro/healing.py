"""The nearest model that is right: one thing changed in the failing one, else a fresh export."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.errors import quote
from surgery.repro.parts import copied, ending_at

TRIALS = 300
"""How many changes are tried."""
_FAR = 3
"""How many nodes in a row are tried to be left out."""

Array = NDArray[Any]
Candidate = tuple[str, Any]
"""What was changed, in words, and the model with it."""


def nearest(
    failing: Any,
    fresh: Any | None,
    strict: bool,
    well: Callable[[Any], bool],
    right: Callable[[Any], bool],
) -> Candidate | None:
    """The first change that makes a part right; None where none does.

    A fresh export need be `right`, a change `well` so: a little less error is no cure. `fresh` is
    the same part of a fresh export of ours, if there is one; of a model's own output
    (`strict`) operators come first, of anything else its numbers.
    """
    tensors = [] if fresh is None else [_tensors(failing, fresh)]
    nodes = [] if fresh is None else [_nodes(failing, fresh)]
    own = [_bypassed(failing), *nodes, _shorter(failing)]
    for source in [*own, *tensors] if strict else [*tensors, *own]:
        for words, model in islice(source, TRIALS):
            if well(model):
                return words, model
    if fresh is not None and right(fresh):
        return "the same part of a fresh export", fresh
    return None


def _tensors(failing: Any, fresh: Any) -> Iterator[Candidate]:
    """One initializer exchanged for one of the fresh part."""
    from onnx import numpy_helper

    known = list(_constants(fresh))
    for number, mine in enumerate(failing.graph.initializer):
        for other in known:
            for values in _ways(numpy_helper.to_array(mine), other):
                model = copied(failing)
                model.graph.initializer[number].CopyFrom(numpy_helper.from_array(values, mine.name))
                yield f"initializer {quote(mine.name)} with the numbers of a fresh export", model


def _constants(model: Any) -> Iterator[Array]:
    """The numbers of its initializers and of its nodes that are nothing but numbers."""
    from onnx import numpy_helper

    for tensor in model.graph.initializer:
        yield numpy_helper.to_array(tensor)
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            yield numpy_helper.to_array(node.attribute[0].t)


def _ways(own: Array, new: Array) -> Iterator[Array]:
    """The new numbers as they could be in the place of the own: as they are, or turned."""
    turned = new.T if new.ndim == 2 else new
    for values in (new, turned) if new.ndim == 2 else (new,):
        single = own.size == values.size == 1
        alike = (single or own.shape == values.shape) and own.dtype == values.dtype
        if alike and not np.array_equal(own.reshape(-1), values.reshape(-1)):
            yield np.ascontiguousarray(values).reshape(own.shape)


def _nodes(failing: Any, fresh: Any) -> Iterator[Candidate]:
    """One operator exchanged, with its attributes, for one of the fresh part."""
    for number, mine in enumerate(failing.graph.node):
        seen = {_kind(mine)}
        for other in fresh.graph.node:
            sizes = len(mine.input) == len(other.input), len(mine.output) == len(other.output)
            if all(sizes) and _kind(other) not in seen:
                seen.add(_kind(other))
                model = copied(failing)
                node = model.graph.node[number]
                node.op_type, node.domain = other.op_type, other.domain
                del node.attribute[:]
                node.attribute.extend(other.attribute)
                yield f"{mine.op_type} {quote(mine.output[0])} as {_told(other)}", model


def _kind(node: Any) -> tuple[str, str, tuple[bytes, ...]]:
    attributes = sorted(a.SerializeToString(deterministic=True) for a in node.attribute)
    return node.domain, node.op_type, tuple(attributes)


def _told(node: Any) -> str:
    from onnx import helper

    listed = [helper.printable_attribute(a) for a in node.attribute]
    return f"{node.op_type}({', '.join(listed)})" if listed else str(node.op_type)


def _bypassed(failing: Any) -> Iterator[Candidate]:
    """One or a few nodes in a row that pass on what they are given."""
    maker = {name: node for node in failing.graph.node for name in node.output}
    for number, node in enumerate(failing.graph.node):
        source = node
        for count in range(1, _FAR + 1):
            if not source.input or not source.input[0]:
                break
            model = copied(failing)
            own = model.graph.node[number]
            own.CopyFrom(type(node)(op_type="Identity", output=node.output[:1]))
            own.input.append(source.input[0])
            what = node.op_type if count == 1 else f"{count} nodes up to {node.op_type}"
            yield f"{what} {quote(node.output[0])} left out", model
            source = maker.get(source.input[0])
            if source is None:
                break


def _shorter(failing: Any) -> Iterator[Candidate]:
    """The part without its last nodes, the fewest first."""
    output = failing.graph.output[0].name
    for left_out, node in enumerate(reversed(failing.graph.node)):
        for value in node.output:
            if value and value != output:
                words = f"the value {quote(value)}, {left_out} nodes before the end"
                yield words, ending_at(failing, value, output)
