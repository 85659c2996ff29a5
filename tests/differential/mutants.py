"""Defects planted in an exported graph, one small function each, in place.

A model here has all its weights inside, as `onnx.load` gives it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

Array = NDArray[Any]

# ------------------------------------------------------------------------------------- weights


def weight(model: ModelProto, name: str) -> Array:
    """The tensor `name` of the checkpoint, whichever way round the graph keeps it."""
    tensor = _initializer(model, name)
    values = numpy_helper.to_array(tensor)
    return (values if tensor.name == name else values.T).copy()


def put(model: ModelProto, name: str, values: Array) -> None:
    tensor = _initializer(model, name)
    stored = np.ascontiguousarray(values if tensor.name == name else values.T)
    tensor.CopyFrom(numpy_helper.from_array(stored, tensor.name))


def change(model: ModelProto, name: str, how: Callable[[Array], Array]) -> None:
    put(model, name, how(weight(model, name)))


def zero_row(model: ModelProto, name: str, row: int) -> None:
    values = weight(model, name)
    values[row] = 0
    put(model, name, values)


def swap(model: ModelProto, one: str, other: str) -> None:
    first, second = weight(model, one), weight(model, other)
    put(model, one, second)
    put(model, other, first)


def rename(model: ModelProto, name: str, new: str) -> None:
    """Another name for a weight."""
    tensor = _initializer(model, name)
    _redirect(model, tensor.name, new)
    tensor.name = new


def reverse_rows(model: ModelProto, name: str, new: str) -> None:
    """Keeps a weight as `new`, its rows in reverse order; the graph turns them round again."""
    tensor = _initializer(model, name)
    stored, values = tensor.name, numpy_helper.to_array(tensor)
    order = np.arange(len(values) - 1, -1, -1, dtype=np.int64)
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values[::-1]), new))
    model.graph.initializer.append(numpy_helper.from_array(order, f"{new}.order"))
    _prepend(model, helper.make_node("Gather", [new, f"{new}.order"], [stored]))


def _initializer(model: ModelProto, name: str) -> TensorProto:
    """The initializer of a tensor, or the one called after it that holds it transposed."""
    named = {tensor.name: tensor for tensor in model.graph.initializer}
    return named[name] if name in named else named[f"{name}.T"]


def _redirect(model: ModelProto, name: str, new: str) -> None:
    for node in model.graph.node:
        node.input[:] = [new if value == name else value for value in node.input]


# ------------------------------------------------------------------------------------ constants


def scale_epsilons(model: ModelProto, factor: float) -> None:
    """Every norm's epsilon times `factor`: LayerNormalization's own, or one added under a root."""
    added = {value for node in model.graph.node if node.op_type == "Add" for value in node.input}
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "LayerNormalization" and attribute.name == "epsilon":
                attribute.f *= factor
    for tensor in model.graph.initializer:
        value = numpy_helper.to_array(tensor)
        if tensor.name in added and value.ndim == 0 and 0 < value < 1e-4:
            scaled = np.asarray(value * factor, value.dtype)
            tensor.CopyFrom(numpy_helper.from_array(scaled, tensor.name))


def approximate_gelu(model: ModelProto) -> None:
    for node in model.graph.node:
        if node.op_type == "Gelu":
            del node.attribute[:]
            node.attribute.append(helper.make_attribute("approximate", "tanh"))


# --------------------------------------------------------------------------------------- inputs


def ignore_mask(model: ModelProto) -> None:
    """Attention to padding too: the mask the graph computes with is all ones."""
    ones = helper.make_tensor("one", TensorProto.INT64, [1], [1])
    _redirect(model, "attention_mask", "mask.ones")
    _prepend(
        model,
        helper.make_node("Shape", ["attention_mask"], ["mask.shape"]),
        helper.make_node("ConstantOfShape", ["mask.shape"], ["mask.ones"], value=ones),
    )


def ignore_positions(model: ModelProto) -> None:
    """Positions counted from the first column, padding or not."""
    axis = helper.make_tensor("axis", TensorProto.INT64, [], [1])
    one = helper.make_tensor("one", TensorProto.INT64, [1], [1])
    _redirect(model, "position_ids", "positions.own")
    _prepend(
        model,
        helper.make_node("Constant", [], ["positions.axis"], value=axis),
        helper.make_node("Constant", [], ["positions.one"], value=one),
        helper.make_node("Shape", ["position_ids"], ["positions.shape"]),
        helper.make_node("ConstantOfShape", ["positions.shape"], ["positions.ones"], value=one),
        helper.make_node(
            "CumSum", ["positions.ones", "positions.axis"], ["positions.own"], exclusive=1
        ),
    )


def narrow_ids(model: ModelProto) -> None:
    """Token ids through int8: those above 127 come out negative."""
    _redirect(model, "input_ids", "ids.wide")
    _prepend(
        model,
        helper.make_node("Cast", ["input_ids"], ["ids.narrow"], to=TensorProto.INT8),
        helper.make_node("Cast", ["ids.narrow"], ["ids.wide"], to=TensorProto.INT64),
    )


def hide_lookup(model: ModelProto, name: str) -> None:
    """The embedding's lookup by an operator that nobody looks for; the same numbers."""
    lookup = next(node for node in model.graph.node if name in node.input)
    lookup.op_type, lookup.input[1] = "GatherND", "ids.column"
    del lookup.attribute[:]
    axis = numpy_helper.from_array(np.array([2], np.int64), "ids.axis")
    model.graph.initializer.append(axis)
    _prepend(model, helper.make_node("Unsqueeze", ["input_ids", "ids.axis"], ["ids.column"]))


