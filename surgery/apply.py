"""A `Plan` to an edited checkpoint and its receipt: staged, synced, renamed into place."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.addresses import Region
from surgery.checkpoint import (
    CONFIG,
    EXPORT_RECEIPT,
    INDEX,
    RECEIPT,
    Checkpoint,
    Staging,
    TensorInfo,
)
from surgery.checkpoint.delta import AddedRecord, DeltaRecord, DeltaWriter, RegionRecord
from surgery.checkpoint.dtypes import bits, compute_dtype, numpy_dtype
from surgery.checkpoint.files import read_small, sha256_file
from surgery.checkpoint.layout import extended_index
from surgery.checkpoint.receipt import EDIT_PREDICATE, seal, statement
from surgery.checkpoint.staging import refuse_inside
from surgery.checkpoint.stream import Copied, Patch, copy
from surgery.editor import Editor, bands, row_bytes
from surgery.errors import CheckpointError
from surgery.modelcard import MODEL_CARD, describe_edit
from surgery.plan import Plan, Step, plan

Progress = Callable[[str, int, int], None]
"""Called with the file being written, the bytes done and the bytes there are to do."""


@dataclass(frozen=True)
class Applied:
    """An edited checkpoint: its folder, the tensors that changed and its receipt as data."""

    output: Path
    edited: tuple[str, ...]
    receipt: dict[str, Any]

    @property
    def nonfinite(self) -> dict[str, int]:
        """Edited tensors whose source holds NaN or infinities, and how many; they were kept."""
        records = self.receipt["predicate"]["tensors"]
        return {r["name"]: r["source_nonfinite"] for r in records if r["source_nonfinite"]}


def apply(
    recipe: Path,
    model: Path,
    output: Path,
    *,
    delta: Path | None = None,
    allow_outside: bool = False,
    progress: Progress | None = None,
) -> Applied:
    """Applies the recipe file `recipe` to checkpoint folder `model`, writing folder `output`.

    With `delta`, also the file that leads back to the base (`surgery.revert`). Raises an
    `InputError` where anything given cannot be used, `EnvironmentFault` where the disk
    is full; either way `output` does not appear and `model` is untouched.
    """
    found = plan(recipe, model, allow_outside=allow_outside)
    return apply_plan(found, output, delta=delta, progress=progress)


def apply_plan(
    plan: Plan, output: Path, *, delta: Path | None = None, progress: Progress | None = None
) -> Applied:
    """Writes the edited checkpoint of `plan` to folder `output`, and its `delta`."""
    with Staging(output, (plan.base.root,)) as staging, _delta_writer(plan, delta) as writer:
        _check_space(plan, staging)
        base_digests, digests = _copy_side_files(plan, staging)
        shards = _write_shards(plan, Editor(plan), staging.path, writer, progress)
        base_digests |= {file: copied.source for file, copied in shards.copied.items()}
        digests |= {file: copied.target for file, copied in shards.copied.items()}
        receipt = statement(digests, EDIT_PREDICATE, _predicate(plan, base_digests, shards.records))
        digests[RECEIPT] = staging.write(RECEIPT, seal(receipt))
        if writer is not None:
            _finish_delta(writer, plan, staging.path, base_digests, digests)
        staging.commit()
        if writer is not None:
            writer.commit()
    return Applied(output, plan.edited, receipt)


def _delta_writer(plan: Plan, delta: Path | None) -> AbstractContextManager[DeltaWriter | None]:
    if delta is None:
        return nullcontext()
    refuse_inside(delta.absolute(), plan.base.root)
    regions = dict.fromkeys(step.target.region for step in plan.steps)
    return DeltaWriter(delta, [(region, plan.tensors[region.tensor].dtype) for region in regions])


def _check_space(plan: Plan, staging: Staging) -> None:
    """Raises `EnvironmentFault` before the first byte if the disk cannot hold the result."""
    side = sum(plan.base.path(file).stat().st_size for file in plan.base.side_files)
    staging.require(plan.disk_bytes + side)


def _write_shards(
    plan: Plan,
    editor: Editor,
    folder: Path,
    delta: DeltaWriter | None,
    progress: Progress | None,
) -> _Shards:
    """Copies every shard, edited on the way, as many at a time as there are cores."""
    editor.prepare_all()
    records = {tensor: _TensorRecord(plan, tensor, delta) for tensor in plan.edited}
    meter = _Meter(plan.disk_bytes, progress)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        jobs = {
            file: pool.submit(_write_shard, plan, editor, folder, file, records, meter)
            for file in _longest_first(plan)
        }
        try:
            copied = {file: job.result() for file, job in jobs.items()}
        except BaseException:
            meter.cancel()
            pool.shutdown(cancel_futures=True)
            raise
    return _Shards(copied, [records[tensor].to_json() for tensor in plan.edited])


def _longest_first(plan: Plan) -> list[str]:
    """The shards, those with edits before the others: they are hashed twice from there on."""
    edited = {plan.tensors[tensor].file for tensor in plan.edited}
    return sorted(plan.headers, key=lambda file: file not in edited)


@dataclass(frozen=True)
class _Shards:
    copied: dict[str, Copied]
    records: list[dict[str, Any]]


class _Meter:
    """Adds up the bytes that threads have done, and stops them when one has failed."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total, self._progress = total, progress
        self._done, self._lock, self._cancelled = 0, Lock(), False

    def advance(self, file: str, nbytes: int) -> None:
        """Raises `CancelledError` once `cancel` was called."""
        if self._cancelled:
            raise CancelledError
        with self._lock:
            self._done += nbytes
            if self._progress is not None:
                self._progress(file, self._done, self._total)

    def cancel(self) -> None:
        self._cancelled = True


