"""A power cut leaves no output or a whole one, and none is lost once success was told."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from faults.campaign import Scenario, make_inputs, scenarios
from faults.power import Event, events, losses, record

pytestmark = pytest.mark.skipif(shutil.which("strace") is None, reason="strace records the calls")

OTHERS = ("apply --delta", "apply --link", "apply, tensors added", "apply DELTA", "revert")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scenario]:
    inputs = make_inputs(tmp_path_factory.mktemp("inputs"))
    return {scenario.name: scenario for scenario in scenarios(inputs)}


@pytest.fixture(scope="module")
def plain(
    found: dict[str, Scenario], tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[Event], list[Path]]:
    """What happens in a plain apply, and what it makes."""
    return traced(found["apply"], tmp_path_factory.mktemp("plain"))


def traced(scenario: Scenario, folder: Path) -> tuple[list[Event], list[Path]]:
    log, here = folder / "trace", folder / "here"
    here.mkdir()
    assert record(scenario.arguments(here), log) == 0
    return list(events(log.read_text())), [here / product for product in scenario.products]


def test_all_is_synced_before_it_has_its_name_and_the_name_before_the_end(
    plain: tuple[list[Event], list[Path]],
) -> None:
    assert losses(*plain) == []


@pytest.mark.parametrize("name", OTHERS)
def test_so_it_is_whatever_is_written(
    name: str, found: dict[str, Scenario], tmp_path: Path
) -> None:
    assert losses(*traced(found[name], tmp_path)) == []


def more(doctored: list[Event], plain: tuple[list[Event], list[Path]]) -> set[str]:
    """What is lost by a doctored run and not by the real one."""
    return {*losses(doctored, plain[1])} - {*losses(*plain)}


def test_every_sync_that_is_left_out_is_missed(plain: tuple[list[Event], list[Path]]) -> None:
    """The check is worth something: without the syncs of any one file or folder it fails."""
    happened, _ = plain
    synced = {event.paths for event in happened if event.name == "fsync"}
    assert len(synced) > 8
    for paths in synced:
        doctored = [e for e in happened if e.name != "fsync" or e.paths != paths]
        assert more(doctored, plain), paths


def test_a_late_write_a_late_name_and_an_early_rename_are_missed(
    plain: tuple[list[Event], list[Path]],
) -> None:
    happened, [output] = plain
    at = next(n for n, event in enumerate(happened) if event.name == "rename")
    end = happened[-1].ended + 1
    shard, new = str(output / "model-00001-of-00003.safetensors"), str(output / "x")
    early = replace(happened[at], began=happened[at - 6].began, ended=happened[at - 6].began)
    assert Path(shard).exists()
    assert more([*happened, Event("pwrite64", (shard,), "", end, end)], plain)
    assert more([*happened, Event("openat", (new,), "O_CREAT", end, end)], plain)
    assert more([*happened[: at - 6], early, *happened[at - 6 : at], *happened[at + 1 :]], plain)
    assert more(happened[:at], plain) >= {f"{output} was never made"}


def test_a_sync_counts_from_its_beginning() -> None:
    """What is written while an fsync is under way is not sure."""
    made = '1 openat(AT_FDCWD</>, "/d/x", O_CREAT, 0666) = 3</d/x>\n'
    write = '2 pwrite64(3</d/x>, ""..., 1, 0) = 1\n'
    begin, end = "1 fsync(3</d/x> <unfinished ...>\n", "1 <... fsync resumed>) = 0\n"
    named = '1 rename("/d/x", "/d/y") = 0\n1 fsync(4</d>) = 0\n'
    product = [Path("/d/y")]
    assert losses(events(made + write + begin + end + named), product) == []
    assert losses(events(made + begin + write + end + named), product) != []
    assert losses(events(made + begin + end.replace("= 0", "= -1 EIO") + named), product) != []
