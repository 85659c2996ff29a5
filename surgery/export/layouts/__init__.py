"""Where an exported graph's numbers lie: in a file of their own, or in the checkpoint itself."""

from __future__ import annotations

from surgery.export.layouts.interface import Layout
from surgery.registry import Registry

__all__ = ["LAYOUTS", "Layout"]

LAYOUTS: Registry[type[Layout]] = Registry(
    "layout",
    {
        "portable": "surgery.export.layouts.portable:Portable",
        "linked": "surgery.export.layouts.linked:Linked",
    },
)
