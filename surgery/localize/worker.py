"""The child process of a localisation: one model, one batch, the values at its boundaries."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery import process
from surgery.export.tasks import find_task
from surgery.localize.boundaries import OUTPUT, Boundary
from surgery.runtimes.interface import ModelRef

Arrays = dict[str, NDArray[Any]]


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Runs what `job["action"]` names, `torch`, `onnx` or `reference`; saves the values as
    `job["save"]`."""
    with np.load(job["batch"], allow_pickle=False) as archive:
        inputs = {name: archive[name] for name in archive.files}
    run = {"torch": _torch, "onnx": _onnx, "reference": _reference}[job["action"]]
    values = run(job, inputs)
    np.savez(job["save"], allow_pickle=False, **values)
    return {"values": sorted(values)}


def _torch(job: dict[str, Any], inputs: Arrays) -> Arrays:
    from surgery.arch import identify
    from surgery.checkpoint import Checkpoint
    from surgery.runtimes.pytorch import TorchRuntime

    path = Path(job["model"])
    boundaries = [Boundary(**fields) for fields in job["boundaries"]]
    runtime = TorchRuntime(ModelRef("torch", path, job["task"], job["dtype"]), job["threads"])
    arch, kept = identify(Checkpoint.open(path)), Arrays()
    with _watched(runtime.live, arch, boundaries, kept):
        found = runtime.infer(inputs)
    output = find_task(job["task"]).output
    return kept | {output: found[output]}


@contextmanager
def _watched(model: Any, arch: Any, boundaries: list[Boundary], kept: Arrays) -> Iterator[None]:
    """While entered, what crosses each boundary is kept under the boundary's site."""

    def keep(boundary: Boundary) -> Any:
        def after(module: Any, given: Any, result: Any) -> None:
            kept[boundary.site] = _first(result).detach().numpy()

        def before(module: Any, given: Any, named: Any) -> None:
            kept[boundary.site] = _first(given or tuple(named.values())).detach().numpy()

        module = arch.module(model, boundary.role, boundary.layer)
        if boundary.side == OUTPUT:
            return module.register_forward_hook(after)
        return module.register_forward_pre_hook(before, with_kwargs=True)

    with ExitStack() as stack:
        for boundary in boundaries:
            stack.enter_context(keep(boundary))
        yield


def _first(value: Any) -> Any:
    return _first(value[0]) if isinstance(value, tuple) else value


def _onnx(job: dict[str, Any], inputs: Arrays) -> Arrays:
    from surgery.export import onnxfile
    from surgery.localize.graphs import FORCED, observed
    from surgery.runtimes import graph
    from surgery.runtimes.onnxruntime import open_session

    path, folder = Path(job["model"]), Path(job["initializers"])
    model = onnxfile.read(path, folder)
    signature = graph.signature(model, find_task(job["task"]).output, str(path))
    with np.load(job["given"], allow_pickle=False) as archive:
        given = {FORCED + name: archive[name] for name in archive.files}
    shown = observed(model, job["values"], [name.removeprefix(FORCED) for name in given])
    session = open_session(shown.SerializeToString(), folder, job["threads"], job["optimised"])
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


def _reference(job: dict[str, Any], inputs: Arrays) -> Arrays:
    from onnx.external_data_helper import load_external_data_for_model

    from surgery.export import onnxfile
    from surgery.runtimes import graph
    from surgery.runtimes.reference import evaluator
    from surgery.runtimes.segments import extract

    path, folder = Path(job["model"]), Path(job["initializers"])
    model = onnxfile.read(path, folder)
    signature = graph.signature(model, find_task(job["task"]).output, str(path))
    with np.load(job["given"], allow_pickle=False) as archive:
        given = {name: archive[name] for name in archive.files}
    part = extract(model, [job["value"]], given)
    load_external_data_for_model(part, str(folder))
    fed = graph.feed(signature.ports, signature.roles, inputs) | given
    names = {port.name for port in part.graph.input}
    try:
        found = evaluator(part).run(None, {name: fed[name] for name in names})
    except (NotImplementedError, RuntimeError, TypeError, ValueError, AttributeError):
        return {}  # an operator of another domain, or one the package does not run
    return {job["value"]: np.asarray(found[0])}


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
