"""The child process of a bundle: which batch fails, and the least of the graph that does."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery import process
from surgery.repro import bundle
from surgery.repro.caches import is_cache, real
from surgery.repro.reduction import Reduction
from surgery.repro.runs import opened, results
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
    """The first of the batches on which the whole graph does not give an output there should be,
    and which: by name, of float32, of the right shape, finite wherever a token is or is not."""
    side = Side.open(job["graph"], job["task"])
    session = opened(side.model, side.folder, "all")
    for number, path in enumerate(job["batches"]):
        inputs = load(Path(path))
        found = graph.name_outputs(side.signature, results(session, side.feed(inputs)))
        shapes = _shapes(side, inputs, job["width"])
        asked = [job["output"]] if job["output"] in shapes else list(shapes)
        for name in asked:
            if name not in found or not _sound(found[name], shapes[name]):
                return {"batch": number, "output": name}
    return {"batch": None}


def _shapes(side: Side, inputs: Arrays, width: int | None) -> dict[str, tuple[int, ...] | None]:
    """The shape that each output should have; None for one of rows, of any."""
    ids, mask = inputs["input_ids"].shape, inputs["attention_mask"].shape
    ports = {port.name: port.shape for port in side.signature.ports}
    heads = {link.name: ports[link.past] for link in side.signature.links}
    caches = {name: (mask[0], shape[1], mask[1], shape[3]) for name, shape in heads.items()}
    return {side.signature.output: None if width is None else (*ids, width), **caches}


def _sound(array: Array, shape: tuple[int, ...] | None) -> bool:
    alike = shape is None or array.shape == shape
    return alike and array.dtype == np.float32 and bool(np.isfinite(array).all())


def load(path: Path) -> Arrays:
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def reduced(job: dict[str, Any]) -> dict[str, Any]:
    """Writes the bundle into the empty folder `job["save"]`; `problem` is empty where the graph
    gives what PyTorch does at `job["site"]`, or without one wherever it may go wrong, `changed`
    says what the passing model has otherwise."""
    inputs, sites = load(Path(job["batch"])), _sites(job)
    theirs = Side.open(job["graph"], job["task"])
    fresh = Side.open(job["fresh"], job["task"]) if job["fresh"] else None
    for site in [job["site"]] if job["site"] else suspects(theirs, inputs, sites, job["limits"]):
        strict = job["strict"] and (site == theirs.signature.output or is_cache(site))
        limit = job["limits"][site]
        found = Reduction(theirs, fresh, site, inputs, sites, limit, strict).run()
        if found is not None:
            case, kind, words = found
            told = {"site": site, "problem": kind, "changed": words}
            size = bundle.write(case, {**job["told"], **told}, Path(job["save"]))
            return {**told, "bytes": size, "nodes": len(case.failing.graph.node)}
    return {"problem": ""}


def suspects(side: Side, inputs: Arrays, sites: Arrays, limits: dict[str, float]) -> list[str]:
    """The sites that are wrong with PyTorch's values at all before them, in the graph's order, and
    then its output."""
    found = side.introduced(sites, inputs)
    wrong = [s for s, array in found.items() if not _near(s, array, sites[s], inputs, limits[s])]
    return list(dict.fromkeys([*wrong, side.signature.output]))


def _near(site: str, found: Array, value: Array, inputs: Arrays, limit: float) -> bool:
    own = real(site, value, inputs)
    off = np.abs(found.astype(np.float64) - value)[own]
    return bool(off.max(initial=0.0) <= limit)


def _sites(job: dict[str, Any]) -> Arrays:
    arrays = load(Path(job["sites"]))
    return {site: arrays[f"v{number}"] for number, site in enumerate(job["names"])}


if __name__ == "__main__":
    sys.exit(process.serve(sys.argv[1], work))
