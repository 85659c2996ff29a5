"""Fuzz the recipe parser: `fuzz_recipe.py CORPUS --seconds N` (needs atheris).

Every input is read as YAML and as JSON. Either refuses by `RecipeError` in one printable line
within bounded time; a document that both accept is the same document to both, and only plain
values come out of it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(include=["surgery", "ruamel"]):
    # Imported where it is used, that is, after this block and so without being instrumented.
    import ruamel.yaml  # noqa: F401

    import surgery.edits.heads
    import surgery.edits.neurons
    import surgery.edits.sae  # noqa: F401
    from surgery.documents import load_yaml
    from surgery.errors import RecipeError
    from surgery.recipe import Recipe, parse_recipe, recipe_schema
    from surgery.syntax import MAX_DEPTH

from fuzzing import Violation, arguments, check_message, fuzz, seed

MAX_LEN = 4096
MAX_CPU = 4.0
ROOT = Path(__file__).resolve().parent.parent
PLAIN = {str, int, float, bool, type(None), list, dict}
SYNTAX = ("%YAML 1.2", "---", "...", "!!", "&a", "*a", "<<: ", "? ", ": ", "- ", "|2-", ">+", "#",
          ".nan", "-.inf", "1e-3", "0x1F", "0o17", "no", "~", "\\u", "\\U0010FFFF", "\u2028",
          "\ufeff", "\x85", "L0H0", "L1N2", "[{", "}]", '": "')  # fmt: skip


def check(data: bytes) -> str:
    # Bytes that are no UTF-8 become lone surrogates, which the parser has to refuse as well.
    text = data.decode("utf-8", "surrogateescape")
    documents = [_load(text, source) for source in ("r.yaml", "r.json")]
    values = [value for loaded, value in documents if loaded]
    for value in values:
        _check_plain(value, 0)
    if len(values) == 2 and not _same(*values):
        raise Violation(f"YAML reads {values[0]!r:.200}, JSON {values[1]!r:.200}")
    recipes = [_parse(text, source) for source in ("r.yaml", "r.json")]
    return "accepted" if any(recipes) else "loaded" if values else "refused"


def _load(text: str, source: str) -> tuple[bool, Any]:
    try:
        return True, load_yaml(text, source, RecipeError).value
    except RecipeError as error:
        check_message(error)
        return False, None


def _parse(text: str, source: str) -> Recipe | None:
    try:
        recipe = parse_recipe(text, source, Path())
    except RecipeError as error:
        check_message(error)
        return None
    for edit in recipe.edits:
        _check_finite(edit.model_dump(mode="json"))
    return recipe


def _check_plain(value: Any, depth: int) -> None:
    if type(value) not in PLAIN or depth > MAX_DEPTH:
        raise Violation(f"a {type(value).__name__} at depth {depth}")
    for item in _children(value):
        _check_plain(item, depth + 1)


def _children(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from (item for pair in value.items() for item in pair)
    elif isinstance(value, list):
        yield from value


def _check_finite(value: Any) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise Violation(f"{value} in an accepted recipe")
    for item in _children(value):
        _check_finite(item)


def _same(one: Any, other: Any) -> bool:
    # `json` tells 1 from 1.0 and true from 1, which == does not.
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def seeds() -> Iterator[bytes]:
    """The fixtures' recipes and policies, and one recipe of every op, as YAML and as JSON."""
    for path in sorted(ROOT.glob("fixtures/*/*.yaml")):
        yield path.read_bytes()
        document = load_yaml(path.read_text(encoding="utf-8"), "r.yaml", RecipeError)
        yield json.dumps(document.value).encode()
    for op in _tags():
        yield f"schema: 1\nuntie: true\nedits:\n  - {{op: {op}, factor: 1e-3}}\n".encode()
    yield b"schema: 1\nedits:\n- op: neurons\n  neurons: [L0N1, 'L0N2', \"L0N3\"]\n  factor: .5\n"


def _tags() -> list[str]:
    """Every op, from the schema rather than from a list that could grow stale."""
    return sorted(set(_constants(recipe_schema())))


def _constants(schema: Any) -> Iterator[str]:
    if isinstance(schema, dict) and isinstance(schema.get("const"), str):
        yield schema["const"]
    for item in _children(schema):
        yield from _constants(item)


def _names(schema: Any) -> Iterator[str]:
    """Every field name and enumerated word of a JSON Schema."""
    if isinstance(schema, dict):
        yield from schema.get("properties", {})
        yield from (word for word in schema.get("enum", ()) if isinstance(word, str))
    for item in _children(schema):
        yield from _names(item)


def main() -> None:
    options = arguments(__doc__.splitlines()[0])
    seed(options.corpus, seeds())
    words = [*SYNTAX, *_tags(), *sorted(set(_names(recipe_schema())))]
    fuzz(atheris, check, options, max_cpu=MAX_CPU, max_len=MAX_LEN, words=words)


if __name__ == "__main__":
    main()
