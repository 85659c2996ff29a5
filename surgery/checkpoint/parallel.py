"""Work on the files of a checkpoint, as many at a time as there are cores.

Hashing, reading and writing let go of the interpreter, so threads are enough.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, ThreadPoolExecutor
from functools import partial
from threading import Condition
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
        try:
            running = {file: pool.submit(meter.run, file, job) for file, job in jobs.items()}
            return {file: job.result() for file, job in running.items()}
        except BaseException:
            # A signal may come while a thread is being started, which the pool then does not know.
            meter.cancel()
            raise


class _Meter:
    """Adds up the bytes that threads have done, and stops them when one has failed."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total, self._progress = total, progress
        self._done, self._running, self._cancelled = 0, 0, False
        self._lock = Condition()

    def run(self, file: str, job: Callable[[Advance], Result]) -> Result:
        """Does a job; raises `CancelledError` where `cancel` was called before its end."""
        with self._lock:
            self._refuse_cancelled()
            self._running += 1
        try:
            return job(partial(self._advance, file))
        finally:
            with self._lock:
                self._running -= 1
                self._lock.notify_all()

    def cancel(self) -> None:
        """Stops every job, and returns when none is running any more."""
        with self._lock:
            self._cancelled = True
            self._lock.wait_for(lambda: not self._running)

    def _refuse_cancelled(self) -> None:
        if self._cancelled:
            raise CancelledError

    def _advance(self, file: str, nbytes: int) -> None:
        with self._lock:
            self._refuse_cancelled()
            self._done += nbytes
            if self._progress is not None:
                self._progress(file, self._done, self._total)
