"""Checkpoints made for measurements: what they are made for has to accept them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from models import FAMILIES

from surgery import api
from surgery.checkpoint import INDEX, SINGLE, Checkpoint

TOOL = Path(__file__).resolve().parents[2] / "tools" / "make_checkpoint.py"
CLASSES = {"bert": "AutoModelForMaskedLM"}


def make(family: str, output: Path, *options: str) -> Path:
    argv = [sys.executable, str(TOOL), family, str(output), *options]
    subprocess.run(argv, check=True, capture_output=True)
    return output


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_transformers_loads_every_family(family: str, tmp_path: Path) -> None:
    import torch
    import transformers

    path = make(family, tmp_path / "model", "--shards", "3")
    loader = getattr(transformers, CLASSES.get(family, "AutoModelForCausalLM"))
    model, report = loader.from_pretrained(path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert next(model.parameters()).dtype == torch.bfloat16
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_inspect_and_the_library_read_every_family(family: str, tmp_path: Path) -> None:
    from safetensors import safe_open

    path = make(family, tmp_path / "model", "--shards", "3", "--dtype", "f32")
    assert api.inspect(path) is not None
    checkpoint = Checkpoint.open(path)
    assert [f"model-{n:05d}-of-00003.safetensors" for n in (1, 2, 3)] == list(checkpoint.headers)
    for shard in checkpoint.headers:
        with safe_open(path / shard, "np") as file:
            assert file.metadata() == {"format": "pt"}
            for name in file.keys():  # noqa: SIM118
                assert np.array_equal(file.get_tensor(name), checkpoint.read(name))


def test_numbers_are_those_of_an_initialised_model(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make("llama", tmp_path / "model", "--width", "256"))
    queries, keys = (
        checkpoint.read(f"model.layers.0.self_attn.{name}_proj.weight").astype(np.float32)
        for name in "qk"
    )
    assert abs(queries.mean()) < 1e-3 and abs(queries.std() - 0.02) < 1e-3
    assert not np.array_equal(queries, keys)
    assert np.linalg.matrix_rank(queries) == 256
    assert (checkpoint.read("model.norm.weight") == 1).all()


def test_the_index_tells_the_size_and_one_shard_has_none(tmp_path: Path) -> None:
    sharded = make("gpt2", tmp_path / "sharded", "--shards", "2")
    index = json.loads((sharded / INDEX).read_text())
    total = sum(info.nbytes for info in Checkpoint.open(sharded).tensors.values())
    assert index["metadata"] == {"total_parameters": total // 2, "total_size": total}
    single = make("gpt2", tmp_path / "single")
    assert [file.name for file in sorted(single.iterdir())] == ["config.json", SINGLE]


def test_the_seed_decides_the_numbers(tmp_path: Path) -> None:
    one, same, other = (
        (make("llama", tmp_path / name, "--seed", seed) / SINGLE).read_bytes()
        for name, seed in (("one", "1"), ("same", "1"), ("other", "2"))
    )
    assert one == same and one != other


def test_memory_is_that_of_a_block(tmp_path: Path) -> None:
    # One tensor is 64 MiB; the interpreter with numpy and pydantic takes some 60 MiB by itself.
    argv = ["make", "gpt2", str(tmp_path / "model"), "--vocab", "262144", "--width", "128"]
    code = (
        f"import runpy, sys; sys.argv = {argv!r}; "
        f"runpy.run_path({str(TOOL)!r}, run_name='__main__'); "
        "print(open('/proc/self/status').read())"
    )
    status = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout
    # Not ru_maxrss: a child starts with that of the process it was forked from, here pytest.
    peak = re.search(rb"VmHWM:\s*(\d+) kB", status)
    assert peak is not None and int(peak[1]) < 110 << 10


def test_a_preset_belongs_to_its_family(tmp_path: Path) -> None:
    argv = [sys.executable, str(TOOL), "gpt2", str(tmp_path / "x"), "--preset", "llama-1.1b"]
    done = subprocess.run(argv, check=False, capture_output=True)
    assert done.returncode == 2 and b"not of family gpt2" in done.stderr
    assert not (tmp_path / "x").exists()
