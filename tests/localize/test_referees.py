"""A fault planted in one stage of a conversion is put down to that stage by the referees."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import onnx
import pytest
import torch
from corners import Here
from onnx import helper

from surgery import pipeline
from surgery.errors import ExportError
from surgery.localize import Fault
from surgery.localize.referees import Ruling, panel, referees
from surgery.localize.runs import Runs
from surgery.runtimes import session
from tests.differential import mutants
from tests.localize.campaign import Base
from tests.localize.conftest import Bases

# -------------------------------------------------------------------------------- what they say

NAMES = ("PyTorch", "ExportedProgram", "onnx.reference", "onnxruntime disabled",
         "onnxruntime basic", "onnxruntime extended", "onnxruntime all")  # fmt: skip
RIGHT, WRONG, NONE = 0.5, 100.0, None


def rulings(*ratios: float | None) -> list[Ruling]:
    named = zip(NAMES[1:], ratios, strict=True)
    return [Ruling(name, ratio, ratio == RIGHT, "" if ratio else "why") for name, ratio in named]


SAID: list[tuple[tuple[float | None, ...], bool, str, str]] = [
    ((WRONG, WRONG, WRONG, WRONG, WRONG, WRONG), True, "capture", ""),
    ((WRONG, WRONG, WRONG, WRONG, WRONG, WRONG), False, "translate", "in another way"),
    ((RIGHT, WRONG, WRONG, WRONG, WRONG, WRONG), False, "translate", ""),
    ((RIGHT, RIGHT, RIGHT, RIGHT, WRONG, WRONG), False, "optimise", "onnxruntime extended"),
    ((RIGHT, NONE, RIGHT, WRONG, RIGHT, RIGHT), False, "optimise", "onnxruntime basic"),
    ((RIGHT, RIGHT, WRONG, WRONG, WRONG, WRONG), False, "kernel", ""),
    ((RIGHT, NONE, WRONG, WRONG, WRONG, WRONG), False, "translate", "kernel is not ruled out"),
    ((NONE, WRONG, WRONG, WRONG, WRONG, WRONG), False, "translate", "capture is not ruled out"),
    ((NONE, RIGHT, NONE, WRONG, WRONG, WRONG), False, "kernel", ""),
]


@pytest.mark.parametrize(("ratios", "as_captured", "stage", "note"), SAID)
def test_the_first_stage_that_is_wrong_is_named(
    ratios: tuple[float | None, ...], as_captured: bool, stage: str, note: str
) -> None:
    named, told = panel.name_stage(rulings(*ratios), as_captured)
    assert named == stage
    assert note in told and bool(note) == bool(told)


def test_a_referee_that_gives_nothing_is_never_taken_for_right() -> None:
    """Whatever the others say, a stage is cleared by a right ruling alone: taking a ruling away
    never clears one."""
    for ratios in product((RIGHT, WRONG, NONE), repeat=6):
        stage, _ = panel.name_stage(rulings(*ratios), False)
        reference, plain = ratios[1:3]
        if stage == "optimise":
            assert plain == RIGHT
        if stage == "kernel":
            assert reference == RIGHT and plain != RIGHT
        if stage == "translate":
            assert RIGHT not in (reference, plain)


def test_they_stand_in_the_order_of_the_conversion() -> None:
    assert [member.name for member in referees()] == list(NAMES)


def test_other_execution_providers_come_last_and_remote_ones_not_at_all() -> None:
    with patch.object(
        session.onnxruntime, "get_available_providers",
        lambda: ["CUDAExecutionProvider", "AzureExecutionProvider", "CPUExecutionProvider"],
    ):  # fmt: skip
        last = referees()[-1]
    assert last.name == "onnxruntime all on CUDAExecutionProvider"


# ------------------------------------------------------------------------------- planted faults


def localized(base: Base, path: Path) -> Fault:
    with base.here.installed():
        found = pipeline.localize(base.model, onnx=path)["C_o"]
    assert len(found.faults) == 1, found
    return found.faults[0]


def right(fault: Fault) -> set[str]:
    return {ruling.referee for ruling in fault.referees if ruling.right}


@contextmanager
def miscomputing(levels: tuple[str, ...]) -> Iterator[None]:
    """While entered, ONNX Runtime takes every softmax over another axis at these levels."""
    real = session.open_session

    def open_session(model: Any, folder: Any, threads: int, level: str = "all", *more: Any) -> Any:
        if level in levels:
            proto = onnx.load(model) if isinstance(model, str) else onnx.load_from_string(model)
            folder = folder or Path(model).parent
            softmax_over(proto, -2)
            model = proto.SerializeToString()
        return real(model, folder, threads, level, *more)

    with patch.object(session, "open_session", open_session):
        yield


def softmax_over(model: onnx.ModelProto, axis: int) -> None:
    for node in model.graph.node:
        if node.op_type == "Softmax" and "layers.1" in node.output[0]:
            del node.attribute[:]
            node.attribute.append(helper.make_attribute("axis", axis))


def test_a_fault_of_the_graph_is_the_translation(bases: Bases) -> None:
    base = bases("llama")
    path, _ = base.plant("graph", "softmax axis", 1)
    fault = localized(base, path)
    assert fault.stage == "translate" and not fault.note
    assert right(fault) == {"PyTorch", "ExportedProgram"}
    assert [ruling.referee for ruling in fault.referees] == list(NAMES)
    assert "right in PyTorch, ExportedProgram; wrong in onnx.reference" in fault.ruled


@pytest.mark.parametrize(
    ("levels", "stage"),
    [
        (("extended", "all"), "optimise"),
        (("basic", "extended", "all"), "optimise"),
        (("disabled", "basic", "extended", "all"), "kernel"),
    ],
)
def test_a_fault_of_onnx_runtime_is_its_optimiser_or_a_kernel(
    bases: Bases, levels: tuple[str, ...], stage: str
) -> None:
    base = bases("llama")
    with miscomputing(levels):
        fault = localized(base, base.onnx)
    assert fault.stage == stage
    assert fault.site == "o_proj.1 input"
    wrong = {ruling.referee for ruling in fault.referees if ruling.wrong}
    assert wrong == {f"onnxruntime {level}" for level in levels}
    if stage == "optimise":
        assert fault.note == f"wrong from onnxruntime {levels[0]} on"


def test_a_referee_that_cannot_run_says_why(bases: Bases) -> None:
    base = bases("llama")
    path, _ = base.plant("graph", "softmax axis", 1)

    def fail(*args: Any) -> None:
        raise ExportError("no capture today")

    with patch.object(Runs, "exported", fail):
        fault = localized(base, path)
    (ruling,) = (r for r in fault.referees if r.referee == "ExportedProgram")
    assert (ruling.ratio, ruling.right, ruling.wrong) == (None, False, False)
    assert ruling.why == "no capture today"
    assert fault.note == (
        "capture is not ruled out, for ExportedProgram gave nothing: no capture today"
    )


def test_a_provider_that_is_not_to_be_had_is_neither_right_nor_wrong(bases: Bases) -> None:
    base = bases("llama")
    path, _ = base.plant("graph", "softmax axis", 1)
    with patch.object(session, "other_providers", lambda: ("CUDAExecutionProvider",)):
        fault = localized(base, path)
    last = fault.referees[-1]
    assert last.referee == "onnxruntime all on CUDAExecutionProvider"
    assert last.ratio is None and "CUDAExecutionProvider" in last.why
    assert fault.stage == "translate"


def test_an_operator_the_evaluator_has_not_leaves_a_kernel_open(
    bases: Bases, tmp_path: Path
) -> None:
    """The scores through an operator of ONNX Runtime's that nobody has defined."""
    base = bases("llama")
    path, _ = base.plant("graph", "softmax axis", 1)
    model = onnx.load(str(path))
    node = next(n for n in model.graph.node if n.op_type == "Softmax" and ".1." in n.output[0])
    mutants._redirect(model, node.output[0], "scores.biased")
    place = list(model.graph.node).index(node) + 1
    extra = helper.make_node(
        "Trilu", [node.output[0]], ["scores.low"], domain="com.microsoft", upper=0
    )
    model.graph.node.insert(place, extra)
    last = helper.make_node("Max", [node.output[0], "scores.low"], ["scores.biased"])
    model.graph.node.insert(place + 1, last)
    if "com.microsoft" not in {opset.domain for opset in model.opset_import}:
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    onnx.save(model, str(tmp_path / "trilu.onnx"))
    fault = localized(base, tmp_path / "trilu.onnx")
    assert fault.stage == "translate"
    assert "kernel is not ruled out, for onnx.reference gave nothing" in fault.note
    assert "Trilu" in fault.note


