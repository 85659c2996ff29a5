"""The child process of `check`, `captured` and `quantize`: `python -m … job.json`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from surgery import process


def work(arguments: dict[str, Any]) -> dict[str, Any]:
    """Does what `arguments["action"]` names; the answer is JSON."""
    actions = {"check": _check, "capture": _capture, "quantize": _quantize}
    return actions[arguments["action"]](arguments)


def _check(arguments: dict[str, Any]) -> dict[str, Any]:
    from surgery.export.onnxfile import check_here

    folder = arguments["initializers"]
    check_here(
        Path(arguments["path"]),
        Path(folder) if folder else None,
        arguments["session"],
        full=arguments["full"],
    )
    return {}


def _capture(arguments: dict[str, Any]) -> dict[str, Any]:
    from surgery.export.capture import capture, serialized

    report = arguments["report"]
    graph = capture(
        Path(arguments["model_dir"]),
        arguments["task"],
        arguments["opset"],
        arguments["dtype"],
        report=Path(report) if report else None,
    )
    Path(arguments["output"]).write_bytes(serialized(graph))
    return {}


def _quantize(arguments: dict[str, Any]) -> dict[str, Any]:
    from surgery.export.quantize import quantize_here

    quantize_here(Path(arguments["source"]), Path(arguments["target"]))
    return {}


if __name__ == "__main__":
    sys.exit(process.serve(sys.argv[1], work))
