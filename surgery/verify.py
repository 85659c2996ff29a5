"""Re-checking an edited checkpoint: every digest, and with its base every byte.

The law: what is not named by a receipt may not be there, what is named must be there unchanged,
and with the base at hand every edited region must be what the recipe makes of it (within one
unit in the last place of the stored dtype) and every other byte the base's own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from surgery.addresses import Region
from surgery.apply import replacements
from surgery.checkpoint import CONFIG, EXPORT_RECEIPT, RECEIPT, Checkpoint
from surgery.checkpoint.dtypes import bits
from surgery.checkpoint.files import CHUNK, list_files, resolve_inside, sha256_file
from surgery.checkpoint.parallel import Advance, Progress, in_parallel
from surgery.checkpoint.receipt import (
    EDIT_PREDICATE,
    EXPORT_PREDICATE,
    MalformedReceipt,
    open_receipt,
    subjects,
)
from surgery.editor import Editor, bands
from surgery.errors import CheckpointError, InputError, ReceiptError, RecipeError, quote
from surgery.evidence import Finding
from surgery.plan import Plan, make_plan
from surgery.recipe import Recipe, load_recipe, parse_recipe


@dataclass(frozen=True)
class Verification:
    """What was checked (`files`, `tensors`) and everything found wrong; `ok` if nothing was."""

    files: int
    tensors: int
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        return not self.findings


def verify(
    edited: Path,
    base: Path | None = None,
    recipe: Path | None = None,
    *,
    allow_code: bool = False,
    progress: Progress | None = None,
) -> Verification:
    """Re-checks folder `edited` against its receipt and, where given, against its base.

    `recipe` is needed where the recipe reads files; else the receipt's own text serves. Raises
    `ReceiptError` if there is no receipt and `InputError` for an unusable base or recipe;
    whatever is wrong with `edited` itself is a finding.
    """
    if not edited.is_dir() or not (edited / RECEIPT).exists():
        raise ReceiptError(f"{edited}: has no {RECEIPT}; nothing says what it should hold")
    if recipe is not None and base is None:
        raise ReceiptError("--recipe goes with --base: it says what was made of the base")
    try:
        receipt = _read_receipt(edited)
        expected = receipt.subjects | dict(_exported(edited))
    except MalformedReceipt as error:
        return Verification(0, 0, (Finding("verify", "malformed receipt", RECEIPT, str(error)),))
    findings = list(_check_files(edited, expected, progress))
    tensors = 0
    if base is not None:
        sound = set(expected) - {finding.site for finding in findings}
        original = Checkpoint.open(base, allow_code=allow_code)
        tensors, wrong = _check_against_base(edited, original, recipe, receipt, sound, progress)
        findings += wrong
    return Verification(len(expected), tensors, tuple(findings))


class _BaseRecord(BaseModel):
    name: str
    files: dict[str, str]


class _RecipeRecord(BaseModel):
    text: str
    sha256: str


class _Receipt(BaseModel):
    """What checking needs of a receipt; `subjects` maps each file to its SHA-256."""

    model_config = ConfigDict(strict=True, frozen=True)

    subjects: dict[str, str]
    base: _BaseRecord
    recipe: _RecipeRecord
    inputs: dict[str, str]


def _read_receipt(edited: Path) -> _Receipt:
    receipt = open_receipt(edited / RECEIPT, EDIT_PREDICATE)
    named, predicate = subjects(receipt, edited / RECEIPT), receipt.get("predicate")
    if not isinstance(predicate, dict):
        raise MalformedReceipt(f"{edited / RECEIPT}: its predicate is not an object")
    try:
        return _Receipt.model_validate({**predicate, "subjects": named})
    except ValidationError as error:
        places = ", ".join(".".join(map(str, problem["loc"])) for problem in error.errors())
        raise MalformedReceipt(
            f"{edited / RECEIPT}: its predicate has malformed {places}"
        ) from None


def _exported(edited: Path) -> dict[str, str]:
    """The files of a linked export, and the receipt that names them."""
    path = edited / EXPORT_RECEIPT
    return subjects(open_receipt(path, EXPORT_PREDICATE), path) if path.exists() else {}


def _check_files(
    edited: Path, expected: dict[str, str], progress: Progress | None
) -> Iterator[Finding]:
    try:
        found = set(list_files(edited, hidden=True)) - _receipts(edited)
    except CheckpointError as error:
        yield Finding("verify", "unreadable folder", str(edited), str(error))
        return
    for name in sorted(found - set(expected)):
        yield Finding("verify", "extra file", name, f"{quote(name)}: is named by no receipt")
    hashed = _digests(edited, sorted(found & set(expected)), progress)
    for name, digest in sorted(expected.items()):
        actual = hashed.get(name)
        if actual is None:
            yield Finding("verify", "missing file", name, f"{quote(name)}: is missing")
        elif isinstance(actual, CheckpointError):
            yield Finding("verify", "unreadable file", name, str(actual))
        elif actual != digest:
            message = f"{quote(name)}: SHA-256 is {actual}, the receipt says {quote(digest)}"
            yield Finding("verify", "changed file", name, message)


def _digests(
    folder: Path, names: Sequence[str], progress: Progress | None
) -> dict[str, str | CheckpointError]:
    """SHA-256 of files of a folder, or why one cannot be read; the largest are begun first."""

    def digest(name: str, advance: Advance) -> str | CheckpointError:
        try:
            return sha256_file(resolve_inside(folder, name), advance)
        except CheckpointError as error:
            return error

    sizes = {name: (folder / name).lstat().st_size for name in names}
    jobs = {
        name: partial(digest, name) for name in sorted(names, key=sizes.__getitem__, reverse=True)
    }
    return in_parallel(jobs, sum(sizes.values()), progress)


def _receipts(edited: Path) -> set[str]:
    """The receipts that were opened: those no receipt has to name."""
    return {RECEIPT} | ({EXPORT_RECEIPT} if (edited / EXPORT_RECEIPT).exists() else set())


def _check_against_base(
    edited: Path,
    original: Checkpoint,
    recipe: Path | None,
    receipt: _Receipt,
    sound: set[str],
    progress: Progress | None,
) -> tuple[int, list[Finding]]:
    """How many tensors were compared, and what is wrong; `sound` files are as the receipt says."""
    findings = list(_check_base_files(original, receipt.base.files, progress))
    if findings:
        return 0, findings
    plan = make_plan(_recipe(recipe, receipt, edited), original)
    if plan.inputs != receipt.inputs:
        message = "the files the recipe reads are not those it read when it was applied"
        return 0, [Finding("verify", "changed input", plan.recipe.source, message)]
    try:
        result = Checkpoint.open(edited, allow_code=True)
    except InputError as error:
        return 0, [Finding("verify", "malformed checkpoint", str(edited), str(error))]
    if {f: h.raw for f, h in result.headers.items()} != {f: h.raw for f, h in plan.headers.items()}:
        message = "its headers are not what the recipe makes of the base's"
        return 0, [Finding("verify", "changed header", str(edited), message)]
    # A shard that is the base's by both digests needs no second look, unless it should not be.
    claimed = receipt.subjects
    same = {file for file in sound & {*claimed} if claimed[file] == receipt.base.files.get(file)}
    same -= {plan.tensors[name].file for name in plan.edited}
    compared = _check_shards(Editor(plan), result, set(plan.headers) - same, progress)
    return len(plan.tensors), [*_check_copies(plan, receipt), *compared]


def _check_shards(
    editor: Editor, result: Checkpoint, files: set[str], progress: Progress | None
) -> list[Finding]:
    editor.prepare_all()

    def check(file: str, advance: Advance) -> list[Finding]:
        found: list[Finding] = []
        for name, info in editor.plan.headers[file].tensors.items():
            found += _check_tensor(editor, result, name)
            advance(info.nbytes)
        return found

    total = sum(editor.plan.file_bytes[file] for file in files)
    jobs = {file: partial(check, file) for file in sorted(files)}
    return [finding for found in in_parallel(jobs, total, progress).values() for finding in found]


def _check_copies(plan: Plan, receipt: _Receipt) -> Iterator[Finding]:
    """Compares every file but the shards, by the digests that were checked, with what the
    recipe makes of the base's; shards are compared tensor by tensor."""
    base, written = plan.base, replacements(plan, receipt.base.name)
    index = set(base.weight_files) - set(base.headers)
    made = {file: sha256_file(base.path(file)) for file in {*base.side_files, *index}}
    made |= {file: hashlib.sha256(data).hexdigest() for file, data in written.items()}
    claimed = {f: digest for f, digest in receipt.subjects.items() if f not in plan.headers}
    for file in sorted({*made, *claimed}):
        if made.get(file) != claimed.get(file):
            message = f"{quote(file)}: is not what the recipe makes of the base's"
            yield Finding("verify", "changed file", file, message)


