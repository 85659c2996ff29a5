"""Shows a fault of a conversion to ONNX: `python repro.py`; needs onnxruntime and numpy alone."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort


def check(model: Any, inputs: Any, expected: Any, optimised: bool = True) -> tuple[str, str]:
    """What is wrong with the output of a model, a file's name or bytes, in a word and at length."""
    options, (name, value) = ort.SessionOptions(), (str(expected["name"]), expected["value"])
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    if not optimised:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        if name not in [output.name for output in session.get_outputs()]:
            return "missing", f"has no output {name}"
        found = session.run([name], {p.name: inputs[p.name] for p in session.get_inputs()})[0]
    except Exception as error:  # onnxruntime's errors have no base of their own
        return "run", "does not run: " + " ".join(str(error).split())
    if found.shape != value.shape:
        return "shape", f"{name} has shape {list(found.shape)}, expected {list(value.shape)}"
    if expected["strict"] and found.dtype != value.dtype:
        return "dtype", f"{name} is {found.dtype}, expected {value.dtype}"
    if not np.isfinite(found[expected["finite"]]).all():
        return "nan", f"{name} is not finite where it is in PyTorch"
    off = np.abs(found.astype(np.float64) - value)[expected["real"]].max(initial=0.0)
    right = off <= expected["limit"]
    return "right" if right else "value", f"off by {off:.3g}, allowed {expected['limit']:.3g}"


def main(here: Path) -> int:
    """1 where failing.onnx is wrong, as it should be, 2 where passing.onnx is wrong too."""
    inputs = dict(np.load(here / "inputs.npz", allow_pickle=False))
    expected = dict(np.load(here / "expected.npz", allow_pickle=False))
    code = 0
    for model in sorted(here.glob("*ing.onnx")):
        for optimised in (True, False):
            kind, text = check(str(model), inputs, expected, optimised)
            sys.stdout.write(f"{model.name}, {'' if optimised else 'not '}optimised: {text}\n")
            if kind != "right" and optimised:
                code = max(code, 2 if model.stem == "passing" else 1)
    return code


if __name__ == "__main__":
    sys.exit(main(Path(__file__).resolve().parent))
