"""Hazards 14 and 15: what strict loading refuses, and that it says where."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from surgery.documents import load_file, load_json, load_yaml, read_text, validate
from surgery.errors import RecipeError


class Neurons(BaseModel):
    op: Literal["neurons"]
    neurons: tuple[str, ...] = ()
    factor: Annotated[float, Field(allow_inf_nan=False)] = 0.0


class Layers(BaseModel):
    op: Literal["layers"]
    layers: Literal["all"] | list[int] = "all"
    part: Literal["attn", "mlp", "both"] = "both"


class Recipe(BaseModel):
    schema_: Literal[1] = Field(alias="schema")
    untie: bool = False
    edits: tuple[Annotated[Neurons | Layers, Field(discriminator="op")], ...] = ()


def values(text: str, source: str = "r.yaml") -> Any:
    return load_yaml(text, source, RecipeError).value


def problem(text: str, source: str = "r.yaml") -> str:
    """The one line that refuses `text`, as a `Recipe` at the latest."""
    with pytest.raises(RecipeError) as caught:
        validate(Recipe, load_yaml(text, source, RecipeError), RecipeError)
    line = str(caught.value)
    assert line.isprintable() and line.startswith(f"'{source}': ")
    return line.removeprefix(f"'{source}': ")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("no", "no"),
        ("Yes", "Yes"),
        ("on", "on"),
        ("true", True),
        ("~", None),
        ("017", 17),
        ("0o17", 15),
        ("0x1F", 31),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("2020-01-01", "2020-01-01"),
        ("-.inf", float("-inf")),
        ("'1'", "1"),
    ],
)
def test_scalars_are_yaml_1_2(text: str, value: object) -> None:
    found = values(f"a: {text}")["a"]
    assert found == value and type(found) is type(value)


def test_nan_is_a_float() -> None:
    assert values("a: .nan")["a"] != values("a: .nan")["a"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\nb: 2\na: 3", "duplicate key 'a' (line 3)"),
        ("a:\n  b: 1\n  b: 1", "duplicate key 'b' @ a (line 3)"),
        ("a: !!str 1", "tags are not allowed, found 'tag:yaml.org,2002:str' @ a (line 1)"),
        ("a: ! 1", "tags are not allowed, found '!' @ a (line 1)"),
        ("a: &x 1\nb: *x", "anchors and aliases are not allowed @ a (line 1)"),
        ("a: &x [*x, *x]", "anchors and aliases are not allowed @ a (line 1)"),
        ("%YAML 1.1\n---\na: no", "directives (%YAML, %TAG) are not allowed (line 2)"),
        ("a: 1\n---\nb: 2", "more than one document (line 2)"),
        ("", "empty document"),
        ("1: a", "expected a string as key, found '1' (line 1)"),
        ("no: a\ntrue: b", "expected a string as key, found 'true' (line 2)"),
        ("? [a]\n: b", "expected a string as key, found 'a collection' (line 1)"),
        ("a: [" * 40, "nested deeper than 32 levels (line 1)"),
        ("- " * 100_000, "nested deeper than 32 levels (line 1)"),
        ("a: \x1b[31m", "forbidden character '\\x1b' (line 1)"),
        ('a: "\\e"', "forbidden character '\\x1b' @ a (line 1)"),
        ('a: "\\uD800"', "forbidden character '\\ud800' @ a (line 1)"),
        ("a: 9" + "9" * 5000, "a number of more than 400 characters @ a (line 1)"),
        ("#" * (2 << 20), "larger than 1,048,576 bytes"),
        ("[" + "1," * 200_000 + "1]", "more than 100,000 values (line 1)"),
        ("a: b: c", "not YAML: mapping values are not allowed here (line 1)"),
        ('a: "\\UFFFFFFFF"', "not YAML: Python int too large to convert to C int"),
    ],
)
def test_yaml_that_is_not_what_it_seems_is_refused(text: str, expected: str) -> None:
    began = time.monotonic()
    assert problem(text) == expected
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": 1, "a": 1}', "duplicate key 'a'"),
        ('{"a": NaN}', "NaN is not JSON"),
        ('{"a": 1e}', "not JSON: Expecting ',' delimiter (line 1)"),
        ("[" * 100_000, "nested deeper than 32 levels"),
        ("[" * 33 + "]" * 33, "nested deeper than 32 levels"),
        ('{"a": "\\ud800"}', "forbidden character '\\ud800'"),
        ('{"a": ' + "9" * 5000 + "}", "a number of more than 400 characters"),
    ],
)
def test_json_is_strict_too(text: str, expected: str) -> None:
    assert problem(text, "r.json") == expected


def test_every_problem_is_reported_at_once_with_its_line() -> None:
    text = """\
