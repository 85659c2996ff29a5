"""The project is what it says: what is imported is declared, what is declared is pinned."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DISTRIBUTIONS = {"ruamel": "ruamel.yaml", "google": "protobuf", "ml_dtypes": "ml_dtypes"}


def declared(requirements: list[str]) -> set[str]:
    return {re.split(r"[<>=!~\[; ]", text)[0].lower().replace("_", "-") for text in requirements}


def imported() -> Iterator[str]:
    for path in (ROOT / "surgery").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from (alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                yield node.module.split(".")[0]


def test_every_package_that_is_imported_is_declared() -> None:
    third_party = {name for name in imported() if name not in sys.stdlib_module_names} - {"surgery"}
    names = {DISTRIBUTIONS.get(name, name).lower().replace("_", "-") for name in third_party}
    assert names <= declared(PROJECT["dependencies"])


def test_every_declared_package_is_pinned() -> None:
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    extras = [text for extra in PROJECT["optional-dependencies"].values() for text in extra]
    assert declared(PROJECT["dependencies"]) | declared(extras) <= declared(constraints)


def test_nothing_else_lies_at_the_top() -> None:
    tracked = {"surgery", "fixtures", "tests", "tools", "docs"}
    files = {
        "pyproject.toml",
        "constraints.txt",
        "Makefile",
        "LICENSE",
        "README.md",
        "CHANGELOG.md",
    }
    there = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    made = {"demo", "build", "weight_surgery.egg-info"}
    assert tracked | files <= there <= tracked | files | made