def zero_input(model: ModelProto, name: str) -> None:
    """A float input that the graph takes and multiplies by 0."""
    _redirect(model, name, f"{name}.zero")
    _prepend(model, _times(model, name, f"{name}.zero", 0.0))


def empty_input(model: ModelProto, name: str) -> None:
    """A cache that is no input any more: nothing, [batch, heads, 0, size]."""
    value = next(value for value in model.graph.input if value.name == name)
    axes = [axis.dim_value for axis in value.type.tensor_type.shape.dim]
    model.graph.input.remove(value)
    rest = numpy_helper.from_array(np.array([axes[1], 0, axes[3]]), f"{name}.rest")
    model.graph.initializer.append(rest)
    _prepend(
        model,
        helper.make_node("Shape", ["input_ids"], [f"{name}.batch"], end=1),
        helper.make_node("Concat", [f"{name}.batch", rest.name], [f"{name}.shape"], axis=0),
        helper.make_node("ConstantOfShape", [f"{name}.shape"], [name]),
    )


def lose_oldest(model: ModelProto, name: str) -> None:
    """A cache whose oldest position is lost and whose newest one comes twice."""
    sizes = {"one": 1, "last": -1, "end": 2**40, "axis": 2}
    one, last, end, axis = (f"{name}.{word}" for word in sizes)
    for word, size in sizes.items():
        tensor = numpy_helper.from_array(np.array([size]), f"{name}.{word}")
        model.graph.initializer.append(tensor)
    _redirect(model, name, f"{name}.rolled")
    _prepend(
        model,
        helper.make_node("Slice", [name, one, end, axis], [f"{name}.late"]),
        helper.make_node("Slice", [name, last, end, axis], [f"{name}.newest"]),
        helper.make_node("Concat", [f"{name}.late", f"{name}.newest"], [f"{name}.rolled"], axis=2),
    )


def look_ahead(model: ModelProto) -> None:
    """Attention to later tokens: the causal comparison compares a position with itself."""
    for node in model.graph.node:
        if node.op_type == "LessOrEqual":
            node.input[1] = node.input[0]


def fix_batch(model: ModelProto, size: int) -> None:
    """The declared batch axis of every input is `size`."""
    for value in model.graph.input:
        value.type.tensor_type.shape.dim[0].dim_value = size


def _prepend(model: ModelProto, *nodes: Any) -> None:
    rest = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*nodes, *rest])


# -------------------------------------------------------------------------------------- outputs


def to_float16(model: ModelProto) -> None:
    _append(model, "Cast", to=TensorProto.FLOAT16)
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT16


def through_float16(model: ModelProto) -> None:
    """Rounded to float16, declared float32."""
    _append(model, "Cast", to=TensorProto.FLOAT16)
    _append(model, "Cast", to=TensorProto.FLOAT)


def add(model: ModelProto, values: Array) -> None:
    """Adds constant `values` to the output."""
    _append(model, "Add", values.astype(np.float32))


def nan_everywhere(model: ModelProto) -> None:
    add(model, np.array(np.nan))


def nan_in_padded_batches(model: ModelProto) -> None:
    """0 / 0 at every position of a batch that has any padding."""
    _times_mask_over_itself(model, ("ReduceMin", {"keepdims": 0}))


def nan_at_padding(model: ModelProto) -> None:
    """0 / 0 at padded positions alone."""
    _times_mask_over_itself(model, ("Unsqueeze", {}), np.array([2], np.int64))


