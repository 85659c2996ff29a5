"""Fields of a `config.json` as facts consult them: by dotted path, with the family's defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import StrictBool, StrictInt, StrictStr

Value = StrictBool | StrictInt | StrictStr
Condition = dict[str, Value]
"""Config fields and what each must hold; `true` and `false` stand for set and not set."""


@dataclass(frozen=True)
class Settings:
    """A parsed `config.json` and what the family assumes for fields it leaves out."""

    config: Mapping[str, Any]
    defaults: Mapping[str, Any]

    def get(self, key: str) -> Any:
        """The field at dotted path `key`, its default, or None."""
        found: Any = self.config
        for name in key.split("."):
            if not isinstance(found, Mapping) or name not in found:
                return self.defaults.get(key)
            found = found[name]
        return found

    def matches(self, condition: Condition) -> bool:
        """Whether every field of `condition` holds what it asks for."""
        return all(self._holds(key, value) for key, value in condition.items())

    def _holds(self, key: str, expected: Value) -> bool:
        found = self.get(key)
        if isinstance(expected, bool):
            return bool(found) is expected
        return type(found) is type(expected) and found == expected
