"""Write a random checkpoint of a family and size: `make_checkpoint.py FAMILY OUTPUT`.

Tensor by tensor, at about the speed of the disk and in the memory of one block: the numbers are
windows of one block of N(0, 0.02) that is drawn once, each tensor starting elsewhere in it. Norms
are ones, their biases zeros. Names, shapes and config fields come from the family's facts
(surgery/arch/families/); `CLASSES` lists those that can be made here.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from surgery.arch import FAMILIES
from surgery.arch.facts import FamilyFacts, ModuleFact, load_facts
from surgery.arch.naming import Naming
from surgery.arch.sizes import evaluate
from surgery.checkpoint import CONFIG, INDEX, SINGLE
from surgery.checkpoint.header import encode_header

DTYPES = {
    "bf16": ("BF16", "bfloat16", np.dtype(ml_dtypes.bfloat16)),
    "f16": ("F16", "float16", np.dtype("<f2")),
    "f32": ("F32", "float32", np.dtype("<f4")),
}
"""`--dtype` to its name in safetensors, in config.json and in numpy."""

SIZES = ("layers", "width", "heads", "kv_heads", "head_dim", "mlp_width", "vocab", "positions")
SMALL: dict[str, int | str] = {
    "layers": 2, "width": 64, "heads": 4, "kv_heads": "heads", "head_dim": "width//heads",
    "mlp_width": "2*width", "vocab": 256, "positions": 128,
}  # fmt: skip
"""Sizes where none are given; those that follow others are written as in the families' facts."""
PRESETS: dict[str, dict[str, Any]] = {
    # TinyLlama-1.1B: 2.2 GB in bf16.
    "llama-1.1b": {"family": "llama", "shards": 4, "layers": 22, "width": 2048, "heads": 32,
                   "kv_heads": 4, "mlp_width": 5632, "vocab": 32000, "positions": 2048},
    # 4.43e9 parameters: 8.9 GB in bf16.
    "llama-4.4b": {"family": "llama", "shards": 8, "layers": 42, "width": 3072, "heads": 24,
                   "kv_heads": 8, "mlp_width": 8192, "vocab": 32000, "positions": 4096},
    # 8.03e9 parameters, in the shapes of Llama-3-8B: 16.1 GB in bf16.
    "llama-8b": {"family": "llama", "shards": 8, "layers": 32, "width": 4096, "heads": 32,
                 "kv_heads": 8, "mlp_width": 14336, "vocab": 128_256, "positions": 8192},
    # One layer whose down_proj [2048, 488448] is 2.0 GB in bf16 (as are gate and up): 6.0 GB.
    "llama-2gb-tensor": {"family": "llama", "shards": 4, "layers": 1, "width": 2048, "heads": 16,
                         "kv_heads": 4, "mlp_width": 488_448, "vocab": 1024, "positions": 128},
}  # fmt: skip

