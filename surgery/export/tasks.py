"""What a graph is for: its inputs, its outputs, and the task a model family has by default."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from surgery.arch import identify
from surgery.checkpoint import Checkpoint
from surgery.errors import InputError, quote
from surgery.registry import suggest


@dataclass(frozen=True)
class Task:
    """`inputs` in the order of the graph; `output` is the one that is compared.

    With `cache`, the graph also reads `past_key_values.N.key|value` and writes
    `present.N.key|value`, both [batch, key-value heads, length, head size].
    """

    name: str
    inputs: tuple[str, ...]
    output: str
    cache: bool = False
    causal: bool = True


TASKS: dict[str, Task] = {
    "causal-lm": Task("causal-lm", ("input_ids", "attention_mask", "position_ids"), "logits"),
    "causal-lm-with-past": Task(
        "causal-lm-with-past",
        ("input_ids", "attention_mask", "position_ids"),
        "logits",
        cache=True,
    ),
    "encoder": Task("encoder", ("input_ids", "attention_mask"), "last_hidden_state", causal=False),
}

_DEFAULTS = {"decoder": "causal-lm", "encoder": "encoder"}


def find_task(name: str) -> Task:
    """The task of that name; `InputError` names the nearest known one."""
    if name not in TASKS:
        raise InputError(f"unknown task {quote(name)}{suggest(name, TASKS)}")
    return TASKS[name]


def default_task(model_dir: Path) -> Task:
    """The task of the checkpoint's family: `causal-lm` for decoders, `encoder` for encoders."""
    return TASKS[_DEFAULTS[identify(Checkpoint.open(model_dir)).facts.kind]]
