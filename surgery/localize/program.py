"""A captured `torch.export.ExportedProgram`, run with given values at the edges of its modules.

Every node of the program says which module it was traced in. The last one of a module that others
read is the module's output; what its first one reads from without is the module's input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.arch import Architecture
from surgery.errors import EnvironmentFault
from surgery.export.tasks import Task
from surgery.localize.boundaries import OUTPUT, Boundary

Arrays = dict[str, NDArray[Any]]


def run_program(
    program: Any,
    model: Any,
    task: Task,
    arch: Architecture,
    boundaries: Sequence[Boundary],
    inputs: Mapping[str, NDArray[Any]],
    given: Mapping[str, NDArray[Any]],
) -> Arrays:
    """What the program of `model` gives at each of `boundaries`, by site, and the task's output.

    Where `given` has a site, what is computed there is kept and the given value read on.
    """
    import torch

    places = {b.site: _node_at(program, model, arch, b) for b in boundaries}
    sites = {node: site for site, node in places.items() if node is not None}
    kept: dict[Any, Any] = {}

    class Forced(torch.fx.Interpreter):
        def run_node(self, n: Any) -> Any:
            value = super().run_node(n)
            own = given.get(sites.get(n, ""))
            # Of a module with several results another one may be read on than is watched.
            if n not in sites or (own is not None and own.size != value.numel()):
                return value
            kept[n] = value.clone()  # models add to some values in place
            return value if own is None else value.new_tensor(own).reshape(value.shape)

    with torch.no_grad():
        outputs = Forced(program.graph_module).run(
            *_arguments(program, inputs), enable_io_processing=False
        )
    found = {site: kept[node].numpy() for site, node in places.items() if node in kept}
    return found | {task.output: outputs[_first_output(program)].numpy()}


def _node_at(program: Any, model: Any, arch: Architecture, boundary: Boundary) -> Any:
    """The node that makes the boundary's value; None where the program has none."""
    module = arch.module(model, boundary.role, boundary.layer)
    path = next(name for name, own in model.named_modules() if own is module)
    nodes = program.graph_module.graph.nodes
    inside = [n for n in nodes if f"{_path(n)}.".startswith(f"{path}.")]
    if boundary.side == OUTPUT:
        read = [n for n in inside if any(user not in inside for user in n.users)]
        return read[-1] if read else None
    before = (n for own in inside for n in own.all_input_nodes if n not in inside)
    return next((n for n in before if n.op == "call_function" and _is_tensor(n)), None)


def _path(node: Any) -> str:
    """The module that a node was traced in; of one that is called again, without the number."""
    stack = node.meta.get("nn_module_stack") or {"": ("", "")}
    return str(list(stack.values())[-1][0]).partition("@")[0]


def _is_tensor(node: Any) -> bool:
    return hasattr(node.meta.get("val"), "dtype")


def _first_output(program: Any) -> int:
    kinds = [spec.kind.name for spec in program.graph_signature.output_specs]
    return kinds.index("USER_OUTPUT")


def _arguments(program: Any, inputs: Mapping[str, NDArray[Any]]) -> list[Any]:
    """What every placeholder of the program stands for, in their order."""
    nodes = [n for n in program.graph_module.graph.nodes if n.op == "placeholder"]
    specs = program.graph_signature.input_specs
    return [_argument(program, *pair, inputs) for pair in zip(nodes, specs, strict=True)]


def _argument(program: Any, node: Any, spec: Any, inputs: Mapping[str, NDArray[Any]]) -> Any:
    import torch

    kind, name = spec.kind.name, spec.arg.name
    if kind in ("PARAMETER", "BUFFER") and spec.target in program.state_dict:
        return program.state_dict[spec.target]
    if kind in ("BUFFER", "CONSTANT_TENSOR"):
        return program.constants[spec.target]
    if name in inputs:
        return torch.from_numpy(np.ascontiguousarray(inputs[name]))
    value = node.meta.get("val")
    if kind == "USER_INPUT" and hasattr(value, "dtype") and value.ndim == 4:  # an empty cache
        _, heads, _, size = value.shape
        batch = len(inputs["input_ids"])
        return torch.zeros((batch, int(heads), 0, int(size)), dtype=value.dtype)
    if kind == "USER_INPUT" and not hasattr(value, "dtype"):
        return value
    raise EnvironmentFault(f"the exported program reads {name} ({kind.lower()}), which nobody has")
