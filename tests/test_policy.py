"""Policy, schema 1."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from surgery.errors import PolicyError
from surgery.policy import (
    BUILT_IN,
    CONVERSION_MAX_NOISE_RATIO,
    INTERACTION_MAX_NOISE_RATIO,
    Policy,
    PresetName,
    load_policy,
    policy_schema,
)
from surgery.presets import PRESETS


def load(tmp_path: Path, text: str) -> Policy:
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    return load_policy(path)


def test_an_omitted_section_is_the_built_in_one(tmp_path: Path) -> None:
    assert load(tmp_path, "schema: 1\n") == BUILT_IN


def test_an_omitted_field_is_the_built_in_one(tmp_path: Path) -> None:
    policy = load(tmp_path, "schema: 1\ninteraction: {max_ratio: 1}\n")
    assert policy.interaction.max_ratio == 1.0
    assert policy.interaction.max_noise_ratio == INTERACTION_MAX_NOISE_RATIO
    assert policy.conversion.max_noise_ratio == CONVERSION_MAX_NOISE_RATIO


def test_a_full_policy_loads(tmp_path: Path) -> None:
    policy = load(
        tmp_path,
        """\
schema: 1
conversion: {max_noise_ratio: 10}
interaction: {max_ratio: 1e-1, max_noise_ratio: 10}
preserve: {max_kl: 0.02, max_flip_rate: 0}
target:
  - {metric: memory_rate, min_change: 0.3}
  - {metric: accuracy, set: preserve, min_change: -0.01, max_change: 0.01}
""",
    )
    assert policy.preserve.max_flip_rate == 0
    assert [rule.set for rule in policy.target] == ["target", "preserve"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("schema: 1\nconversion: {preset: optmium}", "conversion.preset"),
        ("{}", "missing field @ schema"),
        ("schema: 2", "expected 1, found 2 @ schema"),
        ("schema: true", "expected 1, found true @ schema"),
        ("schema: 1\nconversion:", "found nothing @ conversion (line 2)"),
        ("schema: 1\nconversion: {max_noise: 1}", "did you mean 'max_noise_ratio'?"),
        ("schema: 1\nconversion: {max_noise_ratio: .nan}", "finite number, found NaN"),
        ("schema: 1\nconversion: {max_noise_ratio: .inf}", "finite number, found Infinity"),
        ("schema: 1\nconversion: {max_noise_ratio: -1}", "greater than or equal to 0"),
        ("schema: 1\nconversion: {max_noise_ratio: no}", "valid number, found 'no'"),
        ("schema: 1\npreserve: {max_flip_rate: 1.5}", "less than or equal to 1"),
        ("schema: 1\ntarget: [{metric: a}]", "expected min_change, max_change or both"),
        ("schema: 1\ntarget: [{metric: a, min_change: 2, max_change: 1}]", "is above max_change"),
        ("schema: 1\ntarget: [{metric: a, min_change: 1, set: probe}]", "'target' or 'preserve'"),
    ],
)
def test_bad_policies_are_refused_in_one_line(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(PolicyError) as caught:
        load(tmp_path, text)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_the_schema_names_every_field() -> None:
    schema = policy_schema()
    assert set(schema["properties"]) == {
        "schema",
        "conversion",
        "interaction",
        "preserve",
        "target",
    }
    assert schema["required"] == ["schema"] and schema["additionalProperties"] is False


def test_every_preset_has_a_name_in_the_policy() -> None:
    assert get_args(PresetName) == tuple(PRESETS)
