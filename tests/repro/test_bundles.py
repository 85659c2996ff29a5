"""Every seeded fault makes a bundle that shows it alone, beside a model that is right."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx
import pytest
from here import in_this_process

from surgery import pipeline
from surgery.errors import EnvironmentFault
from surgery.export import export
from surgery.repro import Bundle, Repros, script
from surgery.repro.making import Reproducer
from tests.differential import mutants
from tests.localize.campaign import Base
from tests.localize.conftest import Bases
from tests.localize.seeds import Unfit, names

ONE_OF_EACH = [
    ("weight", "one row stale", "initializer 'model.layers.0.mlp.up_proj.weight.T'"),
    ("constant", "rotary base", "initializer 'model.rotary_emb.inv_freq'"),
    ("graph", "residual subtracted", "as Add"),
    ("interface", "NaN under padding", "left out"),
    ("interface", "impossible shape", "Reshape 'logits' left out"),
]
MODELS = ("llama", "gpt2", "gemma2", "llama with cache")
FILES = {
    "README.md", "expected.npz", "failing.onnx", "inputs.npz", "passing.onnx", "repro.py",
    "versions.json",
}  # fmt: skip


def made(base: Base, kind: str, fault: str, output: Path, layer: int = 0) -> Repros:
    path, _ = base.plant(kind, fault, layer)
    with base.here.installed():
        return pipeline.repro(base.model, output, onnx=path)


def alone(folder: Path) -> subprocess.CompletedProcess[str]:
    """The script in a fresh interpreter that sees nothing of ours."""
    command = [sys.executable, "-I", str(folder / "repro.py")]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder.anchor, check=False)


def shown(found: Repros, output: Path) -> list[Bundle]:
    """The bundles, each found to fail alone, to be right healed, and to be small."""
    assert found.verdict == "fail" and found.bundles and not found.missed
    assert {path.name for path in output.iterdir()} == {b.fingerprint for b in found.bundles}
    for bundle in found.bundles:
        folder = output / bundle.fingerprint
        assert {path.name for path in folder.iterdir()} == FILES
        size = sum(path.stat().st_size for path in folder.iterdir())
        assert size == bundle.bytes <= 5_000_000
        ran = alone(folder)
        assert ran.returncode == 1, ran.stdout + ran.stderr
        shutil.copy(folder / "passing.onnx", folder / "failing.onnx")
        healed = alone(folder)
        assert healed.returncode == 0, healed.stdout + healed.stderr
    return list(found.bundles)


@pytest.mark.parametrize(("kind", "fault", "changed"), ONE_OF_EACH)
def test_a_fault_of_each_class_fails_alone(
    bases: Bases, tmp_path: Path, kind: str, fault: str, changed: str
) -> None:
    bundles = shown(made(bases("llama"), kind, fault, tmp_path / "out"), tmp_path / "out")
    assert changed in bundles[0].changed
    assert bundles[0].nodes < 45


CACHES = [
    ("key cache one off", "key", "Concat 'past_key_values.0.key.rolled' left out"),
    ("value cache missing", "value", "the same part of a fresh export"),
]


@pytest.mark.parametrize(("fault", "part", "changed"), CACHES)
def test_a_fault_of_a_cache_fails_alone(
    bases: Bases, tmp_path: Path, fault: str, part: str, changed: str
) -> None:
    """As the output that leaves the cache to the next run, over PyTorch's caches where it is what
    is made of those that is wrong."""
    found = made(bases("llama with cache"), "cache", fault, tmp_path / "out")
    (bundle,) = shown(found, tmp_path / "out")
    assert bundle.site == f"present.0.{part}"
    assert changed in bundle.changed
    assert bundle.nodes < 20


def misread(model: onnx.ModelProto) -> None:
    """What attention reads of the cached keys is 0; the cache goes on as it should."""
    key = next(node for node in model.graph.node if "present.0.key" in node.output)
    mutants._redirect(model, "present.0.key", "read.key")
    nodes = list(model.graph.node)
    zero = mutants._times(model, key.input[0], "read.past", 0.0)
    read = onnx.helper.make_node("Concat", ["read.past", key.input[1]], ["read.key"], axis=2)
    nodes[nodes.index(key) + 1 : nodes.index(key) + 1] = [zero, read]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def never_read(model: onnx.ModelProto) -> None:
    """A graph for the prompt alone, and one cache it leaves is wrong."""
    mutants.scale_output(model, "present.1.key", 1.5)
    for name in [port.name for port in model.graph.input if "past_key" in port.name]:
        mutants.empty_input(model, name)


def named_otherwise(model: onnx.ModelProto) -> None:
    mutants.scale_output(model, "present.1.key", 1.5)
    mutants.name_caches_otherwise(model)


GRAPHS = {
    misread: "o_proj.0 input",
    never_read: "present.1.key",
    named_otherwise: "present.1.key",
}


@pytest.mark.campaign
@pytest.mark.parametrize("plant", GRAPHS)
def test_a_cache_fails_alone_whoever_reads_it_and_whatever_it_is_called(
    bases: Bases, tmp_path: Path, plant: Callable[[onnx.ModelProto], None]
) -> None:
    base, path = bases("llama with cache"), tmp_path / "planted.onnx"
    model = onnx.load(str(base.onnx))
    plant(model)
    onnx.save(model, str(path))
    with base.here.installed():
        found = pipeline.repro(base.model, tmp_path / "out", onnx=path)
    (bundle,) = shown(found, tmp_path / "out")
    assert (bundle.site, bundle.problem) == (GRAPHS[plant], "value")
    assert bundle.nodes < 45


@pytest.mark.campaign
@pytest.mark.parametrize(("kind", "fault"), list(names()))
def test_every_seeded_fault_fails_alone(
    bases: Bases, tmp_path: Path, kind: str, fault: str
) -> None:
    """On the first model, and in its first layer, in which it does anything."""
    for name, layer in product(MODELS, (0, 1)):
        output = tmp_path / f"{name} {layer}"
        try:
            found = made(bases(name), kind, fault, output, layer)
        except (Unfit, StopIteration):
            continue
        if found.verdict == "fail":
            shown(found, output)
            return
    pytest.fail("no model shows it")


@pytest.fixture(scope="module")
def softmax(bases: Bases, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of one fault."""
    output = tmp_path_factory.mktemp("softmax") / "out"
    made(bases("llama"), "graph", "softmax axis", output)
    (folder,) = output.iterdir()
    return folder


