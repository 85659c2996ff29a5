"""What a finder gets, what it gives back, and the contract of its class."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from surgery.arch import Architecture
from surgery.checkpoint import Checkpoint
from surgery.find.journal import Journal
from surgery.metrics import Metric
from surgery.runtimes.pytorch import TorchRuntime
from surgery.stimuli import Stimulus
from surgery.stimuli.prompts import Tokenizer

Array = NDArray[Any]
Entry = Mapping[str, Any]

SCORE = "score"
"""The column that candidates are ranked by."""


@dataclass(frozen=True)
class Goal:
    """The behaviour that an edit shall raise (`sign` 1) or lower (-1), by a metric's name."""

    name: str
    metric: Metric
    sign: int

    @property
    def argument(self) -> str:
        """What follows the colon of the name: of `answer_rate:stated`, `stated`."""
        return self.name.partition(":")[2]


@dataclass(frozen=True)
class Lab:
    """One model, live, with what it is asked.

    runtime: the model in PyTorch, float32; `runtime.live` is the transformers model. train: the
    prompts to score candidates by. budget: how many rows (prompts times candidates) run at once.
    tensors: the name of the safetensors file beside the recipe that a proposal's arrays go to.
    progress: told what runs, how much of it is done, and of how much.
    """

    checkpoint: Checkpoint
    arch: Architecture
    runtime: TorchRuntime
    tokenizer: Tokenizer | None
    train: tuple[Stimulus, ...]
    goal: Goal
    seed: int
    budget: int
    tensors: str
    journal: Journal
    progress: Callable[[str, int, int], None]

    def of_set(self, name: str) -> tuple[Stimulus, ...]:
        """The training prompts of one set: `target`, `preserve` or `probe`."""
        return tuple(stimulus for stimulus in self.train if stimulus.set == name)

    @property
    def live(self) -> Any:
        """The transformers model."""
        return self.runtime.live


@dataclass(frozen=True)
class Ranking:
    """Candidates, the best first.

    `columns` are those of the CSV file: the address (`layer`, `head`), `score`, and what the score
    is made of; `rows` hold a number for each. `arrays` are what an edit needs beyond addresses,
    `facts` (strings, numbers, lists and objects) what the report tells of how they were found.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[float, ...], ...]
    arrays: Mapping[str, Array] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    def column(self, name: str) -> list[float]:
        """One number of every candidate, in order."""
        index = self.columns.index(name)
        return [row[index] for row in self.rows]


@dataclass(frozen=True)
class Proposal:
    """Recipe entries, as a recipe has them, and the tensors that `Lab.tensors` will hold.

    A value of an entry that is a `Path` is a place on disk, which the recipe names relative to its
    own folder.
    """

    entries: tuple[Entry, ...]
    tensors: Mapping[str, Array] = field(default_factory=dict)
    untie: bool = False
    allow_overlap: bool = False


@dataclass(frozen=True, kw_only=True)
class Finder(ABC):
    """One kind of thing to edit. Subclasses are frozen dataclasses whose fields are the options of
    the command; `method` is one of `methods`, of which the first is the default."""

    kind: ClassVar[str]
    methods: ClassVar[tuple[str, ...]]
    sizes: ClassVar[tuple[int, ...]]
    """How many candidates are tried where the user names no number; the validation prompts
    choose."""

    method: str

    @abstractmethod
    def rank(self, lab: Lab) -> Ranking:
        """Scores every candidate by `lab.train`, those first whose edit should move the goal most.

        Long work goes through `lab.journal`, so that it can be resumed, and tells
        `lab.progress`. Raises `FindError` where the model or the prompts do not allow it.
        """

    @abstractmethod
    def propose(self, lab: Lab, ranking: Ranking, chosen: Sequence[int]) -> Proposal:
        """The edit of the candidates at the indices `chosen` of the ranking, in that order: what a
        recipe lists first is what a sweep over fewer addresses keeps."""

    def draw(
        self, lab: Lab, ranking: Ranking, chosen: Sequence[int], generator: np.random.Generator
    ) -> Proposal:
        """The random control: by default as many of the candidates that were not chosen, drawn
        without replacement; of all candidates where too few are left."""
        rest = sorted(set(range(len(ranking.rows))) - set(chosen))
        pool = rest if len(rest) >= len(chosen) else list(range(len(ranking.rows)))
        drawn = generator.choice(pool, size=len(chosen), replace=False)
        return self.propose(lab, ranking, sorted(int(index) for index in drawn))
