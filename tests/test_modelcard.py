"""The model card of an edited checkpoint is YAML that says what it was made from."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML

from surgery.modelcard import describe_edit
from surgery.recipe import Recipe, parse_recipe

TEXT = 'schema: 1  # "why": \\ \U0001f642 \u00e9\nedits:\n  - {op: heads, heads: [L0H0]}\n'


def recipe(text: str = TEXT) -> Recipe:
    return parse_recipe(text, "r.yaml", Path())


def front(card: bytes) -> dict[str, Any]:
    """The front matter as YAML, which refuses a key given twice."""
    start, fields, _ = card.split(b"---\n", 2)
    assert start == b""
    return dict(YAML(typ="safe", pure=True).load(io.BytesIO(fields)))


OURS = {"base_model": "a/b", "base_model_relation": "finetune", "surgery_recipe": TEXT}


@pytest.mark.parametrize(
    "card", [b"", b"# Title\n", b"no newline", b"---\n", b"--- \nx", b"\xff\xfe"]
)
def test_a_card_without_front_matter_gets_some(card: bytes) -> None:
    made = describe_edit(card, "a/b", recipe())
    assert front(made) == OURS
    assert made.endswith(b"---\n" + card)


@pytest.mark.parametrize(
    "fields",
    [
        "license: mit\ntags:\n- a\n  \n- b\n",
        "license: mit\nbase_model: x\nbase_model_relation: merge\ntags:\n- a\n- b\n",
        "license: mit\nbase_model:\n- x\n- y\n\n# more\n- z\ntags: [a, b]\n",
        'license: mit\n"base_model": x\n\'surgery_recipe\': "old"\ntags: [a, b]\n',
        "license: mit\nbase_model : x\ntags: [a, b]\n",
        "license: mit\r\nbase_model:\r\n- x\r\n\r\n- y\r\ntags: [a, b]\r\n",
        "base_model: |\n  x\n\n  y\nlicense: mit\ntags: [a, b]\n",
    ],
)
@pytest.mark.parametrize("end", ["\n# Title\n---\nbody", ""])
def test_fields_of_ours_are_replaced_and_all_else_is_kept(fields: str, end: str) -> None:
    made = describe_edit(f"---\n{fields}---{end}".encode(), "a/b", recipe())
    assert front(made) == {"license": "mit", "tags": ["a", "b"], **OURS}
    assert made.endswith(end.lstrip("\n").encode())


def test_describing_twice_is_describing_once() -> None:
    once = describe_edit(b"# Title\n", "a/b", recipe())
    assert describe_edit(once, "a/b", recipe()) == once


@given(comment=st.text(st.characters(exclude_categories=["C", "Zl", "Zp"]), max_size=30))
def test_any_recipe_and_name_read_back_as_they_are(comment: str) -> None:
    text = TEXT + f"# {comment}\n"
    found = front(describe_edit(b"", comment, recipe(text)))
    assert (found["surgery_recipe"], found["base_model"]) == (text, comment)
