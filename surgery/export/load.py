"""A checkpoint folder as a live PyTorch model, with its numbers or as a skeleton without them."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from surgery.arch import identify
from surgery.checkpoint import Checkpoint
from surgery.errors import CheckpointError, EnvironmentFault, quote
from surgery.export.quiet import quiet
from surgery.export.tasks import Task

_LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


def load_model(model_dir: Path, task: Task, dtype: str, attention: str | None = None) -> Any:
    """The transformers model of `model_dir` for `task`, in eval mode, on the CPU.

    `dtype` is torch's name of the one every parameter is cast to (`float32`, `float16`,
    `bfloat16`, `float64`); `attention` is `eager` or `sdpa`, by default sdpa where a class has it.
    Raises `CheckpointError` when the folder is malformed, transformers refuses it, or
    a parameter has no tensor in it, which transformers would fill with random numbers.
    """
    checkpoint = Checkpoint.open(model_dir)

    def load(cls: Any, config: Any, torch: Any) -> Any:
        return cls.from_pretrained(
            model_dir,
            config=config,
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            output_loading_info=True,
            **_LOCAL,
            **({"attn_implementation": attention} if attention else _implementation(cls)),
            # Kernels that multiply experts in groups know no float64.
            **({"experts_implementation": "eager"} if _has_experts(cls) else {}),
            **_pooling(cls, task, checkpoint),
        )

    model, loaded = _transformers(model_dir, task, load)
    missing = sorted(loaded["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{model_dir}: has no tensor for {len(missing)} parameters of the model, "
            f"first {quote(missing[0])}"
        )
    return model.eval()


def load_empty(model_dir: Path, task: Task, dtype: str) -> Any:
    """The model of `load_model` with its parameters on the meta device: sizes, and no numbers.

    Buffers, such as rotary frequencies, are real. Raises what `load_model` raises, but for
    parameters without a tensor.
    """
    checkpoint = Checkpoint.open(model_dir)

    def make(cls: Any, config: Any, torch: Any) -> Any:
        with _meta_parameters(torch):
            model = cls._from_config(
                config,
                dtype=getattr(torch, dtype),
                **_implementation(cls),
                **({"experts_implementation": "eager"} if _has_experts(cls) else {}),
                **_pooling(cls, task, checkpoint),
            )
            # As after loading: buffers are computed in float32, whatever type they have.
            for module in model.modules():
                module._is_hf_initialized = False
            model.initialize_weights()
        return model.eval()

    return _transformers(model_dir, task, make)


def load_skeleton(
    model_dir: Path, task: Task, dtype: str, shrink: Callable[[Any], None]
) -> tuple[Any, Any]:
    """The model of `load_model` without a number in it, and the mode its parameters live in.

    Parameters are fake tensors: sizes and no memory. Buffers, such as rotary frequencies, are
    real. `shrink` may change the config before the model is made of it.
    """
    checkpoint = Checkpoint.open(model_dir)

    def make(cls: Any, config: Any, torch: Any) -> Any:
        shrink(config)
        with _fake_parameters(torch) as mode:
            model = cls._from_config(
                config,
                dtype=getattr(torch, dtype),
                **_implementation(cls),
                **_pooling(cls, task, checkpoint),
            )
        return model.eval(), mode

    made: tuple[Any, Any] = _transformers(model_dir, task, make)
    return made


def as_captured(model: Any) -> Any:
    """A model of `load_model` that computes experts as a skeleton does: a loop over those that
    are chosen cannot be captured."""
    if _has_experts(type(model)):
        model.set_experts_implementation(model.get_correct_experts_implementation(None))
    return model


def forward_inputs(model: Any, task: Task) -> tuple[str, ...]:
    """The inputs of `task` that the model takes: ALiBi models have no use for positions."""
    parameters = inspect.signature(model.forward).parameters
    return tuple(name for name in task.inputs if name in parameters)


def _transformers(model_dir: Path, task: Task, make: Callable[[Any, Any, Any], Any]) -> Any:
    """`make(class, config, torch)`, with whatever comes out of transformers as one error."""
    with quiet():
        try:
            import torch
            import transformers
        except ImportError as error:
            raise EnvironmentFault(f"PyTorch models need torch and transformers: {error}") from None
        try:
            config = transformers.AutoConfig.from_pretrained(model_dir, **_LOCAL)
            return make(_model_class(transformers, task, config), config, torch)
        except Exception as error:  # transformers has no exception tree: anything may come out
            reason = quote(f"{type(error).__name__}: {error}", 300)
            raise CheckpointError(f"{model_dir}: transformers cannot load it: {reason}") from None


def _model_class(transformers: Any, task: Task, config: Any) -> Any:
    found = getattr(transformers, task.auto)._model_mapping[type(config)]
    return found[0] if isinstance(found, tuple) else found


def _implementation(cls: Any) -> dict[str, str]:
    """How attention is computed: eager only where a class has nothing else."""
    return {"attn_implementation": "sdpa" if cls._supports_sdpa else "eager"}


def _has_experts(cls: Any) -> bool:
    return bool(cls._can_set_experts_implementation())


def _pooling(cls: Any, task: Task, checkpoint: Checkpoint) -> dict[str, bool]:
    """Many encoders have a pooler that few checkpoints fill and `last_hidden_state` skips."""
    if task.causal or "add_pooling_layer" not in inspect.signature(cls.__init__).parameters:
        return {}
    roles = {role.role for role in identify(checkpoint).roles.values()}
    return {"add_pooling_layer": "pooler" in roles}


@contextlib.contextmanager
def _fake_parameters(torch: Any) -> Iterator[Any]:
    """While entered, every parameter that a module registers becomes a fake tensor."""
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())

    def fake(parameter: Any) -> Any:
        if isinstance(parameter, FakeTensor):
            return parameter
        with mode:
            empty = torch.empty(parameter.shape, dtype=parameter.dtype)
        return torch.nn.Parameter(empty, requires_grad=False)

    with _registered(torch, fake):
        yield mode


@contextlib.contextmanager
def _meta_parameters(torch: Any) -> Iterator[None]:
    """While entered, every parameter that a module registers goes to the meta device."""

    def meta(parameter: Any) -> Any:
        if parameter.is_meta:
            return parameter
        empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
        return torch.nn.Parameter(empty, requires_grad=False)

    with _registered(torch, meta):
        yield


@contextlib.contextmanager
def _registered(torch: Any, change: Callable[[Any], Any]) -> Iterator[None]:
    """While entered, modules register what `change` makes of each parameter."""
    register = torch.nn.Module.register_parameter

    def changed(self: Any, name: str, parameter: Any) -> None:
        register(self, name, None if parameter is None else change(parameter))

    torch.nn.Module.register_parameter = changed
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register