def _check_base_files(
    base: Checkpoint, digests: dict[str, str], progress: Progress | None
) -> Iterator[Finding]:
    for file, digest in _digests(base.root, (CONFIG, *base.weight_files), progress).items():
        if isinstance(digest, CheckpointError):
            raise digest
        if digest != digests.get(file):
            message = f"{base.root / file}: is not the base this checkpoint was made from"
            yield Finding("verify", "another base", file, message)


def _recipe(recipe: Path | None, receipt: _Receipt, edited: Path) -> Recipe:
    if recipe is None:
        if receipt.inputs:
            raise ReceiptError(
                f"{edited}: its recipe reads files; give it with --recipe so that they are found"
            )
        return parse_recipe(receipt.recipe.text, f"{edited}: recipe", edited)
    loaded = load_recipe(recipe, allow_outside=True)
    if loaded.sha256 != receipt.recipe.sha256:
        raise RecipeError(f"{recipe}: is not the recipe that {edited} was made with")
    return loaded


def _check_tensor(editor: Editor, result: Checkpoint, name: str) -> Iterator[Finding]:
    """Compares one stored tensor with what the plan makes of the base, a part at a time."""
    regions = [step.target.region for step in editor.plan.steps_of(name)]
    if name in editor.plan.edited:
        bad = (
            _check_band(editor, result, rows, regions) for rows in bands(editor.plan.tensors[name])
        )
        yield from islice((finding for finding in bad if finding), 1)
    elif not _same_bytes(editor, result, name):
        message = f"{name}: differs, yet no edit names it"
        yield Finding("verify", "changed tensor", name, message)


