"""The receipt beside an edited checkpoint or an export: an in-toto Statement that seals itself.

Form: in-toto Attestation Framework, Statement v1 (`_type`, `subject`, `predicateType`,
`predicate`), as canonical JSON (sorted keys, no spaces, UTF-8). `self_sha256` is the digest of
that text with the field itself empty, so that a changed byte of the receipt is found as well.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from surgery.checkpoint.files import parse_json_object, read_small
from surgery.errors import CheckpointError

STATEMENT = "https://in-toto.io/Statement/v1"
EDIT_PREDICATE = "https://surgery.dev/edit/v1"
EXPORT_PREDICATE = "https://surgery.dev/export/v1"


class MalformedReceipt(CheckpointError):
    """The receipt cannot be believed; `surgery verify` reports it as a failure."""


def statement(
    subjects: Mapping[str, str], predicate_type: str, predicate: dict[str, Any]
) -> dict[str, Any]:
    """A Statement about `subjects`, a mapping of relative path to hex SHA-256."""
    return {
        "_type": STATEMENT,
        "subject": [{"name": n, "digest": {"sha256": d}} for n, d in sorted(subjects.items())],
        "predicateType": predicate_type,
        "predicate": predicate,
    }


def canonical(value: Any) -> bytes:
    """`value` as canonical JSON text."""
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return text.encode()


def seal(receipt: dict[str, Any]) -> bytes:
    """`receipt` as canonical JSON with `self_sha256` filled in."""
    return canonical({**receipt, "self_sha256": _self_digest(receipt)})


def open_receipt(path: Path, predicate_type: str) -> dict[str, Any]:
    """The sealed receipt at `path`; raises `MalformedReceipt` unless every byte is as sealed."""
    try:
        raw = read_small(path)
        receipt = parse_json_object(raw, str(path))
        sealed = receipt.get("self_sha256") == _self_digest(receipt) and canonical(receipt) == raw
    except CheckpointError as error:
        raise MalformedReceipt(str(error)) from None
    except (ValueError, RecursionError):
        # NaN, a lone surrogate or bottomless nesting: readable, but never written by `seal`.
        raise MalformedReceipt(f"{path}: holds what no canonical JSON holds") from None
    if not sealed:
        raise MalformedReceipt(f"{path}: is not as it was sealed: self_sha256 does not match")
    if receipt.get("_type") != STATEMENT or receipt.get("predicateType") != predicate_type:
        raise MalformedReceipt(f"{path}: is not a {predicate_type} statement")
    return receipt


def subjects(receipt: dict[str, Any], source: Path) -> dict[str, str]:
    """Relative path to hex SHA-256 of every file the receipt names."""
    listed = receipt.get("subject")
    try:
        pairs = [(item["name"], item["digest"]["sha256"]) for item in listed or ()]
    except (KeyError, TypeError):
        pairs = [(None, None)]
    texts = all(isinstance(text, str) for pair in pairs for text in pair)
    if not isinstance(listed, list) or not texts or len(dict(pairs)) != len(pairs):
        raise MalformedReceipt(f"{source}: its subject list is malformed")
    return dict(pairs)


def _self_digest(receipt: dict[str, Any]) -> str:
    return hashlib.sha256(canonical({**receipt, "self_sha256": ""})).hexdigest()
