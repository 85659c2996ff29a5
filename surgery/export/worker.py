"""The child process of `onnxfile.check` and `export_in_child`: `python -m … job.json`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from surgery import process


def work(arguments: dict[str, Any]) -> dict[str, Any]:
    """Does what `arguments["action"]` names, `check` or `export`; the answer is JSON."""
    if arguments["action"] == "check":
        return _check(arguments)
    return _export(arguments)


def _check(arguments: dict[str, Any]) -> dict[str, Any]:
    from surgery.export.onnxfile import check_here

    folder = arguments["initializers"]
    check_here(Path(arguments["path"]), Path(folder) if folder else None, arguments["session"])
    return {}


def _export(arguments: dict[str, Any]) -> dict[str, Any]:
    from surgery.export import export

    result = export(
        Path(arguments["model_dir"]),
        Path(arguments["output"]),
        task=arguments["task"],
        opset=arguments["opset"],
        dtype=arguments["dtype"],
        layout=arguments["layout"],
    )
    return result.to_json()


if __name__ == "__main__":
    sys.exit(process.serve(sys.argv[1], work))
