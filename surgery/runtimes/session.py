"""Sessions of ONNX Runtime: how far a graph is optimised, and where it runs."""

from __future__ import annotations

from pathlib import Path

import onnxruntime

from surgery.errors import EnvironmentFault

LEVELS = {
    "disabled": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}
"""How far a graph is optimised, by the names of `GraphOptimizationLevel`, nothing first."""
CPU = "CPUExecutionProvider"
_REMOTE = ("AzureExecutionProvider",)
_FOLDER_KEY = "session.model_external_initializers_file_folder_path"


def open_session(
    model: str | bytes,
    initializers: Path | None,
    threads: int,
    level: str = "all",
    provider: str = CPU,
) -> onnxruntime.InferenceSession:
    """A session of a file, or of a model's bytes whose external data lies in the folder
    `initializers`; optimised to a `level` of `LEVELS`, on one execution provider.

    Raises `EnvironmentFault` where that provider is not to be had: ONNX Runtime itself would go on
    without it.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, LEVELS[level])
    if initializers is not None:
        options.add_session_config_entry(_FOLDER_KEY, str(initializers))
    # What another provider has no kernel for runs on the CPU, as ONNX Runtime does by itself.
    wanted = list(dict.fromkeys((provider, CPU)))
    session = onnxruntime.InferenceSession(model, options, providers=wanted)
    if provider not in session.get_providers():
        raise EnvironmentFault(f"{provider} is not to be had on this machine")
    return session


def other_providers() -> tuple[str, ...]:
    """The execution providers of this build besides the CPU's; those that compute elsewhere, on
    somebody's server, left out."""
    return tuple(p for p in onnxruntime.get_available_providers() if p not in (CPU, *_REMOTE))
