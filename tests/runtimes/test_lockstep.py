"""Tasks in lockstep: what a place needs is fetched once, and is gone before the next."""

from __future__ import annotations

from functools import partial

import pytest

from surgery.runtimes.lockstep import Lockstep


def test_every_place_is_fetched_once_for_all_tasks_and_left_by_all_before_the_next() -> None:
    seen: list[object] = []
    lockstep = Lockstep(lambda place: seen.append(("fetch", place)))

    def task(rounds: int) -> None:
        for place in ["a", "b"] * rounds:
            lockstep.gate(place)
            seen.append((lockstep.current, place))

    lockstep.run([partial(task, 1), partial(task, 2)])
    assert seen == [
        *[("fetch", "a"), (0, "a"), (1, "a"), ("fetch", "b"), (0, "b"), (1, "b")],
        *[("fetch", "a"), (1, "a"), ("fetch", "b"), (1, "b"), ("fetch", None)],
    ]
    assert not lockstep.running


def test_an_error_of_one_task_ends_all_and_lets_go_of_the_last_place() -> None:
    seen: list[object] = []
    lockstep = Lockstep(seen.append)

    def task(fails: bool) -> None:
        lockstep.gate("a")
        if fails:
            raise ValueError("no")
        lockstep.gate("b")
        seen.append("never")

    with pytest.raises(ValueError, match="no"):
        lockstep.run([partial(task, False), partial(task, True)])
    assert seen == ["a", None]


def test_tasks_at_different_places_are_refused() -> None:
    lockstep = Lockstep(lambda place: None)
    with pytest.raises(RuntimeError, match="different places"):
        lockstep.run([partial(lockstep.gate, "a"), partial(lockstep.gate, "b")])
    with pytest.raises(RuntimeError, match="no task"):
        lockstep.gate("a")
