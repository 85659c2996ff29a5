"""Parts in ONNX Runtime, in the process that calls."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from surgery.repro import script
from surgery.repro.parts import watched

Arrays = dict[str, NDArray[Any]]
_T = TypeVar("_T")


def attempted(call: Callable[[], _T]) -> _T | None:
    """What a call of ONNX Runtime's own gives; None where it fails: the graphs are here because
    something does."""
    try:
        return call()
    except Exception:  # onnxruntime's errors have no base of their own
        return None


def opened(model: Any, folder: Path | None = None, level: str = "disabled") -> Any | None:
    """A session of a ModelProto whose external data lies in `folder`; None where there is none."""
    from surgery.runtimes.session import open_session

    return attempted(partial(open_session, model.SerializeToString(), folder, 1, level=level))


def results(session: Any | None, inputs: Mapping[str, Any]) -> Arrays:
    """All outputs, from those of `inputs` that the session takes; nothing where it does not run."""
    if session is None:
        return {}
    names = [value.name for value in session.get_outputs()]
    fed = {port.name: inputs[port.name] for port in session.get_inputs()}
    found = attempted(partial(session.run, names, fed))
    return {} if found is None else dict(zip(names, found, strict=True))


def outputs(model: Any, inputs: Mapping[str, Any], folder: Path | None = None) -> Arrays:
    """What a graph gives, nothing of it optimised; nothing where it does not run."""
    return results(opened(model, folder), inputs)


def every_value(model: Any, inputs: Mapping[str, Any]) -> Arrays:
    """What each node of a part makes, sequences left out."""
    found = outputs(watched(model), inputs)
    return {name: array for name, array in found.items() if isinstance(array, np.ndarray)}


def problem(model: Any, inputs: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """What the bundle's own script finds wrong with a part, in a word; of one that does not run,
    with the node that does not. Empty where nothing is."""
    kind, text = script.check(model.SerializeToString(), inputs, expected)
    if kind == "run":
        node = re.search(r"running (\w+) node", text)
        return f"run {node[1] if node else ''}"
    return "" if kind == "right" else kind