schema: 2
untied: true
edits:
  - {op: neurons, factor: .nan}
  - op: layers
    prt: attn
    part: up
  - {op: neuron}
  - {neurons: []}
  - {op: neurons, factor: true}
"""
    assert problem(text).split("; ") == [
        "expected 1, found 2 @ schema (line 1)",
        "expected a finite number, found NaN @ edits[0].factor (line 4)",
        "expected 'attn', 'mlp' or 'both', found 'up' @ edits[1].part (line 7)",
        "unknown field 'prt'",
        "did you mean 'part'? @ edits[1].prt (line 6)",
        "unknown op 'neuron'",
        "did you mean 'neurons'? @ edits[2].op (line 8)",
        "missing field @ edits[3].op (line 9)",
        "expected a valid number, found true @ edits[4].factor (line 10)",
        "unknown field 'untied'",
        "did you mean 'untie'? @ untied (line 2)",
    ]


def test_a_field_named_like_its_op_is_found() -> None:
    text = "schema: 1\nedits:\n- op: layers\n  layers: [1, x]\n"
    assert "expected a valid integer, found 'x' @ edits[0].layers[1] (line 4)" in problem(text)


def test_json_knows_its_lines() -> None:
    text = '{"schema": 1,\n "edits": [{"op": "neurons"},\n  {"op": "neurons",\n   "factr": 1}]}'
    found = "unknown field 'factr'; did you mean 'factor'? @ edits[1].factr (line 4)"
    assert problem(text, "r.json") == found


def test_lines_of_json_lines_count_from_where_they_start() -> None:
    document = load_json('{"a": [1, {"b": 2}]}', "s.jsonl", RecipeError, first_line=7)
    assert document.lines[("a", 1, "b")] == 7


def test_hostile_names_are_escaped() -> None:
    assert "unknown field '\\u202e<b>'" in problem('schema: 1\n"\u202e<b>": 1\n')


def test_a_thousand_problems_stay_one_short_line() -> None:
    edits = "- {op: x}\n" * 1000
    assert problem("schema: 1\nedits:\n" + edits).endswith("; and 980 more")


def test_integers_are_floats_and_lists_are_tuples() -> None:
    document = load_yaml("schema: 1\nedits: [{op: neurons, factor: 1}]", "r", RecipeError)
    recipe = validate(Recipe, document, RecipeError)
    edit = recipe.edits[0]
    assert isinstance(edit, Neurons) and type(edit.factor) is float


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"\xef\xbb\xbfa: 1", "byte order mark"),
        (b"a: 1\nb: \xff", "not UTF-8 text (line 2)"),
        (b" " * ((1 << 20) + 1), "larger than 1,048,576 bytes"),
    ],
)
def test_files_that_are_no_text_are_refused(tmp_path: Path, data: bytes, expected: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(data)
    with pytest.raises(RecipeError, match=r"^'.*r\.yaml': ") as caught:
        load_file(path, RecipeError)
    assert expected in str(caught.value)


def test_fifo_device_folder_and_missing_file_are_refused_without_hanging(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", Path("/dev/zero"), tmp_path):
        with pytest.raises(RecipeError, match="expected a regular file"):
            read_text(path, RecipeError)
    with pytest.raises(RecipeError, match="cannot be read: No such file"):
        read_text(tmp_path / "none", RecipeError)
    with pytest.raises(RecipeError, match="cannot be read: embedded null byte"):
        read_text("a\0b", RecipeError)


YAML_BITS = st.sampled_from(list("ab01:-?,[]{}#&*!|>'\"%@`~.\n \t\\\ud800\x07") + ["---", "..."])


@given(st.lists(YAML_BITS | st.characters(), max_size=60).map("".join), st.booleans())
def test_any_text_loads_or_is_refused_in_one_line(text: str, as_json: bool) -> None:
    refusal = ""
    try:
        load_yaml(text, "r.json" if as_json else "r.yaml", RecipeError)
    except RecipeError as error:
        refusal = str(error)
    assert refusal.isprintable()


@pytest.mark.parametrize("text", ["%YAML 1.28\n---\na: 1\n", '"\x85sae"', 'a: "x\u2028y"'])
def test_what_fuzzing_found_is_refused_in_one_line(text: str) -> None:
    """An assertion in the scanner; line breaks of YAML 1.1 that would load as spaces."""
    with pytest.raises(RecipeError) as refusal:
        load_yaml(text, "r.yaml", RecipeError)
    assert str(refusal.value).isprintable()
