"""Strict loading of the text a person writes: recipes, policies, stimuli.

The law: what is loaded is what is on the page. So no duplicate keys (which one wins?), no tags,
anchors or aliases (a few lines that stand for gigabytes), no second document, no directives, no
control characters or lone surrogates; at most 1 MiB, 100,000 values and 32 levels. YAML is 1.2
with the core schema: `1e-3` is a number and `no` is a string. JSON has no NaN; YAML's `.nan` and
`.inf` load as floats, for the models to refuse by name.

Every error is one line, `'source': problem @ path (line N); problem @ path (line N); …`.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, TypeAdapter, ValidationError

from surgery.errors import InputError, quote
from surgery.registry import suggest
from surgery.syntax import (
    Parsed,
    Path,
    Problem,
    check_text,
    json_lines,
    located,
    parse_json,
    parse_yaml,
    printable,
)

MAX_BYTES = 1 << 20
MAX_PROBLEMS = 20
"""Problems named in one line; a file of wrong lines would otherwise answer with a megabyte."""

Error = type[InputError]


def _whole(value: Any) -> Any:
    if type(value) is not int:
        raise ValueError("expected 1")
    return value


SchemaOne = Annotated[Literal[1], BeforeValidator(_whole)]
"""The version of a format. `Literal[1]` alone would take `true` and `1.0`, which equal 1."""

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True)
class Document:
    """Plain Python values and where each was written: path → 1-based line."""

    source: str
    value: Any
    lines: dict[Path, int] = field(default_factory=dict)

    def line(self, path: Path) -> int | None:
        """The line of `path`, or of the nearest part around it that has one."""
        around = (path[:length] for length in range(len(path), -1, -1))
        return next((self.lines[part] for part in around if part in self.lines), None)


# ------------------------------------------------------------------------------------- loading


def read_text(path: str | PathLike[str], error: Error, limit: int = MAX_BYTES) -> str:
    """The UTF-8 text of a regular file of at most `limit` bytes.

    A FIFO or a device is refused, not waited for: the file is opened without blocking and looked
    at before it is read. A byte order mark is refused.
    """
    source = os.fspath(path)
    data = b""
    try:
        data = _read_bytes(source, limit)
        text = data.decode("utf-8")
    except Problem as problem:
        raise error(_prefixed(source, str(problem))) from None
    except UnicodeDecodeError as cause:
        line = data.count(b"\n", 0, cause.start) + 1
        raise error(_prefixed(source, f"not UTF-8 text (line {line})")) from None
    except (OSError, ValueError) as cause:
        reason = getattr(cause, "strerror", None) or str(cause)
        raise error(_prefixed(source, f"cannot be read: {printable(reason)}")) from None
    if text.startswith("\ufeff"):
        raise error(_prefixed(source, "starts with a byte order mark; save it as plain UTF-8"))
    return text


def _read_bytes(path: str, limit: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise Problem("expected a regular file")
        with open(descriptor, "rb", closefd=False) as file:
            data = file.read(limit + 1)
    finally:
        os.close(descriptor)
    if len(data) > limit:
        raise Problem(f"larger than {limit:,} bytes")
    return data


def load_file(path: str | PathLike[str], error: Error) -> Document:
    """`read_text` and `load_yaml` in one."""
    return load_yaml(read_text(path, error), os.fspath(path), error)


def load_yaml(text: str, source: str, error: Error) -> Document:
    """YAML 1.2, or JSON where `source` ends in `.json`."""
    if source.endswith(".json"):
        return load_json(text, source, error)
    return _guarded(parse_yaml, text, source, error, MAX_BYTES)


def load_json(text: str, source: str, error: Error, first_line: int = 1) -> Document:
    """One JSON value; `first_line` is where it starts in its file (for JSON lines)."""

    def parse(text: str) -> Parsed:
        value = parse_json(text, first_line)
        return value, json_lines(text, first_line)

    return _guarded(parse, text, source, error, MAX_BYTES)


def load_data(text: str, source: str, error: Error, limit: int) -> Document:
    """JSON that a program wrote, of up to `limit` bytes: as strict, but without line numbers."""
    return _guarded(lambda text: (parse_json(text), {}), text, source, error, limit)


def _guarded(
    parse: Callable[[str], Parsed], text: str, source: str, error: Error, limit: int
) -> Document:
    try:
        check_text(text, limit)
        value, lines = parse(text)
    except Problem as problem:
        raise error(_prefixed(source, str(problem))) from None
    return Document(source, value, lines)


def _prefixed(source: str, problem: str) -> str:
    return f"{quote(source, 300)}: {problem}"


# ---------------------------------------------------------------------------------- validation


def validate(model: type[M] | TypeAdapter[T], document: Document, error: Error) -> M | T:
    """The document as `model`, strictly; otherwise one `error` that names every problem.

    Strict: `1` stands for `1.0`, but `true` is no number and `"1"` is none either. Unknown fields
    are refused whatever the model's own configuration says. Lists fill tuples, as in JSON.
    """
    adapter: TypeAdapter[Any] = model if isinstance(model, TypeAdapter) else TypeAdapter(model)
    try:
        # JSON mode is the one in which pydantic is strict about JSON's types rather than
        # Python's; `json` and pydantic both write and read NaN as a bare word.
        text = json.dumps(document.value)
        valid: M | T = adapter.validate_json(text, strict=True, extra="forbid")
    except ValidationError as cause:
        problems = _problems(cause, document, adapter)
        raise error(_prefixed(document.source, "; ".join(problems))) from None
    return valid


def _problems(cause: ValidationError, document: Document, adapter: TypeAdapter[Any]) -> list[str]:
    details = cause.errors(include_url=False, include_input=True)
    lines = [_describe(dict(detail), document, adapter) for detail in details[:MAX_PROBLEMS]]
    more = len(details) - MAX_PROBLEMS
    return list(dict.fromkeys(lines)) + ([f"and {more} more"] if more > 0 else [])


def _describe(detail: dict[str, Any], document: Document, adapter: TypeAdapter[Any]) -> str:
    kind, context = detail["type"], detail.get("ctx", {})
    path = _place(document.value, detail["loc"], missing=kind == "missing")
    if kind == "missing":
        problem = "missing field"
    elif kind == "extra_forbidden":
        name = str(path[-1])
        problem = f"unknown field {quote(name)}{_nearest(adapter, document.value, path)}"
    elif kind == "union_tag_invalid":
        path = (*path, context["discriminator"].strip("'"))
        expected = [tag.strip("' ") for tag in context["expected_tags"].split(",")]
        problem = f"unknown {path[-1]} {quote(context['tag'])}{suggest(context['tag'], expected)}"
    elif kind == "union_tag_not_found":
        path = (*path, context["discriminator"].strip("'"))
        problem = "missing field"
    else:
        problem = f"{_message(detail)}, found {_shown(detail['input'])}"
    return located(problem, path, document.line(path))


def _message(detail: dict[str, Any]) -> str:
    """Pydantic's words without its grammar: `expected a valid number`."""
    message = printable(detail["msg"].removeprefix("Value error, "))
    return message.replace("Input should be", "expected", 1)


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return quote(value)
    if isinstance(value, (dict, list)):
        return f"a {'mapping' if isinstance(value, dict) else 'list'} of {len(value)}"
    return "nothing" if value is None else printable(json.dumps(value), 80)


