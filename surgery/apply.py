"""A `Plan` to an edited checkpoint and its receipt: staged, synced, renamed into place."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.addresses import Region
from surgery.checkpoint import CONFIG, INDEX, RECEIPT, Checkpoint, Staging, TensorInfo
from surgery.checkpoint.dtypes import compute_dtype, numpy_dtype
from surgery.checkpoint.files import read_small, sha256_file
from surgery.checkpoint.layout import NewTensor, extended_index
from surgery.checkpoint.receipt import EDIT_PREDICATE, seal, statement
from surgery.edits.engine import round_once
from surgery.edits.interface import Array
from surgery.errors import CheckpointError
from surgery.modelcard import MODEL_CARD, describe_edit
from surgery.plan import Plan, Step, plan

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much is done and how much there is to do."""


@dataclass(frozen=True)
class Applied:
    """An edited checkpoint: its folder, the tensors that changed and its receipt as data."""

    output: Path
    edited: tuple[str, ...]
    receipt: dict[str, Any]


def apply(
    recipe: Path,
    model: Path,
    output: Path,
    *,
    allow_outside: bool = False,
    progress: Progress | None = None,
) -> Applied:
    """Applies the recipe file `recipe` to checkpoint folder `model`, writing folder `output`.

    Raises an `InputError` where anything given cannot be used, `EnvironmentFault` where the disk
    is full; either way `output` does not appear and `model` is untouched.
    """
    return apply_plan(plan(recipe, model, allow_outside=allow_outside), output, progress)


def apply_plan(plan: Plan, output: Path, progress: Progress | None = None) -> Applied:
    """Writes the edited checkpoint of `plan` to folder `output`."""
    editor = Editor(plan)
    with Staging(output, (plan.base.root,)) as staging:
        base_digests, digests = _copy(plan, staging)
        records = []
        for done, tensor in enumerate(plan.edited):
            records.append(_edit_tensor(editor, tensor, staging.path))
            if progress is not None:
                progress(tensor, done + 1, len(plan.edited))
        for file in {plan.tensors[tensor].file for tensor in plan.edited} | {
            tensor.file for tensor in plan.added
        }:
            digests[file] = sha256_file(staging.path / file)
        receipt = statement(digests, EDIT_PREDICATE, _predicate(plan, base_digests, records))
        staging.write(RECEIPT, seal(receipt))
        staging.commit()
    return Applied(output, plan.edited, receipt)


@dataclass
class Editor:
    """Computes edited tensors of a plan; prepares each edit's state once, when first needed."""

    plan: Plan
    _states: dict[int, Any] = field(default_factory=dict)

    def state(self, edit: int) -> Any:
        """What edit number `edit` prepared, from tensors as the edits before it left them."""
        if edit not in self._states:
            reader = _EarlierEdits(self, edit)
            self._states[edit] = self.plan.edits[edit].prepare(self.plan.arch, reader)
        return self._states[edit]

    def stored(self, tensor: str) -> NDArray[Any]:
        """The tensor before any edit, in its stored dtype; what an addition starts from."""
        if tensor in self.plan.base.tensors:
            return self.plan.base.read(tensor)
        new = next(new for new in self.plan.added if new.name == tensor)
        dtype = numpy_dtype(new.dtype)
        return self.plan.base.read(new.source) if new.source else np.zeros(new.shape, dtype)

    def unrounded(self, tensor: str, before_edit: int | None = None) -> Array:
        """The tensor after every edit (or those before number `before_edit`), in compute dtype."""
        numbers = self._widened(tensor, self.stored(tensor))
        steps = self.plan.steps_of(tensor)
        chosen = [s for s in steps if before_edit is None or s.edit < before_edit]
        return self._run(numbers, chosen, Region.whole(tensor, numbers.shape))

    def rows(self, tensor: str, stored: NDArray[Any], rows: Region) -> NDArray[Any]:
        """`stored`, the rows `rows` of a tensor, after every edit, rounded once."""
        numbers = self._widened(tensor, stored)
        edited = self._run(numbers, self.plan.steps_of(tensor), rows)
        return round_once(rows, stored, edited)

    def _widened(self, tensor: str, stored: NDArray[Any]) -> Array:
        with np.errstate(invalid="ignore"):  # a signalling NaN is a number like any other here
            return stored.astype(compute_dtype(self.plan.tensors[tensor].dtype))

    def _run(self, numbers: Array, steps: Any, rows: Region) -> Array:
        with np.errstate(over="ignore", invalid="ignore"):
            for step in steps:
                edit, region = self.plan.edits[step.edit], step.target.region
                window = _within(region, rows)
                numbers[window] = edit.transform(numbers[window], region, self.state(step.edit))
        return numbers


