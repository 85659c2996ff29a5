"""Autoencoders in every format's own layout: one frame, the same rows, or a refusal."""

from __future__ import annotations

import io
import json
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recipes import editor_of, make_sae, plan_of, sae_edit
from sae_folders import (
    CENTERED,
    HOOK,
    SCALE,
    WRITERS,
    D,
    N,
    arrays,
    dictionary_learning,
    files_of,
    llama_scope,
    saelens,
    save,
)

from surgery.edits.autoencoders import FORMATS, interface, opened
from surgery.edits.autoencoders.npz import open_npz
from surgery.errors import CheckpointError, EditError, InputError


def edit_of(name: str, patch: str = "rank1", **fields: Any) -> dict[str, Any]:
    more = {"layers": [1], **fields} if patch in ("rank1", "orthogonalize") else fields
    pickle = {"pickle": True} if name.startswith("trainer") else {}
    return {**sae_edit(patch, (1, 4), **more), "sae": name, **pickle}


def test_every_format_is_written_here() -> None:
    assert set(WRITERS) == set(FORMATS)


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_is_read_into_one_frame(name: str, tmp_path: Path) -> None:
    a = arrays()
    with opened(WRITERS[name](tmp_path, a), files_of(tmp_path), pickle=True) as sae:
        assert (sae.latents, sae.width) == (N, D)
        assert (sae.decoder_rows([7, 0]) == a["W_dec"][[7, 0]]).all()
        assert (sae.encoder_columns([7, 0]) == a["W_enc"][:, [7, 0]].T).all()
        for part in ("W_enc", "b_enc", "W_dec", "b_dec"):
            assert (sae.tensors[part].read() == a[part]).all(), part
        assert sae.input_scale == SCALE.get(name, 1.0)
        assert sae.centered == (name in CENTERED)
        if sae.activation == "jumprelu" and sae.threshold is None:
            assert (sae.tensors["threshold"].read() == a["threshold"]).all()
    if name == "llama_scope":
        assert (sae.threshold, sae.activation) == (0.5 * SCALE[name], "jumprelu")


@pytest.mark.parametrize(
    "kind",
    ["AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "JumpReluAutoEncoder", "BatchTopKSAE",
     "MatryoshkaBatchTopKSAE"],
)  # fmt: skip
def test_every_class_of_dictionary_learning_is_read(kind: str, tmp_path: Path) -> None:
    a = arrays()
    name = dictionary_learning(tmp_path, a, kind)
    with opened(name, files_of(tmp_path), pickle=True) as sae:
        assert (sae.decoder_rows([3]) == a["W_dec"][[3]]).all()
        assert (sae.encoder_columns([3]) == a["W_enc"][:, [3]].T).all()
        assert (sae.tensors["b_dec"].read() == a["b_dec"]).all()
        assert sae.centered == (kind not in ("AutoEncoderNew", "JumpReluAutoEncoder"))
        assert ("b_enc" in sae.tensors) == (kind != "GatedAutoEncoder")


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"norm_activation": "none"}, (1.0, 0.5, "jumprelu")),
        ({"norm_activation": "inference"}, (1.0, 0.5, "jumprelu")),
        ({"norm_activation": "token-wise"}, (None, 0.5, "jumprelu")),
        ({"norm_activation": "none", "act_fn": "topk"}, (1.0, 0.5, "jumprelu")),
        ({"norm_activation": "none", "act_fn": "topk", "jump_relu_threshold": 0},
         (1.0, None, "topk")),
    ],
)  # fmt: skip
def test_llama_scope_says_what_it_scales_and_where_it_jumps(
    fields: dict[str, Any], found: tuple[Any, ...], tmp_path: Path
) -> None:
    name = llama_scope(tmp_path, arrays())
    broken(LLAMA, **fields)(tmp_path / name)
    with opened(name, files_of(tmp_path)) as sae:
        assert (sae.input_scale, sae.threshold, sae.activation) == found


