"""Fixed tolerances that the literature and other tools use, by name, as data.

None is a yardstick here: what a runtime may be off by depends on the model. They say how a run
would have been judged elsewhere, and a policy may ask for one in addition.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """One fixed tolerance on |r - t|, r being ONNX Runtime's value and t PyTorch's.

    rule: `sum`, within atol + rtol |t|, as numpy.allclose; `either`, within atol or within
    rtol |t|; `both`, within atol and within rtol |t|. Limits are inclusive.
    """

    rtol: float
    atol: float
    rule: str
    source: str


PRESETS = {
    "torch.onnx": Preset(
        1e-1, 5e-3, "both", "torch.onnx.export(verify=True), torch 2.13: warns above either"
    ),
    "optimum": Preset(
        1e-5,
        1e-5,
        "sum",
        "optimum.exporters.onnx: numpy.allclose with ATOL_FOR_VALIDATION 1e-5 and numpy's own rtol",
    ),
    "polygraphy": Preset(
        1e-5, 1e-5, "either", "polygraphy 0.53 CompareFunc.simple, elemwise: fails beyond both"
    ),
    "onnx-backend-test": Preset(1e-3, 1e-7, "sum", "onnx.backend.test, numpy.testing"),
    "issta-text": Preset(0.0, 1e-7, "sum", "arXiv 2303.17708 (ISSTA 2024), the paper's text"),
    "issta-notebook": Preset(0.0, 1e-3, "sum", "arXiv 2303.17708, the artifact's notebook"),
    "issta-synthetic": Preset(1e-3, 1e-7, "sum", "arXiv 2303.17708, synthetic models"),
}
