"""A checkpoint folder: `config.json`, safetensors shards and the index that names them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.addresses import Region
from surgery.checkpoint.dtypes import numpy_dtype
from surgery.checkpoint.files import (
    list_files,
    open_regular,
    parse_json_object,
    read_exactly,
    read_small,
    resolve_inside,
)
from surgery.checkpoint.header import Header, TensorInfo, read_header
from surgery.checkpoint.tensorfile import read_rows
from surgery.errors import CheckpointError, quote

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
RECEIPT = "surgery-receipt.json"
EXPORT_RECEIPT = "surgery-export.json"
LINEAGE = "lineage.json"
"""What an export's initializers are made of; like the receipts, it is of one folder alone."""

_SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.safetensors")
_OTHER_WEIGHTS = re.compile(
    r"(^|/)onnx/|\.(bin|pth|pt|ckpt|h5|msgpack|gguf|onnx|onnx\.data|onnx_data|safetensors|npz)$"
    r"|\.index\.json$",
    re.IGNORECASE,
)
_CODE_KEYS = ("auto_map", "trust_remote_code", "_attn_implementation_internal")


@dataclass(frozen=True)
class Checkpoint:
    """A folder opened from its headers alone; no weight byte is read until `read`.

    `headers` maps each weight file to its header, `tensors` each tensor to where it lies;
    `side_files` are carried into an edited copy, `not_carried` are not (other weight formats,
    which an edit would leave unedited, what earlier steps said of themselves, and hidden folders).
    """

    root: Path
    config: dict[str, Any]
    headers: dict[str, Header]
    tensors: dict[str, TensorInfo]
    side_files: tuple[str, ...]
    not_carried: tuple[str, ...]

    @classmethod
    def open(cls, root: Path, *, allow_code: bool = False) -> Checkpoint:
        """Opens the folder `root`; raises `CheckpointError` for anything malformed in it.

        With `allow_code`, its config may name code that came with it. We never run that; whoever
        loads the model might.
        """
        _refuse_no_folder(root)
        config = _read_config(root)
        if not allow_code:
            _refuse_code(config, root / CONFIG)
        files = list_files(root)
        weight_map = _weight_map(root, files)
        shards = sorted(set(weight_map.values())) if weight_map else [SINGLE]
        headers = {shard: _open_shard(root, shard) for shard in shards}
        tensors = _merge(root, headers, weight_map)
        carried, left = _sort_side_files(root, files, {*shards, INDEX})
        return cls(root, config, headers, tensors, carried, left)

    @property
    def sharded(self) -> bool:
        return SINGLE not in self.headers or len(self.headers) > 1

    @property
    def weight_files(self) -> tuple[str, ...]:
        """The shards and, where there is one, their index."""
        index = (INDEX,) if (self.root / INDEX).exists() else ()
        return (*self.headers, *index)

    def path(self, relative: str) -> Path:
        """The real path of a file of the folder, hub links followed."""
        return resolve_inside(self.root, relative)

    def info(self, name: str) -> TensorInfo:
        """Where tensor `name` lies; raises `CheckpointError` if there is none."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.root}: has no tensor {quote(name)}")
        return self.tensors[name]

    def read_bytes(self, name: str, begin: int = 0, length: int | None = None) -> bytearray:
        """The stored bytes of tensor `name`: all, or `length` of them from `begin`."""
        info = self.info(name)
        size = info.nbytes - begin if length is None else length
        with open_regular(self.path(info.file)) as descriptor:
            return read_exactly(descriptor, info.begin + begin, size, info.file)

    def read_rows(self, name: str, rows: Region) -> NDArray[Any]:
        """The band `rows` of whole rows (first axis) of a tensor; its own name does not matter."""
        info = self.info(name)
        return read_rows(self.path(info.file), info, rows)

    def read(self, name: str) -> NDArray[Any]:
        """Tensor `name` in its stored dtype and shape (bf16 through ml_dtypes)."""
        info = self.info(name)
        return np.frombuffer(self.read_bytes(name), numpy_dtype(info.dtype)).reshape(info.shape)


def _refuse_no_folder(root: Path) -> None:
    try:
        found = root.is_dir()
    except OSError as error:
        where = quote(root, 300)
        raise CheckpointError(f"{where}: no folder can be there: {error.strerror}") from None
    if not found:
        raise CheckpointError(f"{root}: no such folder; expected a checkpoint folder")


def _read_config(root: Path) -> dict[str, Any]:
    if not (root / CONFIG).is_symlink() and not (root / CONFIG).exists():
        raise CheckpointError(f"{root}: has no {CONFIG}; expected a transformers checkpoint folder")
    return parse_json_object(read_small(resolve_inside(root, CONFIG)), f"{root / CONFIG}")


def _refuse_code(value: Any, source: Path) -> None:
    """Refuses keys through which a config can make a loader run code that came with it."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            for key in _CODE_KEYS:
                if item.get(key):
                    raise CheckpointError(
                        f"{source}: {key!r} names code to run; remove it, or say --allow-code "
                        "where only weights are read and written"
                    )
            stack += item.values()
        elif isinstance(item, list):
            stack += item


