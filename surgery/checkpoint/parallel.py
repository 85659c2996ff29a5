"""Work on the files of a checkpoint, as many at a time as there are cores.

Hashing, reading and writing let go of the interpreter, so threads are enough.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, ThreadPoolExecutor
from functools import partial
from threading import Lock
from typing import TypeVar

Result = TypeVar("Result")

Advance = Callable[[int], None]
"""Called by a job with every so many bytes it has done."""

Progress = Callable[[str, int, int], None]
"""Called with the file being worked on, the bytes done and the bytes there are to do."""


def in_parallel(
    jobs: Mapping[str, Callable[[Advance], Result]], total: int, progress: Progress | None = None
) -> dict[str, Result]:
    """What the job of each file returns, begun in the order given.

    Once one raises, the others stop at their next `advance` and that error is raised.
    """
    meter = _Meter(total, progress)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        running = {file: pool.submit(job, partial(meter, file)) for file, job in jobs.items()}
        try:
            return {file: job.result() for file, job in running.items()}
        except BaseException:
            meter.cancel()
            pool.shutdown(cancel_futures=True)
            raise


class _Meter:
    """Adds up the bytes that threads have done, and stops them when one has failed."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total, self._progress = total, progress
        self._done, self._lock, self._cancelled = 0, Lock(), False

    def __call__(self, file: str, nbytes: int) -> None:
        """Raises `CancelledError` once `cancel` was called."""
        if self._cancelled:
            raise CancelledError
        with self._lock:
            self._done += nbytes
            if self._progress is not None:
                self._progress(file, self._done, self._total)

    def cancel(self) -> None:
        self._cancelled = True
