"""YAML and JSON text → plain values and the line of each; nothing else of either language.

YAML is 1.2 with the core schema. ruamel.yaml scans and parses; values are resolved here from its
events, since its own loader knows more types (dates, merges) and builds aliases. Why each thing
is refused is said in `surgery.documents`, which is what the rest of the package uses.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from surgery.errors import quote

MAX_DEPTH = 32
MAX_VALUES = 100_000
"""Values in one YAML document: the pure-Python scanner needs some 30 us for each."""
MAX_DIGITS = 400
"""Longest number: more digits than any float64 has, fewer than `int` takes quadratic time for."""

Path = tuple[str | int, ...]
Parsed = tuple[Any, dict[Path, int]]

_FORBIDDEN = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff\ufeff\ufffe\uffff]"
)
_FOREIGN_BREAK = re.compile("[\x85\u2028\u2029]")
"""Line breaks to YAML 1.1, and still to ruamel, but characters like any other to YAML 1.2."""
_NULL = frozenset({"", "~", "null", "Null", "NULL"})
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_JSON_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{},:\n]|[^\s\[\]{},:"]+')


class Problem(Exception):
    """A problem with its place, before the source's name is put before it."""

    def __init__(self, problem: str, path: Path = (), line: int | None = None) -> None:
        super().__init__(located(problem, path, line))


def located(problem: str, path: Path, line: int | None) -> str:
    """`problem @ path (line N)`, leaving out what is not known."""
    where = f" @ {spell(path)}" if path else ""
    return f"{problem}{where}" + (f" (line {line})" if line is not None else "")


def spell(path: Path) -> str:
    """`edits[0].factor` for `("edits", 0, "factor")`; odd keys are escaped."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            name = part if re.fullmatch(r"[\w-]{1,60}", part, re.ASCII) else quote(part, 40)
            text += f".{name}" if text else name
    return text


def printable(text: str, limit: int = 400) -> str:
    """`text` on one line: what a terminal would act on is escaped, the rest kept."""
    shown = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text[: limit + 1])
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def escape(text: str) -> str:
    """`text` with every character no document may hold spelled out, so that it can be stored."""
    return _FORBIDDEN.sub(lambda found: ascii(found.group())[1:-1], text)


def check_text(text: str, limit: int) -> None:
    """At most `limit` bytes, and no character that does not belong in a text file."""
    if len(text) > limit or len(text.encode("utf-8", "surrogatepass")) > limit:
        raise Problem(f"larger than {limit:,} bytes")
    if bad := _FORBIDDEN.search(text):
        line = text.count("\n", 0, bad.start()) + 1
        raise Problem(f"forbidden character {quote(bad.group())}", line=line)


def _check_string(text: str, path: Path, line: int | None) -> str:
    """An escape can spell what the text itself may not hold."""
    if bad := _FORBIDDEN.search(text):
        raise Problem(f"forbidden character {quote(bad.group())}", path, line)
    return text


# ---------------------------------------------------------------------------------------- YAML


def parse_yaml(text: str) -> Parsed:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    if bad := _FOREIGN_BREAK.search(text):
        line = text.count("\n", 0, bad.start()) + 1
        raise Problem(f"forbidden character {quote(bad.group())}", line=line)
    try:
        builder = _Builder(YAML(typ="safe", pure=True).parse(text))
        return builder.document(), builder.lines
    except MarkedYAMLError as cause:
        mark = cause.problem_mark or cause.context_mark
        problem = printable(cause.problem or cause.context or "unreadable")
        raise Problem(f"not YAML: {problem}", line=mark.line + 1 if mark else None) from None
    except (YAMLError, ValueError, OverflowError, AssertionError) as cause:
        # The scanner hands numbers of the text to chr() and int(), which have limits of their own,
        # and asserts that `%YAML 1.N` has an N it knows.
        raise Problem(f"not YAML: {printable(str(cause))}") from None


class _Builder:
    """Values and lines out of ruamel's events, one pass, refusing before building."""

    def __init__(self, events: Iterator[Any]) -> None:
        self.events = events
        self.lines: dict[Path, int] = {}
        self.values = 0

    def document(self) -> Any:
        next(self.events)  # the start of the stream
        start = next(self.events)
        if type(start).__name__ == "StreamEndEvent":
            raise Problem("empty document")
        if start.version or start.tags:
            raise Problem("directives (%YAML, %TAG) are not allowed", line=_line(start))
        value = self._node(next(self.events), ())
        next(self.events)  # the end of the document
        extra = next(self.events)
        if type(extra).__name__ != "StreamEndEvent":
            raise Problem("more than one document", line=_line(extra))
        return value

    def _node(self, event: Any, path: Path) -> Any:
        kind = type(event).__name__
        line = _line(event)
        if kind == "AliasEvent" or event.anchor is not None:
            raise Problem("anchors and aliases are not allowed", path, line)
        if event.tag is not None:
            raise Problem(f"tags are not allowed, found {quote(event.tag)}", path, line)
        self.lines.setdefault(path, line)
        self.values += 1
        if self.values > MAX_VALUES:
            raise Problem(f"more than {MAX_VALUES:,} values", line=line)
        if kind == "ScalarEvent":
            return _scalar(event, path, line)
        if len(path) >= MAX_DEPTH:
            raise Problem(f"nested deeper than {MAX_DEPTH} levels", line=line)
        return self._sequence(path) if kind == "SequenceStartEvent" else self._mapping(path)

    def _sequence(self, path: Path) -> list[Any]:
        items: list[Any] = []
        while type(event := next(self.events)).__name__ != "SequenceEndEvent":
            items.append(self._node(event, (*path, len(items))))
        return items

    def _mapping(self, path: Path) -> dict[str, Any]:
        items: dict[str, Any] = {}
        while type(event := next(self.events)).__name__ != "MappingEndEvent":
            key = self._key(event, path)
            if key in items:
                raise Problem(f"duplicate key {quote(key)}", path, _line(event))
            self.lines[(*path, key)] = _line(event)
            items[key] = self._node(next(self.events), (*path, key))
        return items

    def _key(self, event: Any, path: Path) -> str:
        scalar = type(event).__name__ == "ScalarEvent"
        key = self._node(event, (*path, "?")) if scalar else None
        self.lines.pop((*path, "?"), None)
        if not isinstance(key, str):
            found = event.value if scalar else "a collection"
            raise Problem(f"expected a string as key, found {quote(found)}", path, _line(event))
        return key