def _weight_map(root: Path, files: list[str]) -> dict[str, str]:
    """Tensor to shard from the index; empty where the folder is one `model.safetensors`."""
    if INDEX not in files:
        if SINGLE not in files:
            raise CheckpointError(_no_weights(root, files))
        return {}
    if SINGLE in files:
        raise CheckpointError(f"{root}: has both {SINGLE} and {INDEX}; remove the stale one")
    index = parse_json_object(read_small(resolve_inside(root, INDEX)), f"{root / INDEX}")
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{root / INDEX}: weight_map must be a non-empty object")
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or not _SHARD.fullmatch(shard):
            raise CheckpointError(
                f"{root / INDEX}: {quote(tensor)} is in {quote(shard)}; "
                "expected the name of a .safetensors file in this folder"
            )
    return weight_map


def _no_weights(root: Path, files: list[str]) -> str:
    pickles = [file for file in files if file.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if not pickles:
        return f"{root}: has no {SINGLE} or {INDEX}"
    return (
        f"{root}: only pickled weights ({quote(pickles[0])}), which are never loaded; "
        "save the model again with safe_serialization"
    )


def _open_shard(root: Path, shard: str) -> Header:
    with open_regular(resolve_inside(root, shard)) as descriptor:
        try:
            return read_header(descriptor, shard)
        except CheckpointError as error:
            raise CheckpointError(f"{root}: {error}") from None


def _merge(
    root: Path, headers: dict[str, Header], weight_map: dict[str, str]
) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for shard, header in headers.items():
        for name, info in header.tensors.items():
            if name in tensors:
                raise CheckpointError(
                    f"{root}: {quote(name)} is in {tensors[name].file} and {shard}"
                )
            tensors[name] = info
    if weight_map:
        _check_index(root, tensors, weight_map)
    return tensors


def _check_index(root: Path, tensors: dict[str, TensorInfo], weight_map: dict[str, str]) -> None:
    found = {name: info.file for name, info in tensors.items()}
    for name in sorted({*found, *weight_map}):
        if found.get(name) != weight_map.get(name):
            raise CheckpointError(
                f"{root / INDEX}: says {quote(name)} is in {quote(weight_map.get(name))}, "
                f"the shards have it in {quote(found.get(name))}"
            )
    index = parse_json_object(read_small(resolve_inside(root, INDEX)), f"{root / INDEX}")
    metadata = index.get("metadata", {})
    total = sum(info.nbytes for info in tensors.values())
    declared = metadata.get("total_size", total) if isinstance(metadata, dict) else None
    if declared != total:
        raise CheckpointError(
            f"{root / INDEX}: total_size is {quote(declared)}, the tensors take {total} bytes"
        )


def _sort_side_files(
    root: Path, files: list[str], weights: set[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    carried, left = [], []
    for file in files:
        if file in weights:
            continue
        if not file.isprintable():
            raise CheckpointError(f"{root}: {quote(file)} is not a printable file name; rename it")
        if _OTHER_WEIGHTS.search(file) or file in (RECEIPT, EXPORT_RECEIPT, LINEAGE):
            left.append(file)
        else:
            resolve_inside(root, file)
            carried.append(file)
    # Folders such as .git are nobody's model files, but what is left behind is said.
    hidden = [f"{path.name}/" for path in root.iterdir() if path.name[0] == "." and path.is_dir()]
    return tuple(carried), (*left, *sorted(hidden))
