"""Recipe text: strict, every problem at once, one line. How text is parsed has its own tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from surgery.edits import OPS
from surgery.errors import RecipeError
from surgery.recipe import load_recipe, parse_recipe, recipe_schema

HEAD = "schema: 1\nedits:\n"
ONE = HEAD + "  - {op: heads, heads: [L0H0]}\n"


def refused(text: str, folder: Path) -> str:
    path = folder / "r.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(caught.value).isprintable()
    assert "r.yaml" in str(caught.value)
    return str(caught.value)


def test_a_recipe_keeps_its_text_to_the_letter(tmp_path: Path) -> None:
    text = "# why\r\n" + ONE
    (tmp_path / "r.yaml").write_bytes(text.encode())
    recipe = load_recipe(tmp_path / "r.yaml")
    assert recipe.text == text
    assert (recipe.untie, recipe.allow_overlap) == (False, False)
    assert [edit.op for edit in recipe.edits] == ["heads"]


def test_numbers_and_words_are_those_of_yaml_1_2(tmp_path: Path) -> None:
    text = HEAD + "  - {op: heads, file: no, factor: 1e-3}\n"
    [edit] = parse_recipe(text, "r.yaml", tmp_path).edits
    assert (edit.file, edit.factor) == ("no", 0.001)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("schema: 2\nedits: [{op: heads, heads: [L0H0]}]\n", "schema"),
        ("edits: [{op: heads, heads: [L0H0]}]\n", "missing field @ schema"),
        ("schema: 1\nedits: []\n", "edits"),
        ("schema: 1\n", "missing field @ edits"),
        (ONE + "untied: true\n", "did you mean 'untie'"),
        (ONE + "untie: yes\n", "untie"),
        (ONE + "schema: 1\n", "duplicate"),
        (HEAD + "  - {op: head, heads: [L0H0]}\n", "did you mean 'heads'"),
        (HEAD + "  - {heads: [L0H0]}\n", "op"),
        (HEAD + "  - {op: heads, head: [L0H0]}\n", "did you mean 'heads'"),
        (HEAD + "  - {op: heads, heads: [L0H0], factor: .nan}\n", "factor"),
        (HEAD + "  - {op: heads, heads: [L0H0], factor: .inf}\n", "factor"),
        (HEAD + "  - {op: heads, heads: [L0H0], factor: '1'}\n", "factor"),
        (HEAD + "  - {op: heads, heads: [L0H0], factor: true}\n", "factor"),
        (HEAD + "  - {op: heads, file: h.csv, top: 0}\n", "top"),
        (HEAD + "  - {op: heads, file: h.csv, top: 1.0}\n", "top"),
        (HEAD + "  - {op: sae, sae: s, features: []}\n", "features"),
        (HEAD + "  - {op: sae, sae: s, features: [-1]}\n", "features[0]"),
        (HEAD + "  - {op: sae, sae: s, features: [1], patch: delete}\n", "patch"),
        (HEAD + "  - {op: sae, sae: s, features: [1], strength: .inf}\n", "strength"),
        ("a: &a [x]\nb: [*a]\n" + ONE, "anchor"),
        ("schema: !!int 1\nedits: []\n", "tag"),
    ],
)
def test_a_malformed_recipe_says_where(text: str, said: str, tmp_path: Path) -> None:
    assert said in refused(text, tmp_path)


def test_every_problem_is_told_at_once(tmp_path: Path) -> None:
    text = HEAD + "  - {op: heads, factor: x}\n  - {op: neuron}\n  - {op: neurons, tip: 1}\n"
    message = refused(text, tmp_path)
    for place in ("edits[0].factor (line 3)", "edits[1].op (line 4)", "edits[2].tip (line 5)"):
        assert place in message


def test_every_op_is_in_the_schema() -> None:
    assert all(f'"const": "{op}"' in repr(recipe_schema()).replace("'", '"') for op in OPS)
