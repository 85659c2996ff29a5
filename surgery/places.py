"""Where surgery keeps what it may make again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_home() -> Path:
    """`SURGERY_CACHE`, else `XDG_CACHE_HOME/surgery`, else `~/.cache/surgery`."""
    own = os.environ.get("SURGERY_CACHE")
    if own:
        return Path(own)
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "surgery"
