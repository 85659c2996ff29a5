"""A sweep measures a recipe at every setting and proposes the knee of effect and cost."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from surgery import api
from surgery.errors import FindError
from surgery.find.result import Change
from surgery.find.sweep import Point, Setting, Sweep, setting_text
from surgery.find.sweep_page import knee_words, sweep_html, sweep_table
from surgery.recipe import parse_recipe

MODEL = Path(__file__).resolve().parents[2] / "fixtures" / "capitals-gpt2"


def point(strength: float, effect: float, cost: float) -> Point:
    nan = math.nan
    goal = Change("g", "target", "share", 20, 0.1, 0.1 + effect, effect, nan, nan)
    kl = Change("kl", "preserve", "nats per token", 20, 0.0, cost, cost, nan, nan)
    return Point(Setting(strength), goal, (kl,))


def sweep(*points: tuple[float, float], sign: int = 1) -> Sweep:
    made = [point(n + 1, sign * effect, cost) for n, (effect, cost) in enumerate(points)]
    return Sweep(sign, tuple(made))


def better(a: tuple[float, float], b: tuple[float, float]) -> bool:
    """Whether a betters b in one and is no worse in the other."""
    return a != b and a[0] >= b[0] and a[1] <= b[1]


@pytest.mark.parametrize("sign", [1, -1])
def test_the_front_is_what_none_betters(sign: int) -> None:
    pairs = [(0.1, 0.1), (0.5, 0.2), (0.4, 0.3), (0.6, 1.0), (0.6, 2.0), (-0.2, 0.0)]
    found = sweep(*pairs, sign=sign)
    alive = [i for i, own in enumerate(pairs) if not any(better(other, own) for other in pairs)]
    assert set(found.front) == {i for i in alive if pairs[i][0] > 0} == {0, 1, 3}
    assert found.front == (0, 1, 3)


def test_the_knee_is_furthest_above_the_line_to_the_strongest() -> None:
    # Shares of effect less shares of cost: 1/6 - 0.1, 5/6 - 0.2, 0.
    assert sweep((0.1, 0.1), (0.5, 0.2), (0.6, 1.0)).knee == 1


def test_where_nothing_moves_as_wanted_there_is_no_knee() -> None:
    found = sweep((0.0, 0.1), (-0.5, 0.2))
    assert found.knee is None and found.front == ()
    assert "No setting" in knee_words(found)


def test_points_without_finite_logits_are_on_no_front_and_in_no_picture() -> None:
    found = sweep((0.2, 0.1), (math.nan, math.nan), (0.3, 0.2))
    assert found.front == (0, 2)
    assert sweep_html(found, "t").count("<circle") == 2
    assert len(sweep_table(found).rows) == 3


RECIPE = """
schema: 1
edits:
  - {op: heads, heads: [L0H1, L0H2, L1H0], factor: 0.0}
  - {op: neurons, neurons: [L0N1, L0N2], factor: 0.5}
"""


def at(setting: Setting, text: str = RECIPE) -> list[dict[str, object]]:
    recipe = parse_recipe(text, "r.yaml", Path())
    changed = parse_recipe(setting_text(recipe, setting), "r.yaml", Path())
    return [edit.model_dump(exclude_unset=True) for edit in changed.edits]


def test_strength_goes_from_nothing_to_the_recipe_and_beyond() -> None:
    factors = [[edit["factor"] for edit in at(Setting(s))] for s in (0.0, 0.5, 1.0, 1.5)]
    assert factors == [[1.0, 1.0], [0.5, 0.75], [0.0, 0.5], [-0.5, 0.25]]


def test_top_takes_the_first_of_each_edit() -> None:
    heads, neurons = at(Setting(top=2))
    assert heads["heads"] == ["L0H1", "L0H2"] and neurons["neurons"] == ["L0N1", "L0N2"]
    assert heads["factor"] == 0.0


def test_a_strength_of_a_direction_is_scaled_and_its_file_stays() -> None:
    text = """
schema: 1
edits:
  - {op: direction, vector: {file: d.safetensors, key: r}, strength: 0.8}
"""
    (edit,) = at(Setting(0.5), text)
    assert edit["strength"] == 0.4 and edit["vector"] == {"file": "d.safetensors", "key": "r"}


def test_what_has_no_amount_or_no_list_is_refused() -> None:
    tensor = "{schema: 1, edits: [{op: tensor, file: t.safetensors}]}"
    with pytest.raises(FindError, match=r"edits\[0\] \(tensor\): has no factor"):
        at(Setting(0.5), tensor)
    with pytest.raises(FindError, match="lists no addresses"):
        at(Setting(top=1), tensor)


def test_a_fixture_is_swept_and_its_strength_1_is_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SURGERY_CACHE", str(tmp_path / "cache"))
    lines = (MODEL / "stimuli" / "target.jsonl").read_text(encoding="utf-8").splitlines()[::9]
    (tmp_path / "s.jsonl").write_text("\n".join(lines))
    found = api.sweep_strength(
        MODEL / "remember.yaml", MODEL, stimuli=[tmp_path / "s.jsonl"], strengths=[0.0, 1.0]
    )
    nothing, whole = found.points
    assert nothing.effect.change == 0.0 and nothing.costs[0].change == 0.0
    assert whole.effect.change > 0.3 and found.knee == 1
    assert json.loads(json.dumps(found.to_json()))["knee"] == 1
