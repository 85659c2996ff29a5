"""A `Plan` to an edited checkpoint and its receipt: staged, synced, renamed into place."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.addresses import Region
from surgery.checkpoint import (
    CONFIG,
    EXPORT_RECEIPT,
    INDEX,
    LINEAGE,
    RECEIPT,
    Staging,
    TensorInfo,
)
from surgery.checkpoint.delta import (
    AddedRecord,
    DeltaRecord,
    DeltaWriter,
    RegionRecord,
    ResizeRecord,
    resume,
)
from surgery.checkpoint.dtypes import numpy_dtype
from surgery.checkpoint.files import sha256_file
from surgery.checkpoint.layout import new_index
from surgery.checkpoint.parallel import Advance, Progress, in_parallel
from surgery.checkpoint.receipt import EDIT_PREDICATE, open_receipt, seal, statement
from surgery.checkpoint.staging import refuse_inside
from surgery.checkpoint.stream import Copied, Patch, copy
from surgery.editor import Editor, bands, row_bytes
from surgery.errors import OutputError
from surgery.modelcard import MODEL_CARD, describe_edit
from surgery.plan import Plan, plan
from surgery.record import TensorRecord, predicate, trusted_digests

_NO_LINK = frozenset({errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP})
"""Another file system, or one that has no hard links, or no more of them."""


@dataclass(frozen=True)
class Applied:
    """An edited checkpoint: its folder, the tensors that changed and its receipt as data.

    `notes` are what the user should know of how the options worked out.
    """

    output: Path
    edited: tuple[str, ...]
    receipt: dict[str, Any]
    notes: tuple[str, ...] = ()

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
    allow_outside: bool = False,
    allow_code: bool = False,
    delta: Path | None = None,
    link: bool = False,
    trust_receipt: bool = False,
    progress: Progress | None = None,
) -> Applied:
    """Applies the recipe file `recipe` to checkpoint folder `model`, writing folder `output`.

    With `delta`, also the file that leads back to the base (`surgery.revert`). With `link`,
    shards without an edit become hard links to the base's. With `trust_receipt`, digests of base
    shards are taken from the base's own receipt where size, modification time and inode are as
    it says. Raises an `InputError` where anything given cannot be used, `EnvironmentFault`
    where the disk is full; either way `output` does not appear and `model` is untouched.
    """
    found = plan(recipe, model, allow_outside=allow_outside, allow_code=allow_code)
    return apply_plan(
        found, output, delta=delta, link=link, trust_receipt=trust_receipt, progress=progress
    )


def apply_plan(
    plan: Plan,
    output: Path,
    *,
    delta: Path | None = None,
    link: bool = False,
    trust_receipt: bool = False,
    progress: Progress | None = None,
) -> Applied:
    """Writes the edited checkpoint of `plan` to folder `output`, as `apply` does."""
    if delta is not None and _same_edit(plan, output) and resume(delta, output, plan.base):
        receipt = open_receipt(output / RECEIPT, EDIT_PREDICATE)
        return Applied(output, plan.edited, receipt, ("ended a run that was stopped",))
    trusted = trusted_digests(plan.base) if trust_receipt else {}
    with Staging(output, (plan.base.root,)) as staging, _delta_writer(plan, delta) as writer:
        shards = _Shards(plan, Editor(plan), staging, writer, trusted, link)
        staging.require(shards.disk_bytes + _side_bytes(plan))
        base_digests, digests = _copy_side_files(plan, staging)
        copied = shards.write(progress)
        base_digests |= {file: both.source for file, both in copied.items()}
        digests |= {file: both.target for file, both in copied.items()}
        facts = predicate(
            plan,
            staging.path,
            base_digests,
            [record.to_json() for record in shards.records.values()],
            trusted=sorted(trusted),
            linked=shards.linked,
        )
        receipt = statement(digests, EDIT_PREDICATE, facts)
        digests[RECEIPT] = staging.write(RECEIPT, seal(receipt))
        if writer is not None:
            _finish_delta(writer, plan, staging.path, base_digests, digests)
        try:
            staging.commit()
        finally:
            if writer is not None and staging.committed:
                writer.owed = True
                writer.commit()
    notes = [*_link_notes(shards.linked, link), *_trust_notes(plan, trusted, trust_receipt)]
    return Applied(output, plan.edited, receipt, tuple(notes))


def _link_notes(linked: list[str], asked: bool) -> Iterator[str]:
    if linked:
        yield (
            f"shards that are hard links to the base's: {len(linked)}; a change of one is a change "
            "of both, and ONNX tools refuse hard links as external data, the base's included"
        )
    elif asked:
        yield "nothing was linked: every shard has an edit"


def _trust_notes(plan: Plan, trusted: Mapping[str, str], asked: bool) -> Iterator[str]:
    if asked:
        yield f"digests of {len(trusted)} of {len(plan.base.headers)} base shards were not computed"


def _same_edit(plan: Plan, output: Path) -> bool:
    """Whether `output` is there already, made by this recipe from the same files."""
    if not (output / RECEIPT).is_file():
        return False
    facts = open_receipt(output / RECEIPT, EDIT_PREDICATE)["predicate"]
    return bool(facts["recipe"]["sha256"] == plan.recipe.sha256 and facts["inputs"] == plan.inputs)


def _delta_writer(plan: Plan, delta: Path | None) -> AbstractContextManager[DeltaWriter | None]:
    if delta is None:
        return nullcontext()
    refuse_inside(delta.absolute(), plan.base.root)
    regions = [(region, plan.tensors[region.tensor].dtype) for region in plan.regions]
    return DeltaWriter(delta, regions)


def _side_bytes(plan: Plan) -> int:
    return sum(plan.base.path(file).stat().st_size for file in plan.base.side_files)


class _Shards:
    """The shards of one edited checkpoint while they are written, with what the receipt and the
    delta shall know of them."""

    def __init__(
        self,
        plan: Plan,
        editor: Editor,
        staging: Staging,
        delta: DeltaWriter | None,
        trusted: Mapping[str, str],
        link: bool,
    ) -> None:
        self._plan, self._editor, self._staging = plan, editor, staging
        self._delta, self._trusted = delta, trusted
        self.records = {tensor: TensorRecord(plan, tensor) for tensor in plan.edited}
        touched = {plan.tensors[tensor].file for tensor in plan.edited}
        touched |= {tensor.file for tensor in plan.added}
        self._untouched = [file for file in plan.headers if file not in touched]
        self._touched = [file for file in plan.headers if file in touched]
        self.linked = self._untouched if link else []

    @property
    def disk_bytes(self) -> int:
        """Bytes that will be written."""
        linked = set(self.linked)
        return sum(size for file, size in self._plan.file_bytes.items() if file not in linked)

    def write(self, progress: Progress | None) -> dict[str, Copied]:
        """Writes every shard; those with edits first, for they take the longest."""
        self._editor.prepare_all()
        jobs = {file: partial(self._edit, file) for file in self._touched}
        jobs |= {file: partial(self._carry, file) for file in self._untouched}
        return in_parallel(jobs, sum(self._plan.file_bytes.values()), progress)

    def _carry(self, file: str, advance: Advance) -> Copied:
        """A shard without an edit."""
        source, target = self._plan.base.path(file), self._staging.path / file
        known = self._trusted.get(file)
        if file not in self.linked:
            return copy(source, target, known=known, advance=advance)
        _link(source, target)
        digest = known or sha256_file(source, advance)
        return Copied(digest, digest)

    def _edit(self, file: str, advance: Advance) -> Copied:
        """A shard with edits, or with another header than the base's."""
        old, new = self._plan.base.headers[file], self._plan.headers[file]
        patches = [
            patch
            for info in sorted(old.tensors.values(), key=lambda info: info.begin)
            if info.name in self.records
            for patch in self._patches(info)
        ]
        relaid = new is not old
        return copy(
            self._plan.base.path(file),
            self._staging.path / file,
            head=len(new.raw).to_bytes(8, "little") + new.raw if relaid else None,
            skip=old.data_start if relaid else 0,
            patches=patches,
            tail=self._appended(file),
            known=self._trusted.get(file),
            advance=advance,
        )

    def _patches(self, info: TensorInfo) -> Iterator[Patch]:
        """One patch per band of rows of an edited tensor, its offsets those of the base file."""
        for rows in bands(self._plan.tensors[info.name]):
            given = self._plan.region("before", rows)
            begin = info.begin + (given.start[0] * row_bytes(info) if given.start else 0)
            size = given.size * numpy_dtype(info.dtype).itemsize
            yield Patch(begin, begin + size, partial(self._edit_band, rows))

    def _edit_band(self, rows: Region, raw: bytearray) -> bytes:
        info = self._plan.tensors[rows.tensor]
        given = self._plan.region("before", rows)
        stored = np.frombuffer(raw, numpy_dtype(info.dtype)).reshape(given.shape)
        return self._record(rows, self._plan.spread(rows, stored))

    def _appended(self, file: str) -> Iterator[bytes]:
        """The bytes of every added tensor of a shard, in the order of its header."""
        for tensor in self._plan.added:
            if tensor.file == file:
                for rows, old in self._editor.slabs(tensor.name):
                    edited = tensor.name in self.records
                    yield self._record(rows, old) if edited else old.tobytes()

    def _record(self, rows: Region, old: NDArray[Any]) -> bytes:
        """The new bytes of a band of an edited tensor, noted for the receipt and the delta."""
        observe = None if self._delta is None else self._delta.observe
        new = self._editor.edited(rows, old, observe)
        if self._delta is not None:
            self._delta.add(rows, old, new)
        return self.records[rows.tensor].add(rows, old, new)


