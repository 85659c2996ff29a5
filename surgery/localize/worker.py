"""The child process of a localisation: one model, one batch, the values at its boundaries."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery import process
from surgery.export.tasks import find_task
from surgery.localize.boundaries import OUTPUT, Boundary
from surgery.runtimes.graph import PRESENT
from surgery.runtimes.interface import ModelRef

Arrays = dict[str, NDArray[Any]]


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Runs what `job["action"]` names, `torch`, `exported`, `onnx` or `reference`; saves the
    values as `job["save"]`."""
    actions: dict[str, Callable[[dict[str, Any], Arrays], Mapping[str, NDArray[Any] | str]]]
    actions = {"torch": _torch, "exported": _exported, "onnx": _onnx, "reference": _reference}
    found = actions[job["action"]](job, _arrays(job["batch"]))
    values = {name: array for name, array in found.items() if not isinstance(array, str)}
    np.savez(job["save"], allow_pickle=False, **values)
    problems = {name: why for name, why in found.items() if isinstance(why, str)}
    return {"values": sorted(values), "problems": problems}


def _arrays(path: str) -> Arrays:
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def _torch(job: dict[str, Any], inputs: Arrays) -> Arrays:
    from surgery.arch import identify
    from surgery.checkpoint import Checkpoint
    from surgery.runtimes.pytorch import TorchRuntime

    path = Path(job["model"])
    boundaries = [Boundary(**fields) for fields in job["boundaries"]]
    runtime = TorchRuntime(ModelRef("torch", path, job["task"], job["dtype"]), job["threads"])
    arch, kept = identify(Checkpoint.open(path)), Arrays()
    with _watched(runtime.live, arch, boundaries, kept, _arrays(job["given"])):
        found = runtime.infer(inputs)
    output = find_task(job["task"]).output
    caches = {n: a for n, a in found.items() if job["caches"] and n.startswith(PRESENT)}
    return kept | caches | {output: found[output]}


def _exported(job: dict[str, Any], inputs: Arrays) -> Arrays:
    from surgery.arch import identify
    from surgery.checkpoint import Checkpoint
    from surgery.export import DEFAULT_OPSET
    from surgery.export.load import as_captured, load_model
    from surgery.export.quiet import quiet
    from surgery.export.trace import exported_program
    from surgery.localize.program import run_program

    path, task = Path(job["model"]), find_task(job["task"])
    boundaries = [Boundary(**fields) for fields in job["boundaries"]]
    arch = identify(Checkpoint.open(path))
    with quiet():
        live = as_captured(load_model(path, task, "float32"))
        program = exported_program(live, task, DEFAULT_OPSET, path)
    return run_program(program, live, task, arch, boundaries, inputs, _arrays(job["given"]))


@contextmanager
def _watched(
    model: Any, arch: Any, boundaries: list[Boundary], kept: Arrays, given: Arrays
) -> Iterator[None]:
    """While entered, what crosses each boundary is kept under the boundary's site, and what is
    given for it goes on in its place."""

    def keep(boundary: Boundary) -> Any:
        def take(value: Any) -> None:
            kept[boundary.site] = _array(value).copy()
            if boundary.site in given:
                # In place: a residual stream is read by more than the norm that it is watched at.
                value.copy_(value.new_tensor(given[boundary.site]).reshape(value.shape))

        def after(module: Any, given: Any, result: Any) -> None:
            take(_first(result))

        def before(module: Any, given: Any, named: Any) -> None:
            take(_first(given or tuple(named.values())))

        module = arch.module(model, boundary.role, boundary.layer)
        if boundary.side == OUTPUT:
            return module.register_forward_hook(after)
        return module.register_forward_pre_hook(before, with_kwargs=True)

    with ExitStack() as stack:
        for boundary in boundaries:
            stack.enter_context(keep(boundary))
        yield


def _array(value: Any) -> NDArray[Any]:
    """Anything narrower than float32 as float32: numpy has no bfloat16."""
    wide = value.detach().float() if value.element_size() < 4 else value.detach()
    array: NDArray[Any] = wide.numpy()
    return array


def _first(value: Any) -> Any:
    return _first(value[0]) if isinstance(value, tuple) else value


def _onnx(job: dict[str, Any], inputs: Arrays) -> Arrays:
    from surgery.export import onnxfile
    from surgery.localize.graphs import FORCED, observed
    from surgery.runtimes import graph
    from surgery.runtimes.session import CPU, open_session

    path, folder = Path(job["model"]), Path(job["initializers"])
    model = onnxfile.read(path, folder)
    signature = graph.signature(model, find_task(job["task"]).output, str(path))
    given = {FORCED + name: array for name, array in _arrays(job["given"]).items()}
    shown = observed(model, job["values"], [name.removeprefix(FORCED) for name in given])
    place = (job["level"], job["provider"] or CPU)
    session = open_session(shown.SerializeToString(), folder, job["threads"], *place)
    types = {port.name: port.type for port in session.get_inputs()}
    fed = graph.feed(signature.ports, signature.roles, inputs)
    fed |= {name: array.astype(_NUMPY[types[name]]) for name, array in given.items()}
    names = [value.name for value in session.get_outputs()]
    found = dict(zip(names, session.run(names, fed), strict=True))
    return found | _named(model, signature, found)


def _named(model: Any, signature: Any, found: Arrays) -> Arrays:
    """The graph's own outputs by the names they have in optimum's exports."""
    from surgery.runtimes import graph

    own = {value.name: found[value.name] for value in model.graph.output}
    return graph.name_outputs(signature, own)


def _reference(job: dict[str, Any], inputs: Arrays) -> dict[str, NDArray[Any] | str]:
    from surgery.export import onnxfile
    from surgery.runtimes import graph

    path, folder = Path(job["model"]), Path(job["initializers"])
    model = onnxfile.read(path, folder)
    signature = graph.signature(model, find_task(job["task"]).output, str(path))
    given = _arrays(job["given"])
    fed = graph.feed(signature.ports, signature.roles, inputs) | given
    return {value: _evaluate(model, folder, value, given, fed) for value in job["values"]}


def _evaluate(
    model: Any, folder: Path, value: str, given: Arrays, fed: Arrays
) -> NDArray[Any] | str:
    """One value by the onnx package's evaluator, or why it cannot compute it."""
    from onnx.external_data_helper import load_external_data_for_model

    from surgery.runtimes.reference import evaluator
    from surgery.runtimes.segments import extract

    part = extract(model, [value], given)
    load_external_data_for_model(part, str(folder))
    names = {port.name for port in part.graph.input}
    try:
        [found] = evaluator(part).run(None, {name: fed[name] for name in names})
    except Exception as error:  # an operator it has not, or has otherwise, fails in any way
        return process.one_line(f"{type(error).__name__}: {error}", 200)
    return np.asarray(found)


_NUMPY = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
}


if __name__ == "__main__":
    sys.exit(process.serve(sys.argv[1], work))
