"""A receipt seals itself: no byte of it can change unseen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery.checkpoint.receipt import (
    EDIT_PREDICATE,
    MalformedReceipt,
    open_receipt,
    seal,
    statement,
    subjects,
)

RECEIPT = statement(
    {"b": "1" * 64, "a": "0" * 64}, EDIT_PREDICATE, {"name": "mod\u00e8le \U0001f642"}
)


def opened(path: Path, data: bytes) -> dict[str, Any]:
    path.write_bytes(data)
    return open_receipt(path, EDIT_PREDICATE)


def test_a_sealed_receipt_opens_as_it_was(tmp_path: Path) -> None:
    found = opened(tmp_path / "r", seal(RECEIPT))
    assert {key: found[key] for key in RECEIPT} == RECEIPT
    assert subjects(found, tmp_path) == {"a": "0" * 64, "b": "1" * 64}


def test_its_text_is_canonical() -> None:
    text = seal(RECEIPT)
    again = json.dumps(
        json.loads(text), sort_keys=True, separators=(",", ":"), ensure_ascii=False
    ).encode()
    assert text == again == seal(json.loads(text))


@given(position=st.integers(0, len(seal(RECEIPT)) - 1), flip=st.integers(1, 255))
def test_every_changed_byte_is_found(
    position: int, flip: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    data = bytearray(seal(RECEIPT))
    data[position] ^= flip
    with pytest.raises(MalformedReceipt):
        opened(tmp_path_factory.mktemp("flip") / "r", bytes(data))


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{}", b"[]", b"null", b"\xff", b"{" * 99_999,
        b'{"a":' * 90_000 + b"1" + b"}" * 90_000,
        b'{"self_sha256":NaN}', b'{"self_sha256":"\\ud800"}', b'{"a":1e999,"self_sha256":""}',
        b'{"a":1,"a":1}', seal(RECEIPT) + b"\n", b" " + seal(RECEIPT),
        seal({**RECEIPT, "_type": "other"}), seal({**RECEIPT, "predicateType": "other"}),
        seal({}), seal({**RECEIPT, "predicateType": ["x"]}),
    ],
)  # fmt: skip
def test_what_was_never_sealed_is_malformed(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(MalformedReceipt):
        opened(tmp_path / "r", data)


@pytest.mark.parametrize(
    "subject",
    [
        None, {}, "x", 7, [{}], [{"name": "a"}], [{"name": "a", "digest": None}],
        [{"name": "a", "digest": {"sha256": 7}}], [{"name": 7, "digest": {"sha256": "0"}}],
        [{"name": ["a"], "digest": {"sha256": "0"}}],
        [{"name": "a", "digest": {"sha256": "0"}}, {"name": "a", "digest": {"sha256": "1"}}],
    ],
)  # fmt: skip
def test_a_malformed_subject_list_is_malformed_however_well_sealed(
    subject: Any, tmp_path: Path
) -> None:
    found = opened(tmp_path / "r", seal({**RECEIPT, "subject": subject}))
    with pytest.raises(MalformedReceipt):
        subjects(found, tmp_path)