def _place(value: Any, location: Sequence[str | int], missing: bool) -> Path:
    """Pydantic's location as a path in the document.

    Pydantic mixes in the names of union members and validators, which the document does not
    have (`edits.0.layers.part` for field `part` of an edit whose op is `layers`); of the ways to
    leave some out, the one that ends on its last name and leaves out fewest is meant.
    """
    if missing:
        *around, name = location
        return (*_place(value, around, missing=False), name)
    return min(_readings(value, tuple(location)), key=lambda reading: reading[0])[1]


def _readings(value: Any, location: Path) -> Iterator[tuple[tuple[int, int], Path]]:
    """Every way to read `location`: ((last name left out, names left out), path)."""
    if not location:
        yield (0, 0), ()
        return
    part, rest = location[0], location[1:]
    within = isinstance(value, dict) and part in value
    if within or (isinstance(value, list) and isinstance(part, int) and part < len(value)):
        for cost, path in _readings(value[part], rest):
            yield cost, (part, *path)
    for (last, count), path in _readings(value, rest):
        yield (last if rest else 1, count + 1), path


def _nearest(adapter: TypeAdapter[Any], value: Any, path: Path) -> str:
    """A suggestion for the unknown last name of `path`, from the model's own JSON Schema."""
    schema = adapter.json_schema(by_alias=True)
    definitions = schema.get("$defs", {})
    members = _members(schema, value, definitions)
    for part in path[:-1]:
        value = value[part]
        inner = [_child(member, part) for member in members]
        members = [m for child in inner for m in _members(child, value, definitions)]
    known = sorted({name for member in members for name in member.get("properties", {})})
    return suggest(str(path[-1])[:80], known) if known else ""


def _child(schema: dict[str, Any], part: str | int) -> dict[str, Any]:
    if isinstance(part, int):
        child = schema.get("items", {})
    else:
        child = schema.get("properties", {}).get(part, schema.get("additionalProperties", {}))
    return child if isinstance(child, dict) else {}


def _members(
    schema: dict[str, Any], value: Any, definitions: dict[str, Any]
) -> list[dict[str, Any]]:
    """The plain schemas that `schema` stands for, as far as `value` tells."""
    if "$ref" in schema:
        return _members(definitions[schema["$ref"].rsplit("/", 1)[1]], value, definitions)
    for union in ("anyOf", "oneOf", "allOf"):
        if union in schema:
            parts = [m for part in schema[union] for m in _members(part, value, definitions)]
            return [part for part in parts if _agrees(part, value)] or parts
    return [schema]


def _agrees(schema: dict[str, Any], value: Any) -> bool:
    """Whether `value` has the schema's constants: which member of a tagged union is meant."""
    given = value if isinstance(value, dict) else {}
    fields = schema.get("properties", {}).items()
    return all(f["const"] == given.get(name) for name, f in fields if "const" in f)
