"""What a run may measure and still pass: policy, schema 1.

A file gives only what it wants to change; every section and field it leaves out is the built-in
one. Limits are inclusive. `docs/policy.md` says where the numbers come from.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, model_validator

from surgery.documents import SchemaOne, load_file, validate
from surgery.errors import PolicyError

CONVERSION_MAX_NOISE_RATIO = 8.0
"""ONNX Runtime's error over PyTorch's own float32 error, both against float64 (no unit)."""

CONVERSION_MIN_OVERLAP = 0.8
"""Bhattacharyya coefficient of the distributions of error and noise (no unit, 0 to 1)."""

CONVERSION_MAX_SIGMA_RATIO = 1.5
"""The error's sigma over the noise's, up to which the shape does not matter (no unit)."""

INTERACTION_MAX_RATIO = 0.05
"""||I|| / ||E||: the share of the edit's effect that may differ between the runtimes."""

INTERACTION_MAX_NOISE_RATIO = 8.0
"""||I|| over the norm that rounding alone explains, for effects too small to be a yardstick."""

PRESERVE_MAX_KL: float | None = None
"""Nats per token; no limit unless asked for, since what may drift depends on the edit."""

PRESERVE_MAX_FLIP_RATE: float | None = None
"""Share of positions whose top-1 token changes; no limit unless asked for."""

PresetName = Literal[
    "torch.onnx",
    "optimum",
    "polygraphy",
    "onnx-backend-test",
    "issta-text",
    "issta-notebook",
    "issta-synthetic",
]
"""The names of `surgery.presets.PRESETS`."""

Number = Annotated[float, Field(allow_inf_nan=False)]
Limit = Annotated[float, Field(allow_inf_nan=False, ge=0)]
Share = Annotated[float, Field(allow_inf_nan=False, ge=0, le=1)]
Confidence = Annotated[float, Field(allow_inf_nan=False, ge=0.5, le=0.99)]
"""No more than 0.99: the tails of 10,000 resamples say nothing beyond."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", populate_by_name=True)


class ConversionPolicy(_Section):
    """Judges C_o and C_e."""

    max_noise_ratio: Limit = Field(
        default=CONVERSION_MAX_NOISE_RATIO,
        description="Largest allowed error of ONNX Runtime over float32 noise, worst or L2.",
    )
    min_overlap: Share = Field(
        default=CONVERSION_MIN_OVERLAP,
        description="Least overlap of the error's distribution with the noise's (Bhattacharyya).",
    )
    max_sigma_ratio: Limit = Field(
        default=CONVERSION_MAX_SIGMA_RATIO,
        description="Largest sigma of the error over the noise's at which any overlap is allowed.",
    )
    preset: PresetName | None = Field(
        default=None, description="A fixed tolerance that every element must pass as well."
    )


class InteractionPolicy(_Section):
    """Judges I: whether the edit means the same in both runtimes."""

    max_ratio: Limit = Field(
        default=INTERACTION_MAX_RATIO, description="Largest allowed ||I|| / ||E||."
    )
    max_noise_ratio: Limit = Field(
        default=INTERACTION_MAX_NOISE_RATIO,
        description="Largest allowed ||I|| over its numeric noise.",
    )


class PreservePolicy(_Section):
    """Judges the drift of the preserve set, in each runtime."""

    max_kl: Limit | None = Field(
        default=PRESERVE_MAX_KL, description="Mean KL(original || edited), nats per token."
    )
    max_flip_rate: Share | None = Field(
        default=PRESERVE_MAX_FLIP_RATE, description="Share of positions whose top-1 token changes."
    )
    max_real_flip_rate: Share | None = Field(
        default=None, description="The same, without near-ties that rounding may have turned."
    )
    max_log_ratio: Limit | None = Field(
        default=None,
        description="|ln(PPL edited / PPL original)| of the texts: neither worse nor better.",
    )
    confidence: Confidence | None = Field(
        default=None,
        description="Every limit must also hold for the whole interval and for A/A.",
    )

    @model_validator(mode="after")
    def _is_about_something(self) -> Self:
        limits = self.model_dump(exclude={"confidence"}).values()
        if self.confidence is not None and not any(limit is not None for limit in limits):
            raise ValueError("confidence is of limits, and there is none; expected one")
        return self


class TargetRule(_Section):
    """The change (edited minus original) one metric must show, in each runtime."""

    metric: Annotated[str, Field(min_length=1, max_length=200)]
    set: Literal["target", "preserve"] = "target"
    min_change: Number | None = Field(default=None, description="change >= this; may be negative.")
    max_change: Number | None = Field(default=None, description="change <= this; may be negative.")
    confidence: Confidence | None = Field(
        default=None, description="The rule must hold for the whole interval, widened by A/A."
    )

    @model_validator(mode="after")
    def _asks_for_something(self) -> Self:
        low, high = self.min_change, self.max_change
        if low is None and high is None:
            raise ValueError("expected min_change, max_change or both")
        if low is not None and high is not None and low > high:
            raise ValueError(f"min_change {low:g} is above max_change {high:g}")
        return self


class Policy(_Section):
    """Everything `surgery.gate.judge` asks for besides the evidence."""

    schema_: SchemaOne = Field(alias="schema")
    conversion: ConversionPolicy = ConversionPolicy()
    interaction: InteractionPolicy = InteractionPolicy()
    preserve: PreservePolicy = PreservePolicy()
    target: tuple[TargetRule, ...] = ()

    _word_lists: dict[str, Any] = PrivateAttr(default_factory=dict)

    @property
    def word_lists(self) -> dict[str, Any]:
        """The `WordList`s that rules name, by name, as they were when the policy was loaded."""
        return self._word_lists

    @property
    def confidences(self) -> set[float]:
        """Those that a limit or a rule asks for."""
        asked = (self.preserve.confidence, *(rule.confidence for rule in self.target))
        return {confidence for confidence in asked if confidence is not None}


BUILT_IN = Policy(schema=1)
"""Applies where no policy is given."""


def load_policy(path: str | PathLike[str]) -> Policy:
    """The policy of a YAML or JSON file; `PolicyError` names every problem at once.

    Word lists that rules name (`word_rate:FILE.txt`) are read too; they lie in the policy's folder.
    """
    policy = validate(Policy, load_file(path, PolicyError), PolicyError)
    if named := [rule.metric for rule in policy.target if ".txt" in rule.metric]:
        from surgery.metrics import word_lists_of

        policy._word_lists = word_lists_of(named, Path(path).parent)
    return policy


def policy_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of a policy file."""
    schema = Policy.model_json_schema(by_alias=True)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