def _same_bytes(editor: Editor, result: Checkpoint, name: str) -> bool:
    """Whether an unedited tensor is as in the base, or an added one as it was to begin with."""
    base = editor.plan.base
    if name not in base.tensors:
        slabs = editor.slabs(name)
        return all(result.read_rows(name, r).tobytes() == start.tobytes() for r, start in slabs)
    size = base.tensors[name].nbytes
    parts = ((begin, min(CHUNK, size - begin)) for begin in range(0, size, CHUNK))
    return all(base.read_bytes(name, *part) == result.read_bytes(name, *part) for part in parts)


def _check_band(
    editor: Editor, result: Checkpoint, rows: Region, regions: list[Region]
) -> Finding | None:
    name, plan, left = rows.tensor, editor.plan, editor.plan.region("after", rows)
    original = editor.stored(name, rows)
    expected = plan.take("after", rows, editor.edited(rows, original))
    stored, inside = (plan.take("after", rows, v) for v in (original, _inside(rows, regions)))
    found = result.read_rows(name, left)
    wrong = ~np.where(inside, _near(found, expected), _same_bits(found, stored))
    if not wrong.any():
        return None
    index = tuple(int(i) for i in np.argwhere(wrong)[0])
    place = [start + i for start, i in zip(left.start, index, strict=True)]
    message = f"{name}: at {place} holds {found[index]}, the recipe makes it {expected[index]}"
    return Finding("verify", "wrong value", name, message)


def _inside(rows: Region, regions: list[Region]) -> NDArray[np.bool_]:
    """Which elements of the band `rows` lie in one of `regions`."""
    inside = np.zeros(rows.shape, bool)
    for region in regions:
        if region.overlaps(rows):
            inside[region.intersection(rows).within(rows)] = True
    return inside


def _same_bits(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.bool_]:
    return np.asarray(bits(a) == bits(b))


def _near(found: NDArray[Any], expected: NDArray[Any]) -> NDArray[np.bool_]:
    """Within one ulp; the largest finite number, infinity and NaN are neighbours in bits only."""
    with np.errstate(invalid="ignore"):
        near = (ulp_distance(found, expected) <= 1) & np.isfinite(found) & np.isfinite(expected)
        near |= (found == expected) | (np.isnan(found) & np.isnan(expected))
    return np.asarray(near)


def ulp_distance(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.uint64]:
    """Units in the last place between floats of one dtype, elementwise; NaN counts as its bits.

    Sign and magnitude are mapped onto a line of unsigned integers on which neighbouring floats
    differ by one, with -0.0 and +0.0 on one spot.
    """
    left, right = _line(a), _line(b)
    return np.where(left > right, left - right, right - left)


def _line(values: NDArray[Any]) -> NDArray[np.uint64]:
    raw = bits(np.ascontiguousarray(values)).astype(np.uint64)
    sign = np.uint64(1 << (8 * values.dtype.itemsize - 1))
    magnitude = raw & (sign - np.uint64(1))
    return np.where(raw >= sign, sign - magnitude, sign + magnitude)
