"""Tasks that walk the same places in the same order, each place left by all before the next."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any


class Lockstep:
    """Runs tasks so that what a place needs is fetched once for all of them.

    A task calls `gate(place)` before it works there, and waits until every other task has come to
    the same gate or has ended; then `change(place)` is called, once, and they go on, one at a
    time. After the last, `change(None)`.
    """

    def __init__(self, change: Callable[[Any], None]) -> None:
        self._change = change
        self._back = threading.Semaphore(0)
        self._walker: _Walker | None = None

    @property
    def running(self) -> bool:
        """Whether a task is at work: gates may be called."""
        return self._walker is not None

    @property
    def current(self) -> int:
        """The number of the task at work."""
        return self._at_work().number

    def run(self, tasks: Sequence[Callable[[], None]]) -> None:
        """Runs all tasks to their ends; raises the first error of any, once all have stopped.

        Raises `RuntimeError` where tasks wait at different gates.
        """
        walkers = [_Walker(number, task, self._back) for number, task in enumerate(tasks)]
        try:
            self._walk(walkers)
        finally:
            self._walker = None
            for walker in walkers:
                walker.abandon()
            self._change(None)

    def gate(self, place: Hashable) -> None:
        """Where a task waits for the others; to be called by a task alone."""
        self._at_work().wait(place)

    def _at_work(self) -> _Walker:
        if self._walker is None:
            raise RuntimeError("no task is at work")
        return self._walker

    def _walk(self, walkers: list[_Walker]) -> None:
        going = walkers
        while going:
            for walker in going:
                self._walker = walker
                walker.step()
            going = [walker for walker in going if walker.is_alive() and not walker.ended]
            places = {walker.place for walker in going}
            if len(places) > 1:
                raise RuntimeError(f"tasks in lockstep are at different places: {places}")
            for place in places:
                self._change(place)


class _Abandoned(BaseException):
    """Ends a task whose run is over."""


class _Walker(threading.Thread):
    """One task, which runs only between `step` and the next gate."""

    def __init__(self, number: int, task: Callable[[], None], back: threading.Semaphore) -> None:
        super().__init__(daemon=True)
        self.number, self.place, self.ended = number, None, False
        self._task, self._back = task, back
        self._go = threading.Semaphore(0)
        self._error: BaseException | None = None
        self._over = False
        self.start()

    def run(self) -> None:
        self._go.acquire()
        try:
            if not self._over:
                self._task()
        except _Abandoned:
            pass
        except BaseException as error:  # raised again where the run was called
            self._error = error
        self.ended = True
        self._back.release()

    def step(self) -> None:
        """Lets the task run to its next gate or its end; raises what it raised."""
        self._go.release()
        self._back.acquire()
        if self._error is not None:
            raise self._error

    def wait(self, place: Any) -> None:
        self.place = place
        self._back.release()
        self._go.acquire()
        if self._over:
            raise _Abandoned

    def abandon(self) -> None:
        self._over = True
        self._go.release()
        self.join()
