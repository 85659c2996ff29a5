"""Report, schema 1: what one run found, under which policy, with which verdict.

It holds all of the evidence, so the verdict can be reached again, under another policy, from the
report alone. JSON has no NaN and no infinity; here they are the strings `"NaN"`, `"Infinity"` and
`"-Infinity"`, where a number is expected and nowhere else.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, asdict, fields, is_dataclass, replace
from os import PathLike
from typing import Annotated, Any, Literal, Self, get_type_hints

import pydantic
from pydantic import BaseModel, BeforeValidator, ConfigDict, GetCoreSchemaHandler, JsonValue
from pydantic_core import core_schema

from surgery.documents import SchemaOne, load_data, read_text, validate
from surgery.errors import ReportError
from surgery.evidence import (
    Conversion,
    Corner,
    Divergence,
    Drift,
    Effect,
    ErrorShape,
    Evidence,
    Finding,
    Interaction,
    Interval,
    LayerError,
    Parting,
    Repeat,
    SiteInteraction,
    StimulusInteraction,
    Tolerance,
)
from surgery.gate import Verdict, judge
from surgery.policy import Policy
from surgery.syntax import escape
from surgery.taxonomy import Issue, issues

MAX_BYTES = 64 << 20

MAX_STRING = 10_000
"""Names come from untrusted files; a megabyte of one helps nobody."""

_SPELLED = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _read_number(value: Any) -> Any:
    return _SPELLED.get(value, value) if isinstance(value, str) else value


Number = Annotated[
    float,
    BeforeValidator(
        _read_number, json_schema_input_type=float | Literal["NaN", "Infinity", "-Infinity"]
    ),
]

_IN_REPORT: dict[Any, Any] = {
    float: Number,
    float | None: Number | None,
    dict[str, float]: dict[str, Number],
}


class _Row:
    """Reads and writes one dataclass of `surgery.evidence` as it stands.

    The fields are taken from the dataclass, so evidence and report cannot drift apart.
    """

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        row = _mirror(source)
        read = core_schema.no_info_after_validator_function(
            lambda parsed: source(**{f.name: getattr(parsed, f.name) for f in fields(source)}),
            handler.generate_schema(row),
        )
        write = core_schema.plain_serializer_function_ser_schema(plain)
        return core_schema.json_or_python_schema(
            read, core_schema.is_instance_schema(source), serialization=write
        )


def _mirror(source: type[Any]) -> type[BaseModel]:
    """The dataclass as a strict pydantic model, its floats able to be spelled."""
    hints = get_type_hints(source)
    members: dict[str, Any] = {
        f.name: (_IN_REPORT.get(hints[f.name], hints[f.name]), _default(f)) for f in fields(source)
    }
    config = ConfigDict(strict=True, extra="forbid")
    return pydantic.create_model(source.__name__, __config__=config, **members)


def _default(member: Field[Any]) -> Any:
    return ... if member.default is MISSING else member.default


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: numbers spelled, characters escaped, tuples as lists."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {plain(str(key)): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, str):
        # Escaped first: a text made of names that were cut is then cut where its names were.
        spelled = escape(value)
        return spelled if len(spelled) <= MAX_STRING else spelled[: MAX_STRING - 1] + "…"
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


CornerName = Literal["T_o", "T_e", "R_o", "R_e"]


class Report(BaseModel):
    """One run. Every field but `schema` and `policy` holds types of `surgery.evidence`."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", populate_by_name=True)

    schema_: SchemaOne = pydantic.Field(alias="schema")
    verdict: Literal["pass", "fail", "not_evaluated"]
    corners: dict[CornerName, Annotated[Corner, _Row()]]
    conversion: tuple[Annotated[Conversion, _Row()], ...]
    interaction: tuple[Annotated[Interaction, _Row()], ...]
    effects: tuple[Annotated[Effect, _Row()], ...]
    drift: tuple[Annotated[Drift, _Row()], ...]
    divergence: tuple[Annotated[Divergence, _Row()], ...] = ()
    partings: tuple[Annotated[Parting, _Row()], ...] = ()
    intervals: tuple[Annotated[Interval, _Row()], ...] = ()
    stimuli: tuple[Annotated[StimulusInteraction, _Row()], ...] = ()
    sites: tuple[Annotated[SiteInteraction, _Row()], ...] = ()
    faults: tuple[Annotated[Finding, _Row()], ...]
    findings: tuple[Annotated[Finding, _Row()], ...]
    issues: tuple[Annotated[Issue, _Row()], ...] = ()
    compared: int
    covered_rows: int
    layers: tuple[Annotated[LayerError, _Row()], ...] = ()
    shapes: tuple[Annotated[ErrorShape, _Row()], ...] = ()
    tolerances: tuple[Annotated[Tolerance, _Row()], ...] = ()
    repeats: tuple[Annotated[Repeat, _Row()], ...] = ()
    policy: Policy
    environment: dict[str, str]
    inputs: dict[str, dict[str, JsonValue]]

    @classmethod
    def build(
        cls,
        evidence: Evidence,
        verdict: Verdict,
        policy: Policy,
        environment: Mapping[str, str],
        inputs: Mapping[str, Mapping[str, Any]],
    ) -> Self:
        """The report of one run.

        `environment` names versions, CPU and threads; `inputs` says what was read, each name
        with its digest and whatever else identifies it.
        """
        parts = {
            "schema": 1,
            "verdict": verdict.verdict,
            "findings": verdict.findings,
            "issues": _issues(verdict.findings),
            "policy": policy.model_dump(by_alias=True),
            "environment": environment,
            "inputs": inputs,
            **{f.name: getattr(evidence, f.name) for f in fields(Evidence)},
        }
        return cls.model_validate_json(json.dumps(plain(parts)))

    def evidence(self) -> Evidence:
        """What `build` was given, but for names no document may hold, which come back escaped."""
        return Evidence(**{f.name: getattr(self, f.name) for f in fields(Evidence)})

    def dump(self) -> str:
        """Canonical JSON text: ASCII, two spaces, fields in schema order, a final newline."""
        data = self.model_dump(mode="json", by_alias=True)
        return json.dumps(data, indent=2, allow_nan=False) + "\n"


def load_report(path: str | PathLike[str]) -> Report:
    """The report in a file of at most 64 MiB.

    `ReportError` if it is not one, or if it does not say what its own evidence says under its own
    policy: a verdict that was written in by hand is never shown.
    """
    text, name = read_text(path, ReportError, MAX_BYTES), os.fspath(path)
    report = validate(Report, load_data(text, name, ReportError, MAX_BYTES), ReportError)
    _check_verdict(report, name)
    return report


def _issues(findings: Iterable[Finding]) -> tuple[Issue, ...]:
    """Of names as the file spells them, so that they are the same when it is read back."""
    return issues(replace(f, site=plain(f.site), operator=plain(f.operator)) for f in findings)


def _check_verdict(report: Report, name: str) -> None:
    said = judge(report.evidence(), report.policy)
    if report.verdict != said.verdict:
        raise ReportError(
            f"{name}: its verdict is not what its evidence says: expected {said.verdict}, found "
            f"{report.verdict}; run diff or validate again"
        )
    if plain(report.findings) != plain(said.findings):
        raise ReportError(
            f"{name}: its findings are not what its evidence says; run diff or validate again"
        )
    if plain(report.issues) != plain(_issues(said.findings)):
        raise ReportError(
            f"{name}: its issues are not what its findings say; run diff or validate again"
        )


def report_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of a report file."""
    schema = Report.model_json_schema(by_alias=True)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
