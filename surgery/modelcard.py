"""The README.md of an edited checkpoint: hub front matter that says what it was made from."""

from __future__ import annotations

import json
import re

from surgery.recipe import Recipe

MODEL_CARD = "README.md"

_FRONT_MATTER = re.compile(rb"\A---\r?\n(.*?)^---\r?\n", re.DOTALL | re.MULTILINE)
_OWN_KEYS = (b"base_model", b"base_model_relation", b"surgery_recipe")


def describe_edit(card: bytes, base: str, recipe: Recipe) -> bytes:
    """`card` with `base_model`, `base_model_relation` and the recipe in its front matter.

    Keys of ours that are already there are replaced; everything else is kept to the byte.
    Values are written as JSON strings, which YAML reads as they are.
    """
    match = _FRONT_MATTER.match(card)
    fields, body = (match[1], card[match.end() :]) if match else (b"", card)
    values = (base, "finetune", recipe.text)
    ours = b"".join(
        key + b": " + json.dumps(value).encode() + b"\n"
        for key, value in zip(_OWN_KEYS, values, strict=True)
    )
    return b"---\n" + _without(fields) + ours + b"---\n" + body


def _without(fields: bytes) -> bytes:
    """Front matter lines without our keys and the indented lines that belong to them."""
    kept, dropping = [], False
    for line in fields.splitlines(keepends=True):
        if not line.startswith((b" ", b"-", b"#", b"\n")):
            dropping = line.split(b":")[0] in _OWN_KEYS
        if not dropping:
            kept.append(line)
    return b"".join(kept)