def _write_shard(
    plan: Plan,
    editor: Editor,
    folder: Path,
    file: str,
    records: dict[str, _TensorRecord],
    meter: _Meter,
) -> Copied:
    old, new = plan.base.headers[file], plan.headers[file]
    patches = [
        patch
        for info in sorted(old.tensors.values(), key=lambda info: info.begin)
        if info.name in records
        for patch in _patches(editor, info, records[info.name])
    ]
    extended = new is not old
    return copy(
        plan.base.path(file),
        folder / file,
        head=len(new.raw).to_bytes(8, "little") + new.raw if extended else None,
        skip=old.data_start if extended else 0,
        patches=patches,
        tail=_appended(editor, file, records),
        advance=partial(meter.advance, file),
    )


def _patches(editor: Editor, info: TensorInfo, record: _TensorRecord) -> Iterator[Patch]:
    """One patch per band of rows of an edited tensor, its offsets those of the base file."""
    for rows in bands(info):
        begin = info.begin + (rows.start[0] * row_bytes(info) if rows.start else 0)
        size = rows.size * numpy_dtype(info.dtype).itemsize
        yield Patch(begin, begin + size, partial(_edit_band, editor, rows, record))


def _edit_band(editor: Editor, rows: Region, record: _TensorRecord, raw: bytearray) -> bytes:
    info = editor.plan.tensors[rows.tensor]
    old = np.frombuffer(raw, numpy_dtype(info.dtype)).reshape(rows.shape)
    return record.add(rows, old, editor.edited(rows, old))


def _appended(editor: Editor, file: str, records: dict[str, _TensorRecord]) -> Iterator[bytes]:
    """The bytes of every added tensor of a shard, in the order of its header."""
    for tensor in editor.plan.added:
        if tensor.file == file:
            for rows, old in editor.slabs(tensor.name):
                new = editor.edited(rows, old)
                record = records.get(tensor.name)
                yield record.add(rows, old, new) if record else new.tobytes()


class _TensorRecord:
    """The receipt's record of one edited tensor, gathered band by band in row order."""

    def __init__(self, plan: Plan, tensor: str, delta: DeltaWriter | None) -> None:
        self._plan, self._tensor, self._delta = plan, tensor, delta
        self._before, self._after = hashlib.sha256(), hashlib.sha256()
        self._squares, self._largest, self._changed, self._nonfinite = 0.0, 0.0, 0, 0

    def add(self, rows: Region, old: NDArray[Any], new: NDArray[Any]) -> bytes:
        """Counts the band `rows` in; returns its new bytes."""
        if self._delta is not None:
            self._delta.add(rows, old, new)
        before, after = old.tobytes(), new.tobytes()
        self._before.update(before)
        self._after.update(after)
        self._count(old, new)
        return after

    def _count(self, old: NDArray[Any], new: NDArray[Any]) -> None:
        dtype = compute_dtype(self._plan.tensors[self._tensor].dtype)
        with np.errstate(invalid="ignore", over="ignore"):  # a signalling NaN says so
            before = old.astype(dtype)
            change = new.astype(dtype) - before
            nonfinite = before.size - int(np.count_nonzero(np.isfinite(before)))
            if nonfinite:
                # What was kept did not change, though NaN less NaN is no zero.
                change[bits(old) == bits(new)] = 0
            self._squares += float(np.square(change, dtype=np.float64).sum())
            self._largest = float(np.max(np.abs(change), initial=self._largest))
        self._nonfinite += nonfinite
        self._changed += int(np.count_nonzero(change))

    def to_json(self) -> dict[str, Any]:
        """Norms are text: JSON has no NaN, and a source may hold some."""
        plan, info = self._plan, self._plan.tensors[self._tensor]
        steps = plan.steps_of(self._tensor)
        stored = self._tensor in plan.base.tensors
        return {
            "name": self._tensor,
            "role": steps[0].role,
            "dtype": info.dtype,
            "shape": list(info.shape),
            "before_sha256": self._before.hexdigest() if stored else None,
            "after_sha256": self._after.hexdigest(),
            # NaN and infinities of the source are kept to the bit; that they are there is said.
            "source_nonfinite": self._nonfinite,
            "edits": _edit_records(plan, steps),
            "change": {
                "frobenius": repr(float(np.sqrt(self._squares))),
                "max_abs": repr(self._largest),
                "elements": repr(self._changed),
            },
        }


