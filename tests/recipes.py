"""Recipes and autoencoders for tests, and what is in a folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from surgery.apply import apply
from surgery.checkpoint import Checkpoint
from surgery.editor import Editor
from surgery.plan import Plan, plan

HEADS = {"op": "heads", "heads": ["L0H1", "L1H2"]}
NEURONS = {"op": "neurons", "neurons": ["L0N3", "L1N40"]}


def write_recipe(folder: Path, edits: Sequence[dict[str, Any]], **fields: Any) -> Path:
    """`recipe.json` in `folder` with `edits`; `fields` are those of the recipe itself."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.json"
    path.write_text(json.dumps({"schema": 1, **fields, "edits": list(edits)}))
    return path


def plan_of(folder: Path, model: Path, edits: Sequence[dict[str, Any]], **fields: Any) -> Plan:
    """The plan of a recipe written to `folder`."""
    return plan(write_recipe(folder, edits, **fields), model)


def editor_of(folder: Path, model: Path, edits: Sequence[dict[str, Any]], **fields: Any) -> Editor:
    """An editor of the plan of a recipe written to `folder`."""
    return Editor(plan_of(folder, model, edits, **fields))


def apply_edits(folder: Path, model: Path, edits: Sequence[dict[str, Any]], **fields: Any) -> Path:
    """Applies a recipe written to `folder`; the edited checkpoint is `folder/out`."""
    return apply(write_recipe(folder, edits, **fields), model, folder / "out").output


def make_sae(
    folder: Path, hook: str, width: int, latents: int = 12, seed: int = 0, **config: Any
) -> np.ndarray[Any, Any]:
    """A random autoencoder in SAELens format; returns its decoder [latents, width] in float64."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(seed)
    decoder = rng.normal(size=(latents, width)).astype(np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    encoder = rng.normal(size=(width, latents)).astype(np.float32)
    tensors = {"W_enc": encoder, "W_dec": decoder, "b_dec": decoder[0]}
    save_file(tensors, folder / "sae_weights.safetensors")
    fields = {"d_in": width, "d_sae": latents, "metadata": {"hook_name": hook}}
    (folder / "cfg.json").write_text(json.dumps({**fields, **config}))
    return decoder.astype(np.float64)


def sae_edit(patch: str, features: Sequence[int] = (1, 4, 7), **fields: Any) -> dict[str, Any]:
    """An edit that reads the autoencoder in the folder `sae` beside the recipe."""
    return {"op": "sae", "sae": "sae", "features": list(features), "patch": patch, **fields}


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file below `folder`, hidden ones too: its bytes and when it was last written."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in files
    }


def weight_files(folder: Path) -> dict[str, bytes]:
    """The bytes of every safetensors file of a checkpoint."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def stored(folder: Path, tensor: str) -> np.ndarray[Any, Any]:
    """One tensor of a checkpoint in its stored dtype."""
    return Checkpoint.open(folder).read(tensor)