@pytest.mark.parametrize("patch", ["rank1", "orthogonalize", "steer_bias"])
@pytest.mark.parametrize("name", WRITERS)
def test_an_edit_is_the_same_whatever_the_format(
    name: str, patch: str, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    """But for the scale of what an autoencoder saw, which is undone."""
    a, s = arrays(), SCALE.get(name, 1.0)
    reference = {**a, "W_dec": a["W_dec"] / np.float32(s), "W_enc": a["W_enc"] * np.float32(s)}
    made = (("a", WRITERS[name], a), ("b", saelens, reference))
    edits = [edit_of(write(tmp_path / label, numbers), patch) for label, write, numbers in made]
    found, expected = (
        editor_of(tmp_path / label, base_of("llama"), [edit])
        for label, edit in zip("ab", edits, strict=True)
    )
    assert found.plan.edited == expected.plan.edited
    for tensor in found.plan.edited:
        np.testing.assert_allclose(
            found.unrounded(tensor), expected.unrounded(tensor), rtol=1e-5, atol=1e-6
        )


@settings(max_examples=30, deadline=None)
@given(
    indices=st.lists(st.integers(0, N - 1), min_size=1, max_size=5),
    band=st.integers(1, 2000),
)
def test_rows_do_not_depend_on_how_a_file_is_cut(
    indices: list[int], band: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("sae")
    a = arrays()
    with (
        pytest.MonkeyPatch.context() as patch,
        opened(llama_scope(folder, a), files_of(folder)) as sae,
    ):
        patch.setattr(interface, "BAND_BYTES", band)
        assert (sae.decoder_rows(indices) == a["W_dec"][indices]).all()
        assert (sae.encoder_columns(indices) == a["W_enc"][:, indices].T).all()


@pytest.mark.parametrize("name", ["saelens", "sparsify", "gemma_scope", "gemma_scope_2"])
def test_only_the_rows_asked_for_are_read(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    preadv = os.preadv

    def counted(descriptor: int, buffers: Any, offset: int) -> int:
        read.append(sum(len(buffer) for buffer in buffers))
        return preadv(descriptor, buffers, offset)

    with opened(WRITERS[name](tmp_path, arrays()), files_of(tmp_path)) as sae:
        monkeypatch.setattr(os, "preadv", counted)
        sae.decoder_rows([3, 5])
    assert read == [4 * D, 4 * D]


# ------------------------------------------------------------------------------- which folder


def test_a_folder_of_no_format_names_those_there_are(
    base_of: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "sae").mkdir()
    with pytest.raises(CheckpointError) as caught:
        plan_of(tmp_path, base_of("llama"), [sae_edit("orthogonalize")])
    for name in FORMATS:
        assert f"{name}: {' and '.join(FORMATS[name].files)}" in str(caught.value)


def test_a_folder_of_two_formats_is_refused(base_of: Callable[..., Path], tmp_path: Path) -> None:
    make_sae(tmp_path / "sae", HOOK, D)
    np.savez(tmp_path / "sae" / "params.npz", **arrays())
    with pytest.raises(CheckpointError, match="of several formats, saelens, gemma_scope; keep"):
        plan_of(tmp_path, base_of("llama"), [sae_edit("orthogonalize")])


# --------------------------------------------------------------------------------- hook points


@pytest.mark.parametrize(
    ("name", "folder", "hook", "said"),
    [
        ("gemma_scope", "layer_1/w", None, "names no hook point; say hook: blocks.1."),
        ("gemma_scope", "layer_1/w", "model.layers.1", ""),
        ("gemma_scope", "layer_1/w", "blocks.0.hook_resid_post", "belongs to layer 1"),
        ("gemma_scope", "gemma-scope-2b-pt-res/layer_0", "layers.1.mlp", "belongs to blocks.0"),
        ("gemma_scope", "gemma-scope-2b-pt-transcoders/layer_0", HOOK, "is a transcoder"),
        ("gemma_scope", "gemma-scope-2b-pt-mlp/layer_1", "layers.1.mlp", ""),
        ("sparsify", "layers.1.mlp", None, ""),
        ("sparsify", "layers.1.self_attn", "blocks.1.hook_attn_out", ""),
        ("sparsify", "layers.1", "blocks.1.hook_mlp_out", "is said to be blocks.1.hook_mlp_out"),
        ("sparsify", "h.1", None, "'h.1' is no hook point of llama"),
        ("sparsify", "mine", "layers.1", ""),
        ("sparsify", "layers.1", "nonsense", "'nonsense' is no hook point of llama"),
        ("gemma_scope_2", "a/b", "blocks.1.hook_resid_pre", "belongs to blocks.1.hook_resid_post"),
    ],
)  # fmt: skip
def test_hook_points_come_from_the_files_or_the_recipe(
    name: str, folder: str, hook: str | None, said: str, base_of: Callable[..., Path],
    tmp_path: Path,
) -> None:  # fmt: skip
    made = tmp_path / "made" / WRITERS[name](tmp_path / "made", arrays())
    (tmp_path / folder).parent.mkdir(parents=True, exist_ok=True)
    made.rename(tmp_path / folder)
    edit = edit_of(folder, **({"hook": hook} if hook else {}))
    if not said:
        assert plan_of(tmp_path, base_of("llama"), [edit]).edited
        return
    with pytest.raises(EditError) as caught:
        plan_of(tmp_path, base_of("llama"), [edit])
    assert said in str(caught.value)


# ------------------------------------------------------------------------------------- refusals


class Planted:
    """A pickle that makes a folder when it is read."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.canary),)


def test_a_pickle_is_read_only_where_the_recipe_says_so(
    base_of: Callable[..., Path], tmp_path: Path
) -> None:
    name = dictionary_learning(tmp_path, arrays())
    edit = {**edit_of(name), "pickle": False}
    with pytest.raises(EditError, match=r"which can run code .* say pickle: true"):
        plan_of(tmp_path, base_of("llama"), [edit])


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_runs_none_of_it(
    zipped: bool, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    import torch

    name = dictionary_learning(tmp_path, arrays())
    planted = {"decoder.weight": Planted(tmp_path / "canary")}
    torch.save(planted, tmp_path / name / "ae.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match="not a pickle of tensors") as caught:
        plan_of(tmp_path, base_of("llama"), [edit_of(name)])
    assert not (tmp_path / "canary").exists()
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x80\x02]q\x00."])
def test_garbage_in_place_of_a_pickle_is_refused(
    content: bytes, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    name = dictionary_learning(tmp_path, arrays())
    (tmp_path / name / "ae.pt").write_bytes(content)
    with pytest.raises(
        CheckpointError, match=r"ae\.pt: (not a pickle of tensors|expected a state)"
    ):
        plan_of(tmp_path, base_of("llama"), [edit_of(name)])


def broken(name: str, **fields: Any) -> Callable[[Path], None]:
    """Changes fields of a folder's config, dotted ones within others."""

    def change(folder: Path) -> None:
        path = folder / name
        config = json.loads(path.read_text())
        for key, value in fields.items():
            *parents, last = key.split("__")
            place = config
            for parent in parents:
                place = place[parent]
            place[last] = value
        path.write_text(json.dumps(config))

    return change


def with_tensor(file: str, key: str, shape: tuple[int, ...]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        from safetensors.numpy import load_file

        save(folder / file, {**load_file(folder / file), key: np.ones(shape, np.float32)})

    return change


LLAMA = "hyperparams.json"
NORM = "dataset_average_activation_norm"


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("sparsify", broken("cfg.json", transcode=True), "is a transcoder"),
        ("sparsify", broken("cfg.json", skip_connection=True), "is a transcoder"),
        ("sparsify", with_tensor("sae.safetensors", "W_skip", (D, D)), "is a transcoder"),
        ("sparsify", broken("cfg.json", num_latents=11), "the weights have 12"),
        ("sparsify", broken("cfg.json", d_in="32"), "d_in is '32', the weights have 32"),
        ("sparsify", broken("cfg.json", activation=3), "expected a string"),
        ("sparsify", with_tensor("sae.safetensors", "encoder.weight", (D, N)),
         "expected W_enc [32, 12] transposed"),
        ("saelens", with_tensor("sae_weights.safetensors", "threshold", (N, 1)),
         "expected threshold [12]"),
        ("saelens", with_tensor("sae_weights.safetensors", "W_skip", (D, D)), "is a transcoder"),
        ("gemma_scope_2", with_tensor("params.safetensors", "affine_skip_connection", (D, D)),
         "is a transcoder"),
        ("gemma_scope_2", broken("config.json", hf_hook_point_out="model.layers.1.mlp.output"),
         "is a transcoder"),
        ("llama_scope", broken(LLAMA, hook_point_out="blocks.1.hook_mlp_out"), "is a transcoder"),
        ("llama_scope", broken(LLAMA, **{f"{NORM}__in": 0}), "expected a positive number"),
        ("llama_scope", broken(LLAMA, **{f"{NORM}__in": True}), "expected a positive number"),
        ("llama_scope", broken(LLAMA, **{NORM: None}), "expected a positive number"),
        ("llama_scope", broken(LLAMA, **{f"{NORM}__out": 9.0}), "expected one norm"),
        ("llama_scope", broken(LLAMA, norm_activation="token-wise"), "not in the model's units"),
        ("llama_scope", broken(LLAMA, jump_relu_threshold="x"), "expected a positive number"),
        ("dictionary_learning", broken("config.json", trainer__dict_class="IdentityDict"),
         "expected AutoEncoder"),
        ("dictionary_learning", broken("config.json", trainer__dict_size=13), "trainer.dict_size"),
        ("dictionary_learning", broken("config.json", trainer__layer=0), "belongs to blocks.1"),
    ],
)  # fmt: skip
def test_a_folder_that_disagrees_with_itself_is_refused(
    name: str, change: Callable[[Path], None], said: str, base_of: Callable[..., Path],
    tmp_path: Path,
) -> None:  # fmt: skip
    folder = WRITERS[name](tmp_path, arrays())
    change(tmp_path / folder)
    with pytest.raises(InputError) as caught:
        plan_of(tmp_path, base_of("llama"), [edit_of(folder)])
    assert said in str(caught.value)
    assert str(caught.value).isprintable()


# ------------------------------------------------------------------------------------------ npz


def member(values: Any, **how: Any) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, values, **how)
    return file.getvalue()


def archive(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return path


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_of_an_npz_are_read_as_numpy_reads_them(
    dtype: str, order: Any, tmp_path: Path
) -> None:
    a = {name: np.array(v, dtype, order=order) for name, v in arrays().items()}
    np.savez(tmp_path / "params.npz", **a)
    with np.load(tmp_path / "params.npz") as reference, opened(".", files_of(tmp_path)) as sae:
        for name in a:
            assert (sae.tensors[name].read() == reference[name]).all(), name
        assert (sae.decoder_rows([2, 1]) == reference["W_dec"][[2, 1]]).all()
        assert (sae.encoder_columns([2, 1]) == reference["W_enc"].T[[2, 1]]).all()


def test_a_compressed_npz_is_not_unpacked(tmp_path: Path) -> None:
    """A megabyte of zeros would do; so would the 10 GB that it could claim to be."""
    np.savez_compressed(tmp_path / "bomb.npz", W_dec=np.zeros((512, 512)))
    with pytest.raises(CheckpointError, match=r"is compressed; save it with numpy\.savez"):
        open_npz(tmp_path / "bomb.npz")


OBJECTS = np.array([{"a": 1}], dtype=object)


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ({"W_dec.npy": member(OBJECTS, allow_pickle=True)}, "has dtype |O"),
        ({"W_dec.npy": member(np.ones((2, 2), ">f4"))}, "has dtype"),
        ({"W_dec.npy": member(np.ones((2, 2), np.int64))}, "has dtype"),
        ({"W_dec.npy": member(np.ones((2, 2)))[:-1]}, "does not hold the shape"),
        ({"W_dec.npy": member(np.ones((2, 2))) + b"\0"}, "does not hold the shape"),
        ({"W_dec.npy": member(np.ones(4)).replace(b"(4,)", b"(-4)")}, "no header as numpy"),
        ({"W_dec.npy": b"\x93NUMPY\x09\x00"}, "of version 1 or 2"),
        ({"W_dec.npy": b""}, "of version 1 or 2"),
        ({"W_dec.npy": b"\x93NUMPY\x01\x00\xff\xff{"}, "no header as numpy"),
        ({"W_dec.npy": member(np.ones((2, 2))), "W_dec": member(np.ones(2))}, "is there twice"),
        ({"w.npy": member(np.ones((2, 2)))}, "has no tensor 'W_dec'"),
        ({"W_dec.npy": member(np.ones(4))}, "expected W_dec [latents, width]"),
        ({}, "has no tensor 'W_dec'"),
    ],
)  # fmt: skip
def test_a_malformed_npz_is_refused(members: dict[str, bytes], said: str, tmp_path: Path) -> None:
    archive(tmp_path / "params.npz", members)
    with pytest.raises(CheckpointError) as caught, opened(".", files_of(tmp_path)):
        pass
    assert said in str(caught.value)
    assert str(caught.value).isprintable()


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_damaged_npz_is_refused_or_read_within_itself(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("npz") / "params.npz"
    np.savez(path, W_dec=np.ones((3, 4), np.float32), b_dec=np.ones(4, np.float32))
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(
        raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw
    )
    try:
        file, _ = open_npz(path)
    except CheckpointError:
        return
    size = path.stat().st_size
    for info in file.tensors.values():
        assert 0 <= info.begin <= info.end <= size
        file.read(info.name)


def test_a_directory_of_any_size_is_not_read(tmp_path: Path) -> None:
    path = archive(tmp_path / "params.npz", {})
    end = bytearray(path.read_bytes())
    directory = (1 << 20) + 1
    struct.pack_into("<L", end, 12, directory)
    path.write_bytes(b"\0" * directory + end)
    with pytest.raises(CheckpointError, match="a directory of more than 1048576 bytes"):
        open_npz(path)
