"""What every corner is asked to do: the batches, the greedy responses and the metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from surgery.arch import Architecture
from surgery.checkpoint import Checkpoint
from surgery.differential.answers import ForcedAnswer, forced_answers
from surgery.differential.measures import Measure, measures_of, needs_words, responders_of
from surgery.errors import NothingCompared, StimuliError
from surgery.export.tasks import Task
from surgery.metrics.intervals import LEVELS
from surgery.policy import Policy
from surgery.runtimes.child import Generation
from surgery.stimuli import Batch, Stimulus
from surgery.stimuli.afford import afford, positions_for
from surgery.stimuli.batches import (
    cache_batches,
    digest,
    position_batches,
    probe_batches,
    prompt_batches,
    within_budget,
)
from surgery.stimuli.extra import Space
from surgery.stimuli.prompts import Tokenizer, tokens_of
from surgery.stimuli.text import NAME as TEXT
from surgery.stimuli.text import text_batch

OUTPUT_BUDGET = 256 << 20
"""Bytes of kept outputs per corner; past it a seeded sample of positions is kept."""

DEFAULT_SEED = 0


@dataclass(frozen=True)
class Workload:
    """`responders[i]` are the ids of the stimuli that `generations[i]` continues, in order;
    `answers` those whose probability is asked for.

    space: what probes of the model can be; parameters: how many it has; position_bytes: what the
    outputs of one position take; budget: bytes of outputs to keep; left_out: why a batch does not
    run, or not in full, by its name; alone: the batch that was asked for in place of all.
    """

    stimuli: tuple[Stimulus, ...]
    batches: tuple[Batch, ...]
    measures: tuple[Measure, ...]
    generations: tuple[Generation, ...]
    responders: tuple[tuple[str, ...], ...]
    tokenizer: Tokenizer | None
    space: Space
    confidences: tuple[float, ...] = LEVELS
    parameters: int = 0
    position_bytes: int = 1
    budget: int = 0
    left_out: Mapping[str, str] = field(default_factory=dict)
    alone: str = ""
    answers: tuple[ForcedAnswer, ...] = ()

    @property
    def vocab(self) -> int:
        return self.space.vocab

    @property
    def seed(self) -> int:
        return self.space.seed

    def of_set(self, name: str) -> tuple[Stimulus, ...]:
        return tuple(stimulus for stimulus in self.stimuli if stimulus.set == name)

    @property
    def most_positions(self) -> int:
        """Positions whose outputs one round can hold at once."""
        return OUTPUT_BUDGET // self.position_bytes

    def batches_only(self, batches: tuple[Batch, ...]) -> Workload:
        """These batches, and nothing that a metric asks for besides."""
        none = replace(self, measures=(), generations=(), responders=(), answers=())
        return replace(none, batches=batches)

    def keep(self, batches: Sequence[Batch]) -> list[Batch]:
        """`batches` with as many selected positions as there is room for."""
        return within_budget(batches, self.position_bytes, self.budget, self.seed)

    def describe(self) -> dict[str, object]:
        """What names this workload in a report: digest, seed and sizes."""
        return {
            "sha256": digest(self.batches),
            "seed": self.seed,
            "batches": len(self.batches),
            "positions": sum(len(batch.selected) for batch in self.batches),
            "batch_sha256": {batch.name: digest([batch]) for batch in self.batches},
            **({"left_out": dict(self.left_out)} if self.left_out else {}),
        }


def make_workload(
    model: Checkpoint,
    arch: Architecture,
    task: Task,
    stimuli: tuple[Stimulus, ...],
    policy: Policy,
    seed: int = DEFAULT_SEED,
) -> Workload:
    """The workload for one model; raises `StimuliError` for stimuli it cannot take and
    `PolicyError` for a metric that does not exist."""
    vocab, positions = arch.sizes["vocab"], arch.sizes["positions"]
    measures = tuple(measures_of(stimuli, policy)) if task.causal else ()
    prompted = any(stimulus.prompt is not None for stimulus in stimuli)
    tokenizer = Tokenizer(model.root) if prompted or needs_words(stimuli, measures) else None
    tokens = tokens_of(stimuli, tokenizer, vocab, positions)
    width = _position_bytes(arch, task) // 2
    parameters = _parameters(model)
    text, untold = _text(model, vocab, positions, seed)
    asked = _probes(task, vocab, positions, seed, text)
    probes = afford(asked, positions_for(parameters))
    batches = [*prompt_batches(stimuli, tokens, width), *probes.batches]
    if not batches:
        raise NothingCompared("there is no input to compare on")
    # A text has one row of classes, whichever of its positions is asked for.
    budget = 0 if task.rows else OUTPUT_BUDGET
    kept = within_budget(batches, 2 * width, budget, seed)
    responders = responders_of(stimuli, measures, tokens, tokenizer, positions)
    ends = end_tokens(model)
    return Workload(
        stimuli,
        tuple(kept),
        measures,
        tuple(
            Generation(tuple(tokens[i] for i in ids), length, ends)
            for length, ids in responders.items()
        ),
        tuple(responders.values()),
        tokenizer,
        Space(vocab, positions, task.causal, task.cache, seed),
        tuple(sorted({*LEVELS, *policy.confidences})),
        parameters,
        2 * width,
        budget,
        probes.left_out | untold,
        answers=forced_answers(stimuli, measures, tokens, tokenizer, positions),
    )


def _text(
    model: Checkpoint, vocab: int, positions: int, seed: int
) -> tuple[list[Batch], dict[str, str]]:
    """Real text, or why there is none although the checkpoint has a tokenizer."""
    try:
        batch = text_batch(model.root, vocab, positions, seed)
    except StimuliError as error:
        return [], {TEXT: str(error)}
    return [batch] if batch else [], {}


def _probes(
    task: Task, vocab: int, positions: int, seed: int, text: Sequence[Batch]
) -> list[Batch]:
    """Every probe of the task, those first that tell most where not all can run: caches, for
    their first parts are runs without a cache, and of positions the last."""
    found = list(cache_batches(vocab, positions, seed)) if task.cache else []
    found += text
    found += probe_batches(vocab, positions, seed)
    if task.causal:
        found += reversed(list(position_batches(vocab, positions, seed)))
    return found


def _parameters(model: Checkpoint) -> int:
    """Elements of all tensors: an upper bound, since a lookup and idle experts compute nothing."""
    return sum(math.prod(info.shape) for info in model.tensors.values())


def _position_bytes(arch: Architecture, task: Task) -> int:
    """What one position's kept outputs take in the reference, which is float64."""
    sizes = arch.sizes
    cache = 2 * sizes["layers"] * sizes["kv_width"] if task.cache else 0
    return 8 * ((sizes["vocab"] if task.causal else arch.width) + cache)


def end_tokens(model: Checkpoint) -> tuple[int, ...]:
    """The tokens that end a response, by the config."""
    ends = model.config.get("eos_token_id")
    listed = ends if isinstance(ends, list) else [ends]
    return tuple(end for end in listed if type(end) is int)