def test_the_same_fault_is_the_same_bytes(bases: Bases, softmax: Path, tmp_path: Path) -> None:
    made(bases("llama"), "graph", "softmax axis", tmp_path / "out")
    for file in FILES:
        again = tmp_path / "out" / softmax.name / file
        assert again.read_bytes() == (softmax / file).read_bytes(), file


def test_a_bundle_tells_no_path_and_holds_no_objects(bases: Bases, softmax: Path) -> None:
    for file in softmax.iterdir():
        data = file.read_bytes()
        for path in (bases("llama").root, softmax.parent, Path.home()):
            assert str(path).encode() not in data, file
        assert b"site-packages" not in data, file
    for name in ("inputs.npz", "expected.npz"):
        with np.load(softmax / name, allow_pickle=False) as archive:
            assert all(archive[key].dtype != object for key in archive.files)


def test_both_models_are_valid_and_small(softmax: Path) -> None:
    for name in ("failing.onnx", "passing.onnx"):
        onnx.checker.check_model(str(softmax / name), full_check=True)
        assert len(onnx.load(str(softmax / name)).graph.node) < 10


def test_a_passing_model_that_is_wrong_is_told(softmax: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(softmax, tmp_path / "copy")
    shutil.copy(folder / "failing.onnx", folder / "passing.onnx")
    assert alone(folder).returncode == 2


def test_the_same_fault_in_another_layer_has_the_same_fingerprint(
    bases: Bases, softmax: Path, tmp_path: Path
) -> None:
    found = made(bases("llama"), "graph", "softmax axis", tmp_path / "out", layer=1)
    assert [bundle.fingerprint for bundle in found.bundles] == [softmax.name]


FAULTS = [
    ("weight", "stale"),
    ("constant", "rotary base"),
    ("graph", "softmax axis"),
    ("graph", "residual subtracted"),
    ("graph", "float16 in between"),
    ("graph", "mask off by one"),
    ("interface", "one feature less"),
]


@pytest.mark.campaign
def test_fingerprints_are_those_of_other_weights_and_sizes_and_of_no_other_fault(
    bases: Bases, tmp_path: Path
) -> None:
    first = bases("llama")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8}
    models = [first, reseeded(first, tmp_path), sized(first, tmp_path, sizes)]
    found: dict[str, set[tuple[str, ...]]] = {}
    for kind, fault in FAULTS:
        for number, base in enumerate(models):
            repros = made(base, kind, fault, tmp_path / f"{fault}-{number}")
            marks = tuple(bundle.fingerprint for bundle in repros.bundles)
            found.setdefault(fault, set()).add(marks)
    assert all(len(marks) == 1 for marks in found.values()), found
    assert len({mark for marks in found.values() for mark in marks}) == len(FAULTS), found


def reseeded(base: Base, root: Path) -> Base:
    """The same model with other weights."""
    with in_this_process():
        file = export(base.other, root / "reseeded").model
    return replace(base, model=base.other, onnx=file, root=root, other=base.model)


def sized(base: Base, root: Path, sizes: dict[str, int]) -> Base:
    return Base.make(base.name, root / "sized", base.here, sizes, layers=4)


def test_the_script_imports_onnxruntime_and_numpy_alone() -> None:
    tree = ast.parse(Path(script.__file__).read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    found = {ast.unparse(node).split()[1].split(".")[0] for node in imports}
    assert found == {"sys", "pathlib", "typing", "numpy", "onnxruntime"}


def test_a_right_conversion_makes_nothing(bases: Bases, tmp_path: Path) -> None:
    base = bases("llama")
    with base.here.installed():
        found = pipeline.repro(base.model, tmp_path / "out", onnx=base.onnx)
    assert found == Repros("pass")
    assert not (tmp_path / "out").exists()


def test_a_bundle_that_cannot_be_made_is_told_and_nothing_passes(
    bases: Bases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a child, whose working folder is another, is given whole paths."""
    base, seen = bases("llama"), []

    def crash(self: Reproducer, **job: Any) -> dict[str, object]:
        seen.extend([job[side][key] for side in ("graph", "fresh") for key in ("path", "folder")])
        raise EnvironmentFault("a bundle: crash: ended by SIGSEGV")

    base.plant("graph", "softmax axis", 0)
    monkeypatch.chdir(base.root)
    with base.here.installed(), patch.object(Reproducer, "_child", crash):
        model, file = Path(base.model.name), Path("planted.onnx")
        found = pipeline.repro(model, tmp_path / "out", onnx=file)
    assert seen and all(Path(path).is_absolute() for path in seen)
    assert found.verdict == "fail" and not found.bundles
    assert "SIGSEGV" in found.missed[0]
    assert not (tmp_path / "out").exists()