# ----------------------------------------------------------------------------------- a capture


@contextmanager
def another_capture() -> Iterator[None]:
    """While entered, torch.export sees an MLP that is not the one that runs."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    real: Callable[..., Any] = LlamaMLP.forward

    def forward(self: Any, x: Any) -> Any:
        if torch.compiler.is_exporting():
            return self.down_proj(torch.relu(self.gate_proj(x)) * self.up_proj(x))
        return real(self, x)

    with patch.object(LlamaMLP, "forward", forward):
        yield


class Captured:
    """A model whose capture is another one, with a cache of graphs of its own."""

    def __init__(self, root: Path) -> None:
        self._graphs = str(root / "graphs")
        with self.entered():
            self.base = Base.make("llama", root, Here(root / "cache", captures=True), layers=2)

    @contextmanager
    def entered(self) -> Iterator[None]:
        with patch.dict("os.environ", {"SURGERY_CACHE": self._graphs}), another_capture():
            yield

    def localized(self, path: Path) -> Fault:
        with self.entered():
            return localized(self.base, path)


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> Captured:
    return Captured(tmp_path_factory.mktemp("capture"))


def test_a_module_that_exports_otherwise_than_it_runs_is_the_capture(captured: Captured) -> None:
    fault = captured.localized(captured.base.onnx)
    assert fault.stage == "capture"
    assert (fault.site, fault.also) == ("down_proj.0 input", ("down_proj.1 input",))
    assert right(fault) == {"PyTorch"}
    assert "torch.export captures" in str(fault)


def test_a_file_of_another_capture_is_not_put_down_to_ours(
    bases: Bases, captured: Captured
) -> None:
    """The file's own fault is at the same place as our capture's, and another one; the model is
    the same to the bit."""
    path, _ = bases("llama").plant("graph", "activation lost", 0)
    fault = captured.localized(path)
    assert (fault.site, fault.stage) == ("down_proj.0 input", "translate")
    assert "our own capture of the model is wrong there too, in another way" in fault.note


def test_a_fault_elsewhere_than_in_the_capture_is_not_put_down_to_it(
    bases: Bases, captured: Captured
) -> None:
    """Here the captured program runs for itself, and is right."""
    path, _ = bases("llama").plant("graph", "softmax axis", 1)
    fault = captured.localized(path)
    assert (fault.site, fault.stage, fault.note) == ("o_proj.1 input", "translate", "")
    assert right(fault) == {"PyTorch", "ExportedProgram"}
