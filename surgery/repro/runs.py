"""Parts in ONNX Runtime, in the process that calls."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.repro import script
from surgery.repro.parts import watched

Arrays = dict[str, NDArray[Any]]


def outputs(model: Any, inputs: Mapping[str, Any]) -> Arrays:
    """What a part gives, nothing of it optimised; nothing where it does not run."""
    from surgery.runtimes.session import open_session

    try:
        session = open_session(model.SerializeToString(), None, 1, level="disabled")
        names = [value.name for value in session.get_outputs()]
        fed = {port.name: inputs[port.name] for port in session.get_inputs()}
        return dict(zip(names, session.run(names, fed), strict=True))
    except Exception:  # onnxruntime's errors have no base of their own
        return {}


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
