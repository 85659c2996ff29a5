"""The child process of a bundle: which batch fails, and the least of the graph that does."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery import process
from surgery.export.tasks import find_task
from surgery.repro import bundle
from surgery.repro.reduction import Reduction
from surgery.repro.side import Side
from surgery.runtimes import graph

Array = NDArray[Any]
Arrays = dict[str, Array]


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Does what `job["action"]` names: `probe` or `reduce`."""
    import onnxruntime

    onnxruntime.set_default_logger_severity(4)
    return {"probe": probe, "reduce": reduced}[job["action"]](job)


# ------------------------------------------------------------------------------------- batches


def probe(job: dict[str, Any]) -> dict[str, Any]:
    """The first of the batches on which the whole graph does not give the output there should be:
    by name, of float32, of the right shape, finite wherever a token is or is not."""
    from surgery.runtimes.session import open_session

    side = Side.open(job["graph"], job["task"])
    try:
        session = open_session(side.model.SerializeToString(), side.folder, 1)
    except Exception:  # onnxruntime's errors have no base of their own
        return {"batch": 0}
    for number, path in enumerate(job["batches"]):
        inputs = load(Path(path))
        try:
            names = [value.name for value in session.get_outputs()]
            found = dict(zip(names, session.run(names, side.feed(inputs)), strict=True))
        except Exception:
            return {"batch": number}
        array = graph.name_outputs(side.signature, found).get(find_task(job["task"]).output)
        if array is None or not _sound(array, inputs["input_ids"].shape, job["width"]):
            return {"batch": number}
    return {"batch": None}


def _sound(array: Array, shape: tuple[int, ...], width: int | None) -> bool:
    wanted = array.shape if width is None else (*shape, width)
    return array.shape == wanted and array.dtype == np.float32 and bool(np.isfinite(array).all())


def load(path: Path) -> Arrays:
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def reduced(job: dict[str, Any]) -> dict[str, Any]:
    """Writes the bundle into the empty folder `job["save"]`; `problem` is empty where the graph
    gives what PyTorch does, `changed` says what the passing model has otherwise."""
    inputs, sites = load(Path(job["batch"])), _sites(job)
    theirs = Side.open(job["graph"], job["task"])
    fresh = Side.open(job["fresh"], job["task"]) if job["fresh"] else None
    search = Reduction(theirs, fresh, job["site"], inputs, sites, job["limit"], job["strict"])
    found = search.run()
    if found is None:
        return {"problem": ""}
    case, kind, words = found
    told = {**job["told"], "problem": kind, "changed": words}
    size = bundle.write(case, told, Path(job["save"]))
    nodes = len(case.failing.graph.node)
    return {"problem": kind, "changed": words, "bytes": size, "nodes": nodes}


def _sites(job: dict[str, Any]) -> Arrays:
    arrays = load(Path(job["sites"]))
    return {site: arrays[f"v{number}"] for number, site in enumerate(job["names"])}


if __name__ == "__main__":
    sys.exit(process.serve(sys.argv[1], work))
