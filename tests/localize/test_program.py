"""The exported program gives PyTorch's own values at every boundary, given values read on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from here import in_this_process

from surgery.arch import identify
from surgery.checkpoint import Checkpoint
from surgery.differential import Limits, Pair
from surgery.export import choose_task, onnxfile
from surgery.localize.boundaries import Boundary, find_boundaries, owners_of
from surgery.localize.runs import Arrays, Runs
from surgery.stimuli.batches import pad
from tests.models import MODELS, Zoo

IDS = [(3, 4, 5, 6, 7), (8, 9, 10)]


def check(zoo: Zoo, model: str, scratch: Path) -> None:
    source = zoo.checkpoint(model)
    task = choose_task(source, None)
    onnx = zoo.onnx(model, task.name, layout="linked")
    arch = identify(Checkpoint.open(source))
    graph = onnxfile.read(onnx).graph
    owners = owners_of(((t.name, [t.name]) for t in graph.initializer), arch)
    # A router's first result is read by nobody: the program has dropped it.
    found = [b for b in find_boundaries(graph, owners, arch) if b.role != "router"]
    batch = pad("b", "probe", IDS, "left", ("a", "b"))
    runs = Runs(Pair(source, onnx), task, batch, scratch, Limits())
    with in_this_process():
        own = runs.torch(found, "float32")
        forced = {site: own[site] * 1.5 for site in own if site != task.output}
        both = [_both(runs, found, given) for given in ({}, forced)]
    assert set(own) == {boundary.site for boundary in found} | {task.output}
    for expected, captured in both:
        same(expected, captured, batch.attention_mask.astype(bool))
    assert any((a != both[1][0][site]).any() for site, a in both[0][0].items())


def _both(runs: Runs, found: list[Boundary], given: Arrays) -> tuple[Arrays, Arrays]:
    return runs.torch(found, "float32", given), runs.exported(found, given)


def same(expected: Arrays, captured: Arrays, real: np.ndarray) -> None:
    assert set(captured) == set(expected)
    for site, array in expected.items():
        a, b = (x[real] if x.shape[:2] == real.shape else x for x in (array, captured[site]))
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-5 * float(np.abs(a).max()), err_msg=site)


def test_the_program_is_the_model(zoo: Zoo, tmp_path: Path) -> None:
    """falcon adds to values in place."""
    check(zoo, "falcon-new", tmp_path)


@pytest.mark.campaign
@pytest.mark.parametrize("model", MODELS)
def test_the_program_of_every_family_is_the_model(zoo: Zoo, model: str, tmp_path: Path) -> None:
    check(zoo, model, tmp_path)
