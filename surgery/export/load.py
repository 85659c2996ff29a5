"""A checkpoint folder as a live PyTorch model."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from surgery.checkpoint import Checkpoint
from surgery.errors import CheckpointError, EnvironmentFault, quote
from surgery.export.quiet import quiet
from surgery.export.tasks import Task


def load_model(model_dir: Path, task: Task, dtype: str) -> Any:
    """The transformers model of `model_dir` for `task`, in eval mode, on the CPU.

    `dtype` is torch's name of the one every parameter is cast to (`float32`, `float16`,
    `float64`). Attention is `sdpa`: the eager one gives NaN in float64 on left-padded batches.
    Raises `CheckpointError` when the folder is malformed, transformers refuses it, or a
    parameter has no tensor in it, which transformers would fill with random numbers.
    """
    Checkpoint.open(model_dir)
    with quiet():
        try:
            import torch
            import transformers
        except ImportError as error:
            raise EnvironmentFault(f"PyTorch models need torch and transformers: {error}") from None
        try:
            model, loaded = _from_pretrained(transformers, model_dir, task, getattr(torch, dtype))
        except Exception as error:  # transformers has no exception tree: anything may come out
            reason = quote(f"{type(error).__name__}: {error}", 300)
            raise CheckpointError(f"{model_dir}: transformers cannot load it: {reason}") from None
    missing = sorted(loaded["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{model_dir}: has no tensor for {len(missing)} parameters of the model, "
            f"first {quote(missing[0])}"
        )
    return model.eval()


def _from_pretrained(transformers: Any, model_dir: Path, task: Task, dtype: Any) -> Any:
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    config = transformers.AutoConfig.from_pretrained(model_dir, **local)
    auto = transformers.AutoModelForCausalLM if task.causal else transformers.AutoModel
    return auto.from_pretrained(
        model_dir,
        config=config,
        dtype=dtype,
        attn_implementation="sdpa",
        use_safetensors=True,
        output_loading_info=True,
        **local,
        **({} if task.causal else _without_pooler(auto, config)),
    )


def _without_pooler(auto: Any, config: Any) -> dict[str, bool]:
    """Many encoders have a pooler that no checkpoint fills and `last_hidden_state` skips."""
    parameters = inspect.signature(auto._model_mapping[type(config)].__init__).parameters
    return {"add_pooling_layer": False} if "add_pooling_layer" in parameters else {}
