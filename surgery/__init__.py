"""Edit transformer weights, ship them through ONNX, and prove that both did what was asked.

Each command of the `surgery` command line is a function of the same name here:

    import surgery
    surgery.apply("recipe.yaml", model="model/", output="edited/")

They are imported when first used: `import surgery` itself costs nothing.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from surgery.api import (
        apply,
        demo,
        diff,
        diff_weights,
        export,
        find,
        gate,
        inspect,
        lineage,
        localize,
        plan,
        report,
        repro,
        revert,
        schema,
        sweep_strength,
        validate,
        verify,
    )

__version__ = "0.1.0"

__all__ = [
    "apply",
    "demo",
    "diff",
    "diff_weights",
    "export",
    "find",
    "gate",
    "inspect",
    "lineage",
    "localize",
    "plan",
    "report",
    "repro",
    "revert",
    "schema",
    "sweep_strength",
    "validate",
    "verify",
]


class _Package(ModuleType):
    """Keeps `surgery.plan` the function.

    Some functions share their name with the module they live in, and importing a module binds
    it to its package; for those names that is ignored, and `from surgery.plan import …` works
    as ever.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name in __all__:
            return getattr(import_module("surgery.api"), name)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


sys.modules[__name__].__class__ = _Package