def _copy_side_files(plan: Plan, staging: Staging) -> tuple[dict[str, str], dict[str, str]]:
    """Everything but the shards; the digests of what was read and of what was written."""
    base, read, written = plan.base, {}, {}
    replaced = replacements(plan, base.root.resolve().name)
    for file in [*base.side_files, *set(base.weight_files) - set(base.headers)]:
        if file in replaced:
            read[file] = sha256_file(base.path(file))
        else:
            copied = copy(base.path(file), staging.place(file))
            read[file] = written[file] = copied.target
    for file, text in replaced.items():
        written[file] = staging.write(file, text)
    return read, written


def replacements(plan: Plan, base_name: str) -> dict[str, bytes]:
    """Files that are written anew: the model card, and config and index where they change."""
    base = plan.base
    card = base.path(MODEL_CARD).read_bytes() if MODEL_CARD in base.side_files else b""
    replaced = {MODEL_CARD: describe_edit(card, base_name, plan.recipe)}
    if plan.config:
        config = base.config | plan.config
        replaced[CONFIG] = json.dumps(config, indent=2, ensure_ascii=False).encode() + b"\n"
    index = extended_index(base, plan.added)
    if index is not None:
        replaced[INDEX] = index
    return replaced


def _edit_records(plan: Plan, steps: tuple[Step, ...]) -> list[dict[str, Any]]:
    grouped: dict[int, list[Step]] = {}
    for step in steps:
        grouped.setdefault(step.edit, []).append(step)
    return [
        {
            "edit": index,
            "op": plan.edits[index].op,
            "parameters": plan.recipe.edits[index].model_dump(mode="json", by_alias=True),
            "regions": [
                [list(step.target.region.start), list(step.target.region.stop)] for step in own
            ],
        }
        for index, own in grouped.items()
    ]


def _finish_delta(
    writer: DeltaWriter,
    plan: Plan,
    folder: Path,
    base_digests: dict[str, str],
    digests: dict[str, str],
) -> None:
    """Completes a delta with every file but the shards that changed, came or went."""
    base = plan.base
    small = {RECEIPT, EXPORT_RECEIPT} & set(base.not_carried)
    base_digests = base_digests | {file: sha256_file(base.path(file)) for file in small}
    others = sorted({*base_digests, *digests} - {*base.headers})
    changed = [file for file in others if base_digests.get(file) != digests.get(file)]
    extended = [file for file, header in plan.headers.items() if header is not base.headers[file]]
    record = DeltaRecord(
        base=base_digests,
        edited=digests,
        regions=tuple(
            RegionRecord(tensor=r.tensor, start=r.start, stop=r.stop)
            for r in dict.fromkeys(step.target.region for step in plan.steps)
        ),
        added=tuple(AddedRecord(**vars(tensor)) for tensor in plan.added),
        files=tuple(changed),
        headers=tuple(extended),
        lost=tuple(file for file in base.not_carried if file not in small),
    )
    files = {
        file: (
            base.path(file).read_bytes() if file in base_digests else None,
            (folder / file).read_bytes() if file in digests else None,
        )
        for file in changed
    }
    headers = {file: (base.headers[file].raw, plan.headers[file].raw) for file in extended}
    writer.finish(record, files, headers)


def _predicate(
    plan: Plan, base_digests: dict[str, str], records: list[dict[str, Any]]
) -> dict[str, Any]:
    return {
        "base": {"name": plan.base.root.resolve().name, "files": base_digests},
        "recipe": {"text": plan.recipe.text, "sha256": plan.recipe.sha256},
        "inputs": plan.inputs,
        "tensors": records,
        "added": [tensor.name for tensor in plan.added],
        "config": plan.config,
        "not_carried": list(plan.base.not_carried),
        "parents": list(_parents(plan.base)),
        "environment": environment(),
    }


def _parents(base: Checkpoint) -> Iterator[dict[str, str]]:
    if RECEIPT in base.not_carried:
        raw = read_small(base.path(RECEIPT))
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            raise CheckpointError(f"{base.root / RECEIPT}: is not UTF-8; remove it") from None
        yield {"sha256": hashlib.sha256(raw).hexdigest(), "text": text}


def environment() -> dict[str, str]:
    """Versions and machine facts that a result may depend on."""
    packages = ("weight-surgery", "numpy", "ml_dtypes", "safetensors")
    return {
        **{name: version(name) for name in packages},
        "python": platform.python_version(),
        "cpu": platform.processor() or platform.machine(),
        "threads": str(os.cpu_count()),
    }
