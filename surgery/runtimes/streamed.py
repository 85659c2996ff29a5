"""What streamed runtimes share: one part of the model in memory at a time, read once for all."""

from __future__ import annotations

import ctypes
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.export.quiet import quiet
from surgery.runtimes.interface import ModelRef, Runtime, stream_file
from surgery.runtimes.lockstep import Lockstep

_ARENAS, _MAPPINGS, _MAPPED, _PAD, _TRIM = -8, -4, -3, -2, -1
"""glibc's names of what `mallopt` sets: M_ARENA_MAX, M_MMAP_MAX, M_MMAP_THRESHOLD, M_TOP_PAD and
M_TRIM_THRESHOLD."""


class Streamed(Runtime):
    """A model of which one part at a time is in memory.

    Calls of `infer` in tasks that are run `together` wait for each other at every part, so that
    it is read once for all. Activations are all that is kept from one part to the next.
    """

    def __init__(self, model: ModelRef, threads: int) -> None:
        super().__init__(model, threads)
        self._lockstep = Lockstep(self._change)
        self._streams: Path | None = None
        self._first = 0
        _give_back() if model.cuts else _reuse()

    @abstractmethod
    def _change(self, part: Any) -> None:
        """Lets go of the part in memory, and fetches `part`, which is None after the last."""

    def together(
        self, tasks: Sequence[Callable[[], None]], streams: Path | None = None, first: int = 0
    ) -> None:
        self._streams, self._first = streams, first
        with quiet():
            self._lockstep.run(tasks)

    def _alone(self, task: Callable[[], None]) -> None:
        """Runs a task that meets gates: among others, or by itself where there are none."""
        task() if self._lockstep.running else self.together([task])

    def _keep(self, kind: str, cut: int, array: NDArray[Any]) -> None:
        if self._streams is not None:
            np.save(self._streams / stream_file(kind, self._number, cut), array)

    @property
    def _number(self) -> int:
        """That of the task at work."""
        return self._first + self._lockstep.current


def _give_back() -> None:
    """Has the C library give memory back when it is freed: the weights of one part would else be
    kept beside those of the next, and by each thread for itself."""
    _allocate({_ARENAS: 1, _MAPPED: 1 << 20})


def _reuse() -> None:
    """Has the C library use memory again that is freed: where a run need not fit a whole model's
    size, every page would else be asked for, and zeroed, once for each part and each batch."""
    _allocate({_ARENAS: 1, _MAPPINGS: 0, _PAD: 64 << 20, _TRIM: (1 << 31) - 1})


def _allocate(options: Mapping[int, int]) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for name, value in options.items():
            mallopt(name, value)
