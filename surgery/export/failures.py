"""Where the exporter failed: the stage, the module and the operator, read off the traceback.

torch's exporter raises anything it likes from anywhere. What its frames hold (the module whose
`forward` ran, the operator that was dispatched, the node that was translated) says more than the
message does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

from surgery.errors import quote

_STAGES = {
    "_prepare_exported_program_for_export": "decompose",
    "_exported_program_to_onnx_program": "translate",
}
"""Functions of torch's exporter, and the stage that runs in them; all before is the trace."""


@dataclass(frozen=True)
class Failure:
    """`stage` is `trace`, `decompose` or `translate`; `module` the path of the innermost module,
    `operator` torch's name of the operator, each empty where nothing tells."""

    stage: str
    module: str
    operator: str
    reason: str

    def __str__(self) -> str:
        place = f" in {self.module}" if self.module else ""
        operator = f" at {self.operator}" if self.operator else ""
        return f"failed at stage {self.stage}{place}{operator}: {self.reason}"


def locate(error: BaseException, model: Any) -> Failure:
    """What the traceback of `error`, and of those that led to it, says; `model` was exported."""
    frames = list(_frames(error))
    stages = [_STAGES[f.f_code.co_name] for f in frames if f.f_code.co_name in _STAGES]
    names = {id(module): name for name, module in model.named_modules()}
    found = [(_module(frame, names), _operator(frame)) for frame in frames]
    root = _root(error)
    return Failure(
        stages[-1] if stages else "trace",
        next((module for module, _ in reversed(found) if module), ""),
        next((operator for _, operator in reversed(found) if operator), ""),
        quote(f"{type(root).__name__}: {(str(root).splitlines() or [''])[0]}", 300),
    )


def _frames(error: BaseException) -> Iterator[FrameType]:
    """Frames from the outermost to the innermost; of what caused an error after its own."""
    trace = error.__traceback__
    while trace is not None:
        yield trace.tb_frame
        trace = trace.tb_next
    cause = error.__cause__ or error.__context__
    if cause is not None:
        yield from _frames(cause)


def _root(error: BaseException) -> BaseException:
    cause = error.__cause__ or error.__context__
    return error if cause is None else _root(cause)


def _module(frame: FrameType, names: dict[int, str]) -> str:
    """The path of the module whose method the frame runs, or of the node it works on."""
    node = _node(frame)
    if node is not None:
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        return str(stack[-1][0]) if stack else ""
    return names.get(id(frame.f_locals.get("self")), "")


def _operator(frame: FrameType) -> str:
    from torch._ops import OpOverload

    node = _node(frame)
    if node is not None:
        return str(node.target)
    called = frame.f_locals.get("func")
    return str(called) if isinstance(called, OpOverload) else ""


def _node(frame: FrameType) -> Any:
    from torch.fx import Node

    node = frame.f_locals.get("node")
    return node if isinstance(node, Node) else None
