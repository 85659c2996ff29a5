"""`verify` passes every honest output and finds every change, with and without the base."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from recipes import HEADS, apply_edits, make_sae, sae_edit

from surgery.checkpoint import EXPORT_RECEIPT, RECEIPT, SINGLE, Checkpoint
from surgery.checkpoint.files import sha256_file
from surgery.checkpoint.receipt import EXPORT_PREDICATE, seal, statement
from surgery.errors import InputError, ReceiptError, RecipeError
from surgery.verify import ulp_distance, verify

CSV = {"op": "heads", "file": "heads.csv", "factor": 0.5}


@dataclass(frozen=True)
class Made:
    """An edited checkpoint, what it was made from, and a second base."""

    base: Path
    recipe: Path
    edited: Path
    other: Path


@pytest.fixture(scope="module")
def honest(base_of: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("honest")
    base = folder / "base"
    shutil.copytree(base_of("llama", "bfloat16"), base)
    (base / "tokenizer").mkdir()
    (base / "tokenizer" / "vocab.txt").write_text("a\nb\n")
    (base / "README.md").write_text("# A model\n")
    (folder / "heads.csv").write_text("layer,head\n0,1\n1,2\n")
    make_sae(folder / "sae", "blocks.1.hook_mlp_out", 32)
    edited = apply_edits(folder, base, [CSV, sae_edit("steer_bias")])
    return Made(base, folder / "recipe.json", edited, base_of("llama", "bfloat16", rope_theta=7.0))


@pytest.fixture
def made(honest: Made, tmp_path: Path) -> Made:
    """A copy of everything, to be spoilt."""
    folder = tmp_path / "made"
    shutil.copytree(honest.recipe.parent, folder)
    return Made(folder / "base", folder / "recipe.json", folder / "out", honest.other)


def symptoms(made: Made, against_base: bool = False) -> set[str]:
    base, recipe = (made.base, made.recipe) if against_base else (None, None)
    found = verify(made.edited, base, recipe)
    assert found.ok is not bool(found.findings)
    assert all(finding.message.isprintable() for finding in found.findings)
    return {finding.symptom for finding in found.findings}


def reseal(made: Made, change: Callable[[dict[str, Any]], None] | None = None) -> None:
    """Gives the edited folder a valid receipt again, as a forger would."""
    path = made.edited / RECEIPT
    receipt = json.loads(path.read_text())
    for item in receipt["subject"]:
        file = made.edited / item["name"]
        item["digest"]["sha256"] = sha256_file(file) if file.exists() else "0" * 64
    if change:
        change(receipt)
    path.write_bytes(seal(receipt))


def test_an_honest_output_passes(honest: Made) -> None:
    assert verify(honest.edited).findings == ()
    result = verify(honest.edited, honest.base, honest.recipe)
    assert result.findings == ()
    assert result.tensors == len(Checkpoint.open(honest.edited).tensors)
    assert result.files == sum(path.is_file() for path in honest.edited.rglob("*")) - 1


def test_an_output_whose_recipe_reads_no_files_needs_no_recipe(
    base_of: Callable[..., Path], tmp_path: Path
) -> None:
    output = apply_edits(tmp_path, base_of("gpt2"), [HEADS])
    assert verify(output, base_of("gpt2")).findings == ()


@given(
    choice=st.integers(0, 2**31), place=st.floats(0, 1, exclude_max=True), flip=st.integers(0, 7)
)
def test_any_flipped_bit_of_any_file_is_found(
    honest: Made, choice: int, place: float, flip: int
) -> None:
    files = sorted(path for path in honest.edited.rglob("*") if path.is_file())
    path = files[choice % len(files)]
    data = path.read_bytes()
    spoilt = bytearray(data)
    spoilt[int(place * len(data))] ^= 1 << flip
    path.write_bytes(spoilt)
    try:
        assert not verify(honest.edited).ok
    finally:
        path.write_bytes(data)
    assert verify(honest.edited).ok


@pytest.mark.parametrize(
    "name",
    ["extra", ".hidden", ".git/config", "tokenizer/.x", "a\nb", EXPORT_RECEIPT, "model.onnx"],
)
@pytest.mark.parametrize("kind", ["file", "link", "fifo"])
def test_an_extra_file_is_found(name: str, kind: str, made: Made) -> None:
    path = made.edited / name
    path.parent.mkdir(exist_ok=True)
    if kind == "file":
        path.write_bytes(b"")
    elif kind == "link":
        path.symlink_to("nowhere")
    else:
        os.mkfifo(path)
    assert symptoms(made) & {"extra file", "malformed receipt"}


def test_a_folder_too_deep_to_list_is_a_finding(made: Made) -> None:
    made.edited.joinpath(*["d"] * 20).mkdir(parents=True)
    assert symptoms(made) == {"unreadable folder"}


@pytest.mark.parametrize("name", [SINGLE, "config.json", "README.md", "tokenizer/vocab.txt"])
@pytest.mark.parametrize("become", ["missing", "fifo", "link out", "empty", "folder"])
def test_a_file_that_is_gone_or_replaced_is_found(name: str, become: str, made: Made) -> None:
    path = made.edited / name
    outside = path.rename(made.recipe.parent / "moved")
    if become == "fifo":
        os.mkfifo(path)
    elif become == "link out":
        path.symlink_to(outside)
    elif become == "empty":
        path.write_bytes(b"")
    elif become == "folder":
        path.mkdir()
    expected = {"fifo": "unreadable file", "link out": "unreadable file", "empty": "changed file"}
    assert symptoms(made) == {expected.get(become, "missing file")}


def predicate(field: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda receipt: receipt["predicate"].__setitem__(field, value)


@pytest.mark.parametrize(
    "change",
    [
        lambda receipt: receipt.pop("predicate"),
        lambda receipt: receipt.update(predicate=[]),
        lambda receipt: receipt.update(subject={}),
        lambda receipt: receipt["predicate"].pop("base"),
        predicate("base", {"name": "x", "files": []}),
        predicate("recipe", None),
        predicate("recipe", {"text": 1, "sha256": "0"}),
        predicate("inputs", {"a": 1}),
    ],
)
@pytest.mark.parametrize("against_base", [False, True])
def test_a_malformed_receipt_is_a_finding_however_well_sealed(
    change: Callable[[dict[str, Any]], None], against_base: bool, made: Made
) -> None:
    reseal(made, change)
    assert symptoms(made, against_base) == {"malformed receipt"}


@pytest.mark.parametrize("data", [b"", b"{}", b"\xff", b"[" * 99_999, b'{"a":NaN}'])
def test_a_receipt_that_is_none_is_a_finding(data: bytes, made: Made) -> None:
    (made.edited / RECEIPT).write_bytes(data)
    assert symptoms(made) == {"malformed receipt"}


def test_without_a_receipt_there_is_nothing_to_verify(made: Made, tmp_path: Path) -> None:
    (made.edited / RECEIPT).unlink()
    for folder in (made.edited, tmp_path / "nowhere"):
        with pytest.raises(ReceiptError):
            verify(folder)


def test_a_recipe_needs_its_base(honest: Made) -> None:
    with pytest.raises(ReceiptError, match="--recipe goes with --base"):
        verify(honest.edited, None, honest.recipe)


def test_a_recipe_that_reads_files_must_be_given(honest: Made) -> None:
    with pytest.raises(ReceiptError, match="give it with --recipe"):
        verify(honest.edited, honest.base)


def test_another_base_is_found(made: Made) -> None:
    other = Made(made.other, made.recipe, made.edited, made.other)
    assert symptoms(other, against_base=True) == {"another base"}


def test_a_base_with_another_config_is_found(made: Made) -> None:
    config = made.base / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    assert symptoms(made, against_base=True) == {"another base"}


def test_another_recipe_is_refused(made: Made) -> None:
    made.recipe.write_text(made.recipe.read_text() + "\n")
    with pytest.raises(RecipeError, match="is not the recipe"):
        symptoms(made, against_base=True)


def test_a_changed_input_of_the_recipe_is_found(made: Made) -> None:
    (made.recipe.parent / "heads.csv").write_text("layer,head\n0,1\n1,3\n")
    assert symptoms(made, against_base=True) == {"changed input"}


def test_an_unusable_base_is_bad_input(made: Made, tmp_path: Path) -> None:
    with pytest.raises(InputError):
        verify(made.edited, tmp_path / "nowhere", made.recipe)


EDITED = "model.layers.0.self_attn.o_proj.weight"
COLUMN = 8  # head 1 of four, eight wide: the first of its columns


def nudge(made: Made, tensor: str, index: tuple[int, ...], ulps: int) -> None:
    """Moves one stored bfloat16 by units in the last place and seals the receipt again."""
    checkpoint = Checkpoint.open(made.edited)
    values = checkpoint.read(tensor).view(np.int16).copy()
    values[index] += ulps
    write(made, tensor, values.tobytes())


def write(made: Made, tensor: str, data: bytes) -> None:
    info = Checkpoint.open(made.edited).info(tensor)
    with (made.edited / info.file).open("r+b") as file:
        file.seek(info.begin)
        file.write(data)
    reseal(made)


@pytest.mark.parametrize("ulps", [-2, -1, 0, 1, 2])
def test_an_edited_value_may_be_one_unit_off_and_not_two(ulps: int, made: Made) -> None:
    nudge(made, EDITED, (3, COLUMN), ulps)
    assert symptoms(made) == set()
    assert symptoms(made, against_base=True) == ({"wrong value"} if abs(ulps) > 1 else set())


@pytest.mark.parametrize(
    ("tensor", "index"),
    [
        (EDITED, (3, COLUMN - 1)),
        (EDITED, (0, 0)),
        ("model.layers.0.self_attn.q_proj.weight", (0, 0)),
        ("model.layers.0.mlp.gate_proj.bias", (5,)),
    ],
)
def test_a_value_outside_every_region_may_not_move_at_all(
    tensor: str, index: tuple[int, ...], made: Made
) -> None:
    nudge(made, tensor, index, 1)
    assert symptoms(made) == set()
    assert symptoms(made, against_base=True) & {"wrong value", "changed tensor"}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_no_number_is_found(value: float, made: Made) -> None:
    values = Checkpoint.open(made.edited).read(EDITED).copy()
    values[3, COLUMN] = value
    write(made, EDITED, values.tobytes())
    assert symptoms(made, against_base=True) == {"wrong value"}


def test_an_edit_that_was_left_out_is_found(made: Made) -> None:
    write(made, EDITED, bytes(Checkpoint.open(made.base).read_bytes(EDITED)))
    assert symptoms(made, against_base=True) == {"wrong value"}


@pytest.mark.parametrize("name", ["config.json", "tokenizer/vocab.txt", "README.md"])
def test_with_the_base_a_resealed_side_file_is_found(name: str, made: Made) -> None:
    path = made.edited / name
    path.write_bytes(path.read_bytes() + b"\n")
    reseal(made)
    assert symptoms(made) == set()
    assert symptoms(made, against_base=True) == {"changed file"}


def test_with_the_base_a_resealed_extra_file_is_found(made: Made) -> None:
    (made.edited / "evil.py").write_text("")
    item = {"name": "evil.py", "digest": {"sha256": sha256_file(made.edited / "evil.py")}}
    reseal(made, lambda receipt: receipt["subject"].append(item))
    assert symptoms(made) == set()
    assert symptoms(made, against_base=True) == {"changed file"}


def test_with_the_base_a_resealed_missing_file_is_found(made: Made) -> None:
    (made.edited / "tokenizer" / "vocab.txt").unlink()
    reseal(made, lambda r: r.update(subject=[s for s in r["subject"] if "vocab" not in s["name"]]))
    assert symptoms(made) == set()
    assert symptoms(made, against_base=True) == {"changed file"}


def test_with_the_base_a_resealed_header_is_found(made: Made) -> None:
    path = made.edited / SINGLE
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"pt"', b'"qt"', 1))
    assert path.read_bytes() != data
    reseal(made)
    assert symptoms(made, against_base=True) == {"changed header"}


def test_with_the_base_a_resealed_malformed_checkpoint_is_a_finding(made: Made) -> None:
    path = made.edited / SINGLE
    path.write_bytes(path.read_bytes()[:-1])
    reseal(made)
    assert symptoms(made, against_base=True) == {"malformed checkpoint"}


def test_the_files_of_a_linked_export_are_named_by_its_own_receipt(made: Made) -> None:
    graph = made.edited / "model.onnx"
    graph.write_bytes(b"graph")
    export = statement({"model.onnx": sha256_file(graph)}, EXPORT_PREDICATE, {})
    (made.edited / EXPORT_RECEIPT).write_bytes(seal(export))
    assert symptoms(made) == symptoms(made, against_base=True) == set()
    graph.write_bytes(b"grape")
    assert symptoms(made) == {"changed file"}


def neighbours(dtype: Any) -> Iterator[tuple[Any, Any]]:
    numbers = np.array([0.0, 1.0, -1.0, 1.5, 60000.0, -3e-5], dtype)
    yield from ((x, np.nextafter(x, dtype(np.inf))) for x in numbers)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
def test_neighbouring_floats_are_one_unit_apart(dtype: Any) -> None:
    for low, high in neighbours(dtype):
        pair = np.array([low]), np.array([high])
        assert ulp_distance(*pair) == ulp_distance(*pair[::-1]) == 1
        assert ulp_distance(pair[0], pair[0]) == 0
    zeros = np.array([0.0], dtype), np.array([-0.0], dtype)
    assert ulp_distance(*zeros) == 0
