"""Numbers of a checkpoint as edits read them, for scores that come from weights alone."""

from __future__ import annotations

from collections.abc import Iterator

from surgery.checkpoint import Checkpoint
from surgery.checkpoint.dtypes import compute_dtype
from surgery.editor import bands
from surgery.edits.interface import Array


class StoredReader:
    """Tensors as stored, in compute dtype, in bands of whole rows.

    With `hold`, those read once stay in memory: for tensors that many heads share.
    """

    def __init__(self, checkpoint: Checkpoint, hold: bool = False) -> None:
        self._checkpoint = checkpoint
        self._held: dict[str, list[tuple[slice, Array]]] | None = {} if hold else None

    def rows(self, tensor: str) -> Iterator[tuple[slice, Array]]:
        """Which rows, and their numbers."""
        if self._held is None:
            yield from self._read(tensor)
            return
        if tensor not in self._held:
            self._held[tensor] = list(self._read(tensor))
        yield from self._held[tensor]

    def _read(self, tensor: str) -> Iterator[tuple[slice, Array]]:
        info = self._checkpoint.info(tensor)
        for band in bands(info):
            stored = self._checkpoint.read_rows(tensor, band)
            yield band.slices[0], stored.astype(compute_dtype(info.dtype))