def _line(event: Any) -> int:
    line: int = event.start_mark.line
    return line + 1


def _scalar(event: Any, path: Path, line: int) -> Any:
    text: str = event.value
    plain, _ = event.implicit
    if not plain:
        return _check_string(text, path, line)
    if text in _NULL:
        return None
    if text in _BOOL:
        return _BOOL[text]
    if _INT.fullmatch(text) or _FLOAT.fullmatch(text) or _SPECIAL.fullmatch(text):
        return _number(text, path, line)
    return _check_string(text, path, line)


def _number(text: str, path: Path, line: int) -> int | float:
    if len(text) > MAX_DIGITS:
        raise Problem(f"a number of more than {MAX_DIGITS} characters", path, line)
    if _SPECIAL.fullmatch(text):
        return float(text.replace(".", ""))
    if _INT.fullmatch(text):
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    return float(text)


# ---------------------------------------------------------------------------------------- JSON


def parse_json(text: str, first_line: int = 1) -> Any:
    """Strict JSON (RFC 8259: no NaN), the value alone."""
    try:
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_constant=_refuse_constant,
            parse_int=_json_int,
            parse_float=_json_float,
        )
    except json.JSONDecodeError as cause:
        raise Problem(f"not JSON: {cause.msg}", line=cause.lineno + first_line - 1) from None
    except RecursionError:
        raise Problem(f"nested deeper than {MAX_DEPTH} levels") from None
    _check_value(value)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    items: dict[str, Any] = {}
    for key, value in pairs:
        if key in items:
            raise Problem(f"duplicate key {quote(key)}")
        items[key] = value
    return items


def _refuse_constant(name: str) -> Any:
    raise Problem(f"{name} is not JSON")


def _json_int(text: str) -> int:
    return int(_bounded(text))


def _json_float(text: str) -> float:
    return float(_bounded(text))


def _bounded(text: str) -> str:
    if len(text) > MAX_DIGITS:
        raise Problem(f"a number of more than {MAX_DIGITS} characters")
    return text


def _check_value(value: Any) -> None:
    """Depth and characters, without recursion."""
    stack: list[tuple[Any, int]] = [(value, 0)]
    while stack:
        node, depth = stack.pop()
        if isinstance(node, str):
            _check_string(node, (), None)
        elif isinstance(node, (dict, list)):
            if depth >= MAX_DEPTH:
                raise Problem(f"nested deeper than {MAX_DEPTH} levels")
            children = [*node, *node.values()] if isinstance(node, dict) else node
            stack.extend((child, depth + 1) for child in children)


def json_lines(text: str, line: int = 1) -> dict[Path, int]:
    """The line of every path, in JSON already known to be valid."""
    lines: dict[Path, int] = {}
    # One entry per open container: the index or key we are at, None where a key comes next.
    path: list[Any] = []
    for token in _JSON_TOKEN.findall(text):
        if token == "\n":
            line += 1
        elif token in ("]", "}"):
            path.pop()
        elif token == ",":
            path[-1] = path[-1] + 1 if isinstance(path[-1], int) else None
        elif path and path[-1] is None:
            path[-1] = json.loads(token)
            lines[tuple(path)] = line
        elif token != ":":
            lines.setdefault(tuple(path), line)
            if token in ("[", "{"):
                path.append(0 if token == "[" else None)
    return lines
