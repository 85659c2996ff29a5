"""Edit, then export: the same as export, then edit. A graph knows nothing of the weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from surgery.apply import apply
from surgery.checkpoint import LINEAGE, Checkpoint
from surgery.export import cache, capture, export
from surgery.export.expressions import from_json
from surgery.export.graphs import Wanted
from surgery.plan import Plan, plan
from tests.cases import MEANT, Case
from tests.here import in_this_process
from tests.models import Zoo
from tests.recipes import HEADS, apply_edits, write_recipe

FAMILIES = ("gpt2", "llama", "qwen3", "gpt_neox", "mixtral", "bert", "opt")
OFTEN = ("llama",)
"""The family on which `make test` tries every op; the others are of the campaign."""


def task_of(family: str) -> str:
    return "encoder" if family == "bert" else "causal-lm-with-past"


def ways(family: str) -> dict[str, list[Case]]:
    """Way of an op to its cases."""
    found: dict[str, list[Case]] = {}
    for case in MEANT:
        if case.model == family:
            found.setdefault(case.way, []).append(case)
    return found


def keeps_the_graph(planned: Plan) -> bool:
    """Whether the plan changes numbers alone: no config, no tensor's place or shape."""
    return not planned.config and planned.headers == planned.base.headers


def edits(zoo: Zoo, family: str, folder: Path) -> Iterator[tuple[str, Path]]:
    """Of every way of every op that keeps the graph, the edited checkpoint."""
    base = zoo.checkpoint(family)
    for number, (way, cases) in enumerate(ways(family).items()):
        for tried, case in enumerate(cases):
            home = folder / f"{number}-{tried}"
            home.mkdir(parents=True)
            fields: dict[str, Any] = case.prepare(home, base)
            recipe = write_recipe(home, fields.pop("edits"), **fields)
            if keeps_the_graph(plan(recipe, base)):
                yield way, apply(recipe, base, home / "out").output
                break


def export_of(model: Path, family: str, output: Path | None, layout: str) -> Path:
    with in_this_process():
        return export(model, output, task=task_of(family), layout=layout).output


def recomputed(original: Path, edited: Path) -> tuple[bytes, bytes]:
    """Graph and data of a portable export, the numbers of `edited` put in as its lineage says."""
    proto = onnx.load(str(original / "model.onnx"), load_external_data=False)
    rows = json.loads((original / LINEAGE).read_text())["initializers"]
    said = {row["name"]: from_json(row["expression"]) for row in rows if row["expression"]}
    data = bytearray((original / "model.onnx.data").read_bytes())
    checkpoint = Checkpoint.open(edited)
    for tensor in proto.graph.initializer:
        if tensor.name not in said:
            continue
        raw = np.ascontiguousarray(said[tensor.name].read(checkpoint)).tobytes()
        place = {entry.key: entry.value for entry in tensor.external_data}
        if place:
            begin, size = int(place["offset"]), int(place["length"])
            assert size == len(raw)
            data[begin : begin + size] = raw
        else:
            assert len(tensor.raw_data) == len(raw)
            tensor.raw_data = raw
    return proto.SerializeToString(deterministic=True), bytes(data)


def assert_commutes(zoo: Zoo, family: str, folder: Path) -> None:
    task = task_of(family)
    linked = zoo.onnx(family, task, layout="linked").read_bytes()
    portable = zoo.onnx(family, task).parent
    same = recomputed(portable, zoo.checkpoint(family))
    tried = 0
    for way, edited in edits(zoo, family, folder):
        after = export_of(edited, family, folder / f"onnx-{tried}", "portable")
        found = [(after / name).read_bytes() for name in ("model.onnx", "model.onnx.data")]
        assert tuple(found) == recomputed(portable, edited), way
        assert tuple(found) != same, f"{way} changes nothing"
        assert export_of(edited, family, None, "linked") == edited
        assert (edited / "model.onnx").read_bytes() == linked, way
        tried += 1
    assert tried >= 15, "ops that keep the graph"


@pytest.mark.parametrize("family", OFTEN)
def test_editing_and_exporting_commute_for_every_op(zoo: Zoo, family: str, tmp_path: Path) -> None:
    assert_commutes(zoo, family, tmp_path)


@pytest.mark.campaign
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in OFTEN])
def test_editing_and_exporting_commute_for_every_op_on_other_families(
    zoo: Zoo, family: str, tmp_path: Path
) -> None:
    assert_commutes(zoo, family, tmp_path)


def test_the_originals_numbers_are_what_its_lineage_says(zoo: Zoo) -> None:
    folder = zoo.onnx("llama", task_of("llama")).parent
    graph, data = recomputed(folder, zoo.checkpoint("llama"))
    assert graph == (folder / "model.onnx").read_bytes()
    assert data == (folder / "model.onnx.data").read_bytes()


def assert_captured_alike(zoo: Zoo, family: str, folder: Path) -> None:
    """Of an edited checkpoint, stored in another type, anew; of the original from the cache."""
    task = task_of(family)
    zoo.onnx(family, task)
    edited = apply_edits(folder, zoo.checkpoint(family, "bfloat16"), [HEADS])
    fresh = capture.serialized(capture.capture(edited, task))
    assert fresh == cache.load(Wanted(zoo.checkpoint(family), task, 20, "float32").key())


def test_a_graph_captured_anew_after_an_edit_is_the_same(zoo: Zoo, tmp_path: Path) -> None:
    assert_captured_alike(zoo, "bert", tmp_path)


@pytest.mark.campaign
@pytest.mark.parametrize("family", FAMILIES)
def test_a_graph_captured_anew_after_an_edit_is_the_same_on_any_family(
    zoo: Zoo, family: str, tmp_path: Path
) -> None:
    assert_captured_alike(zoo, family, tmp_path)
