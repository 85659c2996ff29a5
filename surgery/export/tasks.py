"""What a graph is for: its inputs, its outputs, and the task a model family has by default."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from surgery.checkpoint import Checkpoint
from surgery.errors import InputError, quote
from surgery.registry import suggest


@dataclass(frozen=True)
class Task:
    """`inputs` in the order of the graph; `output` is the one that is compared.

    With `cache`, the graph also reads `past_key_values.N.key|value` and writes
    `present.N.key|value`, both [batch, key-value heads, length, head size]. `pooled` is a second
    output [batch, width], of models that have it; `auto` the transformers class that makes the
    model.
    """

    name: str
    inputs: tuple[str, ...]
    output: str
    auto: str
    cache: bool = False
    pooled: str | None = None

    @property
    def rows(self) -> bool:
        """Whether its output is one row for each text, [batch, n], not one for each token."""
        return self.auto == _CLASSIFIER

    @property
    def causal(self) -> bool:
        """Whether it predicts the next token at every position."""
        return self.auto == _CAUSAL


_CLASSIFIER = "AutoModelForSequenceClassification"
_CAUSAL = "AutoModelForCausalLM"
CACHED = "causal-lm-with-past"
POOLED = "pooler_output"
_DECODER_INPUTS = ("input_ids", "attention_mask", "position_ids")
_ENCODER_INPUTS = ("input_ids", "attention_mask")

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("causal-lm", _DECODER_INPUTS, "logits", _CAUSAL),
        Task(CACHED, _DECODER_INPUTS, "logits", _CAUSAL, cache=True),
        Task("encoder", _ENCODER_INPUTS, "last_hidden_state", "AutoModel", pooled=POOLED),
        Task("sequence-classification", _ENCODER_INPUTS, "logits", _CLASSIFIER),
    )
}

_OF_KIND = {
    "decoder": ("a decoder", ("causal-lm", CACHED)),
    "encoder": ("an encoder", ("encoder", "sequence-classification")),
}
"""The tasks of a kind of family; the first is its default."""


def find_task(name: str) -> Task:
    """The task of that name; `InputError` names the nearest known one."""
    if name not in TASKS:
        raise InputError(f"unknown task {quote(name)}{suggest(name, TASKS)}")
    return TASKS[name]


def default_task(model_dir: Path) -> Task:
    """The task of the checkpoint's family: `causal-lm` for decoders, `encoder` for encoders."""
    return choose_task(model_dir, None)


def choose_task(model_dir: Path, name: str | None) -> Task:
    """The task of that name, or the family's default; `InputError` where the family has no such
    task. Reads headers alone."""
    from surgery.arch import identify  # a child that checks a file is begun without

    wanted = find_task(name) if name else None
    arch = identify(Checkpoint.open(model_dir))
    spoken, known = _OF_KIND[arch.facts.kind]
    if wanted is None:
        return TASKS[known[0]]
    if wanted.name not in known:
        listed = ", ".join(known)
        raise InputError(
            f"{model_dir}: {arch.family} is {spoken}; its tasks are: {listed}; found "
            f"{quote(wanted.name)}"
        )
    return wanted
