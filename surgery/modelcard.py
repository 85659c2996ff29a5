"""The README.md of an edited checkpoint: hub front matter that says what it was made from."""

from __future__ import annotations

import json
import re

from surgery.recipe import Recipe

MODEL_CARD = "README.md"

_FRONT_MATTER = re.compile(rb"\A---\r?\n(.*?)^---(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)
_OWN_KEYS = (b"base_model", b"base_model_relation", b"surgery_recipe")


def describe_edit(card: bytes, base: str, recipe: Recipe) -> bytes:
    """`card` with `base_model`, `base_model_relation` and the recipe in its front matter.

    Keys of ours that are already there are replaced; everything else is kept to the byte.
    """
    match = _FRONT_MATTER.match(card)
    fields, body = (match[1], card[match.end() :]) if match else (b"", card)
    values = (base, "finetune", recipe.text)
    ours = b"".join(
        key + b": " + _scalar(value) + b"\n" for key, value in zip(_OWN_KEYS, values, strict=True)
    )
    return b"---\n" + _without(fields) + ours + b"---\n" + body


def _scalar(value: str) -> bytes:
    """`value` as a double-quoted YAML scalar in ASCII.

    JSON strings are such scalars but for one thing: what JSON escapes as two surrogates, YAML
    wants as one code point of eight digits.
    """
    text = json.dumps(value, ensure_ascii=False)
    return re.sub(r"[^ -~]", lambda match: f"\\U{ord(match[0]):08x}", text).encode()


def _without(fields: bytes) -> bytes:
    """Front matter lines without our keys and the indented lines that belong to them."""
    kept, dropping = [], False
    for line in fields.splitlines(keepends=True):
        if not line.startswith((b" ", b"-", b"#", b"\n", b"\r")):
            dropping = line.split(b":")[0].strip(b"\"' ") in _OWN_KEYS
        if not dropping:
            kept.append(line)
    return b"".join(kept)