STANDARD_DEVIATION = 0.02
BLOCK_ELEMENTS = 4_000_037
"""Odd, and no multiple of any width: rows that repeat the block do not repeat each other."""
OPTIONAL = ("mlm_transform", "mlm_norm", "mlm_bias")
"""Optional modules that are written: a BERT is made as one with its masked-LM head."""
CLASSES = {
    "bert": "BertForMaskedLM",
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


@dataclass(frozen=True)
class Tensor:
    """One tensor to write; `fill` is what it holds: `random`, `ones` or `zeros`."""

    name: str
    shape: tuple[int, ...]
    fill: str

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def resolve_sizes(facts: FamilyFacts, given: dict[str, int]) -> dict[str, int]:
    """Every size of the family: as given, else small, else as the family has it by default."""
    sizes: dict[str, int] = {}
    for name, fact in facts.sizes.items():
        if name in given and not fact.keys:
            raise SystemExit(f"a {facts.model_type} config has no field for {name}")
        sizes[name] = evaluate(given.get(name, SMALL.get(name, fact.default)), sizes)
    if sizes["heads"] % sizes["kv_heads"]:
        raise SystemExit("heads must be a multiple of kv-heads")
    sizes["z_width"] = sizes["heads"] * sizes["head_dim"]
    sizes["kv_width"] = sizes["kv_heads"] * sizes["head_dim"]
    return sizes


def make_config(facts: FamilyFacts, sizes: dict[str, int], dtype: str) -> dict[str, Any]:
    """A config.json that stock transformers loads."""
    family = facts.model_type
    return {
        "architectures": [CLASSES[family]],
        "model_type": family,
        **{fact.keys[0]: sizes[name] for name, fact in facts.sizes.items() if fact.keys},
        "tie_word_embeddings": facts.tie.default,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": DTYPES[dtype][1],
    }


def tensors(facts: FamilyFacts, sizes: dict[str, int]) -> Iterator[Tensor]:
    """Every tensor in the order a state dict has them: stem, layer by layer, head."""
    roles = [role for role in facts.modules if _written(facts, role)]
    per_layer = [role for role in roles if facts.modules[role].per_layer]
    stem = roles[: roles.index(per_layer[0])]
    for role in stem:
        yield from _tensors_of(facts, role, None, sizes)
    for layer in range(sizes["layers"]):
        for role in per_layer:
            yield from _tensors_of(facts, role, layer, sizes)
    for role in roles:
        if role not in stem and role not in per_layer:
            yield from _tensors_of(facts, role, None, sizes)


def _written(facts: FamilyFacts, role: str) -> bool:
    if role == facts.tie.head:
        return not facts.tie.default  # a tied head is not stored
    return not facts.modules[role].optional or role in OPTIONAL


def _tensors_of(
    facts: FamilyFacts, role: str, layer: int | None, sizes: dict[str, int]
) -> Iterator[Tensor]:
    module = facts.modules[role]
    for kind in _kinds(module):
        name = Naming(facts.prefixes[0]).tensor(module, layer, kind)
        names = module.weight_shape() if kind == "weight" else module.bias_shape()
        fill = {"weight": "ones", "bias": "zeros"}[kind] if module.type == "norm" else "random"
        yield Tensor(name, tuple(evaluate(size, sizes) for size in names), fill)


def _kinds(module: ModuleFact) -> tuple[str, ...]:
    # A bias that a config field turns on (a string here) is left off.
    if module.type == "bias":
        return ("bias",)
    return ("weight", "bias") if module.bias is True else ("weight",)


def shard(found: Sequence[Tensor], count: int) -> list[list[Tensor]]:
    """`found`, in order, cut into `count` shards of about one size."""
    total, done = sum(tensor.size for tensor in found), 0
    shards: list[list[Tensor]] = [[] for _ in range(count)]
    for tensor in found:
        shards[min(done * count // total, count - 1)].append(tensor)
        done += tensor.size
    return [tensors for tensors in shards if tensors]


class Writer:
    """Writes shards of one dtype out of one random block."""

    def __init__(self, dtype: str, seed: int) -> None:
        self.safetensors, _, self.dtype = DTYPES[dtype]
        self.rng = np.random.default_rng(seed)
        numbers = self.rng.standard_normal(BLOCK_ELEMENTS, np.float32) * STANDARD_DEVIATION
        self.block = numbers.astype(self.dtype)

    def shard(self, path: Path, contents: Sequence[Tensor]) -> None:
        """One file, its tensors by name: one dtype leaves the official order no other key."""
        ordered = sorted(contents, key=lambda tensor: tensor.name)
        raw = encode_header(self._header(ordered))
        with path.open("wb") as file:
            file.write(len(raw).to_bytes(8, "little") + raw)
            for tensor in ordered:
                for window in self._numbers(tensor):
                    file.write(window.view(np.uint8))

    def _header(self, ordered: Sequence[Tensor]) -> dict[str, Any]:
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        begin = 0
        for tensor in ordered:
            end = begin + tensor.size * self.dtype.itemsize
            entries[tensor.name] = {
                "dtype": self.safetensors,
                "shape": list(tensor.shape),
                "data_offsets": [begin, end],
            }
            begin = end
        return entries

    def _numbers(self, tensor: Tensor) -> Iterator[np.ndarray]:
        if tensor.fill != "random":
            yield np.full(tensor.size, tensor.fill == "ones", self.dtype)
            return
        start, left = int(self.rng.integers(BLOCK_ELEMENTS)), tensor.size
        while left:
            window = self.block[start : start + left]
            yield window
            start, left = 0, left - len(window)


def write_checkpoint(
    family: str, output: Path, given: dict[str, int], *, dtype: str, shards: int, seed: int
) -> int:
    """Writes the new folder `output`; returns the bytes of its weights."""
    facts = load_facts(FAMILIES[family], {})
    sizes = resolve_sizes(facts, given)
    parts = shard(list(tensors(facts, sizes)), shards)
    writer = Writer(dtype, seed)
    output.mkdir(parents=True)
    weight_map = {}
    for number, part in enumerate(parts, 1):
        many = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        name = many if len(parts) > 1 else SINGLE
        writer.shard(output / name, part)
        weight_map |= {tensor.name: name for tensor in part}
    total = sum(tensor.size for part in parts for tensor in part) * writer.dtype.itemsize
    if len(parts) > 1:
        _write_json(output / INDEX, {
            "metadata": {"total_parameters": total // writer.dtype.itemsize, "total_size": total},
            "weight_map": dict(sorted(weight_map.items())),
        })  # fmt: skip
    _write_json(output / CONFIG, make_config(facts, sizes, dtype))
    return total


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("family", choices=CLASSES)
    parser.add_argument("output", type=Path, help="a new folder")
    parser.add_argument("--preset", choices=PRESETS, help="sizes; single options go before it")
    for size in SIZES:
        parser.add_argument(f"--{size.replace('_', '-')}", type=int)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--shards", type=int)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    preset = dict(PRESETS[options.preset]) if options.preset else {}
    if preset.pop("family", options.family) != options.family:
        parser.error(f"--preset {options.preset} is not of family {options.family}")
    shards = options.shards or preset.pop("shards", 1)
    preset.pop("shards", None)
    given = {size: getattr(options, size) for size in SIZES if getattr(options, size) is not None}
    total = write_checkpoint(
        options.family, options.output, preset | given,
        dtype=options.dtype, shards=shards, seed=options.seed,
    )  # fmt: skip
    print(f"{options.output}: {total:,} bytes of weights")


if __name__ == "__main__":
    main()