@dataclass(frozen=True)
class _EarlierEdits:
    editor: Editor
    edit: int

    def read(self, tensor: str) -> Array:
        return self.editor.unrounded(tensor, before_edit=self.edit)


def spanned_rows(steps: tuple[Step, ...], info: TensorInfo) -> Region:
    """The smallest band of whole rows (first axis) that holds every region of `steps`."""
    if not info.shape:
        return Region.whole(info.name, info.shape)
    start = min(step.target.region.start[0] for step in steps)
    stop = max(step.target.region.stop[0] for step in steps)
    return Region.band(info.name, info.shape, 0, start, stop)


def _within(region: Region, rows: Region) -> tuple[slice, ...]:
    pairs = zip(region.slices, rows.start, strict=True)
    return tuple(slice(s.start - offset, s.stop - offset) for s, offset in pairs)


def _copy(plan: Plan, staging: Staging) -> tuple[dict[str, str], dict[str, str]]:
    """Copies every file of the base; returns the digests of what was read and of what was
    written, the latter not yet right for weight files that edits will touch."""
    base = plan.base
    read = {file: _copy_shard(plan, staging, file) for file in base.headers}
    written = dict(read)
    replaced = replacements(plan, base.root.resolve().name)
    for file in [*base.side_files, *set(base.weight_files) - set(read)]:
        if file in replaced:
            read[file] = sha256_file(base.path(file))
        else:
            read[file] = written[file] = staging.copy(base.path(file), file)
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


def _copy_shard(plan: Plan, staging: Staging, file: str) -> str:
    old, new = plan.base.headers[file], plan.headers[file]
    if new is old:
        return staging.copy(plan.base.path(file), file)
    prefix = len(new.raw).to_bytes(8, "little") + new.raw
    digest = staging.copy(plan.base.path(file), file, prefix=prefix, skip=old.data_start)
    with (staging.path / file).open("ab") as output:
        for tensor in plan.added:
            if tensor.file == file:
                output.write(_initial_bytes(plan.base, tensor))
    return digest


def _initial_bytes(base: Checkpoint, tensor: NewTensor) -> bytes:
    return bytes(base.read_bytes(tensor.source) if tensor.source else tensor.nbytes)


def _edit_tensor(editor: Editor, tensor: str, folder: Path) -> dict[str, Any]:
    """Rewrites the regions of one tensor in its staged file; returns the receipt's record."""
    plan, info = editor.plan, editor.plan.tensors[tensor]
    steps = plan.steps_of(tensor)
    rows = spanned_rows(steps, info)
    stored = np.ascontiguousarray(editor.stored(tensor))
    before = hashlib.sha256(stored.tobytes()).hexdigest()
    old = stored[rows.slices]
    new = editor.rows(tensor, old, rows)
    begin = info.begin + (stored[: rows.start[0]].nbytes if rows.start else 0)
    _write_at(folder / info.file, begin, new.tobytes())
    stored = stored.copy()
    stored[rows.slices] = new
    return {
        "name": tensor,
        "role": steps[0].role,
        "dtype": info.dtype,
        "shape": list(info.shape),
        "before_sha256": before if tensor in plan.base.tensors else None,
        "after_sha256": hashlib.sha256(stored.tobytes()).hexdigest(),
        "edits": _edit_records(plan, steps),
        "change": _norms(old, new),
    }


def _edit_records(plan: Plan, steps: tuple[Step, ...]) -> list[dict[str, Any]]:
    grouped: dict[int, list[Step]] = {}
    for step in steps:
        grouped.setdefault(step.edit, []).append(step)
    return [
        {
            "edit": index,
            "op": plan.edits[index].op,
            "parameters": plan.recipe.edits[index].model_dump(mode="json"),
            "regions": [
                [list(step.target.region.start), list(step.target.region.stop)] for step in own
            ],
        }
        for index, own in grouped.items()
    ]


def _norms(old: NDArray[Any], new: NDArray[Any]) -> dict[str, str]:
    """Norms of the change as text: JSON has no NaN, and a source may hold some."""
    with np.errstate(invalid="ignore"):
        change = new.astype(np.float64) - old.astype(np.float64)
    return {
        "frobenius": repr(float(np.linalg.norm(change))),
        "max_abs": repr(float(np.abs(change).max(initial=0))),
        "elements": repr(int(np.count_nonzero(change))),
    }


def _write_at(path: Path, offset: int, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY)
    try:
        view = memoryview(data)
        while view:
            written = os.pwrite(descriptor, view, offset)
            view, offset = view[written:], offset + written
    finally:
        os.close(descriptor)


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