def nan_in_masked_rows(model: ModelProto, spread: bool = False) -> None:
    """0 / 0 in rows of nothing but padding; or, `spread`, in every row of a batch that has one."""
    model.graph.initializer.append(numpy_helper.from_array(np.array([1]), "mask.axis"))
    _prepend(
        model,
        helper.make_node("Cast", ["attention_mask"], ["mask.float"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMax", ["mask.float", "mask.axis"], ["mask.rows"]),
        helper.make_node("ReduceMin", ["mask.rows"], ["mask.least"], keepdims=1),
        helper.make_node("Unsqueeze", ["mask.rows", "mask.axis"], ["mask.each"]),
        helper.make_node("Unsqueeze", ["mask.least", "mask.axis"], ["mask.all"]),
        helper.make_node("Div", *[["mask.all" if spread else "mask.each"] * 2], ["mask.ratio"]),
    )
    _append(model, "Mul", "mask.ratio")


def fill_holes(model: ModelProto) -> None:
    """A mask of ones from the first real token to the last: right for padding on either side."""
    for name, value in (("mask.axis", 1), ("mask.zero", 0)):
        model.graph.initializer.append(numpy_helper.from_array(np.array(value), name))
    _redirect(model, "attention_mask", "mask.filled")
    _prepend(
        model,
        helper.make_node("CumSum", ["attention_mask", "mask.axis"], ["mask.fore"]),
        helper.make_node("CumSum", ["attention_mask", "mask.axis"], ["mask.back"], reverse=1),
        helper.make_node("Mul", ["mask.fore", "mask.back"], ["mask.product"]),
        helper.make_node("Greater", ["mask.product", "mask.zero"], ["mask.real"]),
        helper.make_node("Cast", ["mask.real"], ["mask.filled"], to=TensorProto.INT64),
    )


def _times_mask_over_itself(
    model: ModelProto, shaped: tuple[str, dict[str, Any]], *arguments: Array
) -> None:
    operator, attributes = shaped
    constants = []
    for number, values in enumerate(arguments):
        constants.append(f"mask.argument.{number}")
        model.graph.initializer.append(numpy_helper.from_array(values, constants[-1]))
    model.graph.node.extend(
        [
            helper.make_node("Cast", ["attention_mask"], ["mask.float"], to=TensorProto.FLOAT),
            helper.make_node(operator, ["mask.float", *constants], ["mask.shaped"], **attributes),
            helper.make_node("Div", ["mask.shaped", "mask.shaped"], ["mask.ratio"]),
        ]
    )
    _append(model, "Mul", "mask.ratio")


def zero_output(model: ModelProto, name: str) -> None:
    """An output that is 0 everywhere; what else reads it in the graph still gets the numbers."""
    scale_output(model, name, 0.0)


def scale_output(model: ModelProto, name: str, factor: float) -> None:
    for node in model.graph.node:
        node.output[:] = [f"{name}.full" if value == name else value for value in node.output]
    _redirect(model, name, f"{name}.full")
    model.graph.node.append(_times(model, f"{name}.full", name, factor))


def _times(model: ModelProto, source: str, target: str, factor: float) -> Any:
    constant = numpy_helper.from_array(np.array(factor, np.float32), f"{target}.factor")
    model.graph.initializer.append(constant)
    return helper.make_node("Mul", [source, constant.name], [target])


def copy_output(model: ModelProto, name: str, new: str) -> None:
    """One more output, `new`: what `name` is."""
    value = next(value for value in model.graph.output if value.name == name)
    model.graph.output.add().CopyFrom(value)
    model.graph.output[-1].name = new
    model.graph.node.append(helper.make_node("Identity", [name], [new]))


def drop_output(model: ModelProto, name: str) -> None:
    kept = [value for value in model.graph.output if value.name != name]
    del model.graph.output[:]
    model.graph.output.extend(kept)


def name_caches_otherwise(model: ModelProto) -> None:
    """Names that nobody knows for every cache input and output."""
    for side in (model.graph.input, model.graph.output):
        for number, name in enumerate([value.name for value in side]):
            if name.startswith(("past_key_values.", "present.")):
                rename_value(model, name, f"{name[:4]}_{number}")


def rename_value(model: ModelProto, name: str, new: str) -> None:
    """Another name for a value, be it an input, an output or in between."""
    _redirect(model, name, new)
    for node in model.graph.node:
        node.output[:] = [new if value == name else value for value in node.output]
    for value in (*model.graph.input, *model.graph.output):
        if value.name == name:
            value.name = new


def reshape(model: ModelProto, shape: list[int]) -> None:
    """The output in a fixed shape: a batch or a length baked in."""
    _append(model, "Reshape", np.array(shape, np.int64))


def cut_features(model: ModelProto, size: int) -> None:
    _append(model, "Slice", *(np.array([n], np.int64) for n in (0, size, 2)))
    model.graph.output[0].type.tensor_type.shape.dim[2].dim_value = size


def rename_output(model: ModelProto, new: str) -> None:
    _append(model, "Identity")
    model.graph.node[-1].output[0] = model.graph.output[0].name = new


def pool_output(model: ModelProto) -> None:
    """The only output is another one: the mean over positions, [batch, features]."""
    _append(model, "ReduceMean", np.array([1], np.int64), keepdims=0)
    model.graph.node[-1].output[0] = model.graph.output[0].name = "pooled"
    del model.graph.output[0].type.tensor_type.shape.dim[1]


def _append(model: ModelProto, operator: str, *others: Array | str, **attributes: Any) -> None:
    """One more node between what the graph computes and its first output."""
    output = model.graph.output[0].name
    inner = f"{output}.before.{len(model.graph.node)}"
    for node in model.graph.node:
        node.output[:] = [inner if value == output else value for value in node.output]
    _redirect(model, output, inner)
    names = []
    for number, other in enumerate(others):
        if isinstance(other, str):
            names.append(other)
        else:
            names.append(f"{inner}.{number}")
            model.graph.initializer.append(numpy_helper.from_array(other, names[-1]))
    model.graph.node.append(helper.make_node(operator, [inner, *names], [output], **attributes))
