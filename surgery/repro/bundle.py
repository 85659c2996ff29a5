"""A bundle on disk: two models, what they are fed, what must come out, a script, a page to read.

The same bundle is the same bytes, wherever and whenever it is written.
"""

from __future__ import annotations

import io
import json
import platform
import zipfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.errors import InputError
from surgery.repro import script
from surgery.repro.shrinking import Case

MAX_BYTES = 5_000_000
"""Of a whole bundle: what an issue tracker takes as an attachment."""
PACKAGES = ("numpy", "onnx", "onnxruntime", "torch", "transformers", "weight-surgery")

README = """# {site}

`failing.onnx` is the least of the graph found that is wrong: {problem}.

- fingerprint: `{fingerprint}`
- where: {where}
- found: {message}
- input: {batch}, reduced to what still shows the fault; what a part reads within the graph is what
  PyTorch has there, and within a module what a fresh export has
- expected: what PyTorch computes in float32 ({allowed})
- passing.onnx: {passing}

`python repro.py` needs onnxruntime and numpy alone. It runs each model with optimisations and
without, and exits 1 while `failing.onnx` is wrong, 2 if `passing.onnx` is wrong too, else 0.
`inputs.npz` and `expected.npz` hold plain arrays; of the output, `real` positions are compared and
`finite` ones must be finite.
"""
_PROBLEMS = {
    "missing": "it lacks the output",
    "shape": "its output has another shape",
    "dtype": "its output has another type",
    "nan": "it gives numbers that are not finite",
    "value": "it gives other numbers",
}


def write(case: Case, told: Mapping[str, Any], folder: Path) -> int:
    """Writes the files of one bundle into an empty folder; how many bytes they are.

    `told` has `site`, `fingerprint`, `where`, `message`, `batch`, `problem` and `changed`, for
    people. Raises `InputError` where it would be larger than `MAX_BYTES`.
    """
    files = {
        "failing.onnx": case.failing.SerializeToString(deterministic=True),
        "inputs.npz": archive(case.inputs),
        "expected.npz": archive(case.expected),
        "versions.json": _json(_versions()),
        "repro.py": Path(script.__file__).read_bytes(),
        "README.md": _readme(case, told).encode(),
    }
    if case.passing is not None:
        files["passing.onnx"] = case.passing.SerializeToString(deterministic=True)
    size = sum(map(len, files.values()))
    if size > MAX_BYTES:
        raise InputError(
            f"the bundle of {told['site']} would be {size} bytes; expected at most {MAX_BYTES}: "
            "plant the fault in a smaller model of the family, or give shorter stimuli"
        )
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return size


def archive(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """An .npz that numpy reads without pickle, with no clock in it; raises `ValueError` for an
    array of objects."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_STORED) as files:
        for name, array in sorted(arrays.items()):
            member = io.BytesIO()
            np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)
            files.writestr(zipfile.ZipInfo(f"{name}.npy"), member.getvalue())
    return made.getvalue()


def _versions() -> dict[str, str]:
    found = {name: version(name) for name in PACKAGES}
    return {**found, "python": platform.python_version(), "machine": platform.machine()}


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def _readme(case: Case, told: Mapping[str, Any]) -> str:
    kind = told["problem"]
    spoken = _PROBLEMS.get(kind, f"it does not run, at {kind.removeprefix('run ') or 'its start'}")
    limit = float(case.expected["limit"])
    allowed = f"allowed: {limit:.3g}, eight times what float32 rounds there"
    nothing = "none: neither a change of one thing nor a fresh export is right"
    return README.format(
        **{name: told[name] for name in ("site", "fingerprint", "where", "message", "batch")},
        problem=spoken,
        allowed=allowed,
        passing=told["changed"] if case.passing is not None else nothing,
    )