def _link(source: Path, target: Path) -> None:
    try:
        target.hardlink_to(source)
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        raise OutputError(
            f"{target.name}: cannot be a hard link to {source}: {error.strerror}; leave link out"
        ) from None


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
    index = new_index(base, plan.headers, plan.added)
    if index is not None:
        replaced[INDEX] = index
    return replaced


def _finish_delta(
    writer: DeltaWriter,
    plan: Plan,
    folder: Path,
    base_digests: dict[str, str],
    digests: dict[str, str],
) -> None:
    """Completes a delta with every file but the shards that changed, came or went."""
    base = plan.base
    small = {RECEIPT, EXPORT_RECEIPT, LINEAGE} & set(base.not_carried)
    base_digests = base_digests | {file: sha256_file(base.path(file)) for file in small}
    others = sorted({*base_digests, *digests} - {*base.headers})
    changed = [file for file in others if base_digests.get(file) != digests.get(file)]
    relaid = [file for file, header in plan.headers.items() if header is not base.headers[file]]
    record = DeltaRecord(
        base=base_digests,
        edited=digests,
        regions=tuple(
            RegionRecord(tensor=r.tensor, start=r.start, stop=r.stop) for r in plan.regions
        ),
        resized=tuple(
            ResizeRecord(tensor=tensor, **vars(resize)) for tensor, resize in plan.resized.items()
        ),
        added=tuple(AddedRecord(**vars(tensor)) for tensor in plan.added),
        files=tuple(changed),
        headers=tuple(relaid),
        lost=tuple(file for file in base.not_carried if file not in small),
    )
    files = {
        file: (
            base.path(file).read_bytes() if file in base_digests else None,
            (folder / file).read_bytes() if file in digests else None,
        )
        for file in changed
    }
    headers = {file: (base.headers[file].raw, plan.headers[file].raw) for file in relaid}
    writer.finish(record, files, headers)
