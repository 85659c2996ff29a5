"""How much of an edit an initializer holds: none of it, half, all of it twice."""

from __future__ import annotations

from typing import Any

import numpy as np

from surgery.checkpoint import Checkpoint
from surgery.differential import Pair
from surgery.export import onnxfile
from surgery.export.expressions import Expression, from_json
from surgery.export.lineage import Lineage
from surgery.export.lineage.comparing import tiles
from surgery.export.lineage.stored import Stored, stored_initializer

_NEAR = 0.1
"""How far from the line between original and edited an initializer may be, in lengths of the
edit: narrow dtypes round each of the three."""


class EditShares:
    """What the initializers of an edited model's graph hold of the edit, `original` to `edited`."""

    def __init__(self, original: Pair, edited: Pair, lineage: Lineage) -> None:
        self._before, self._after = (Checkpoint.open(p.model) for p in (original, edited))
        self._expressions = {row.name: row.expression for row in lineage.rows if row.expression}
        self._tensors: dict[str, Any] = {}
        self._folder = edited.data
        if lineage.findings:
            graph = onnxfile.read(edited.onnx, edited.initializers).graph
            self._tensors = {tensor.name: tensor for tensor in graph.initializer}

    def share(self, initializer: str) -> float | None:
        """t where it is original + t (edited - original): 0 without the edit, 2 where it was made
        twice. None for what is no such sum, and where the edit leaves that tensor alone."""
        found = self._tensors.get(initializer)
        fields = self._expressions.get(initializer)
        stored = stored_initializer(found, self._folder) if found is not None else None
        if stored is None or fields is None or not stored.is_float:
            return None
        expression = from_json(fields)
        return self._measured(stored, expression) if self._has_both(expression) else None

    def _has_both(self, expression: Expression) -> bool:
        """Whether both checkpoints have its tensors, in one shape."""
        return all(
            name in self._before.tensors
            and self._before.info(name).shape == self._after.info(name).shape
            for name in expression.tensors()
        )

    def _measured(self, stored: Stored, expression: Expression) -> float | None:
        xx = xd = dd = 0.0
        sides = (tiles(stored, expression, model) for model in (self._before, self._after))
        for old, new in zip(*sides, strict=True):
            before = old.wanted.astype(np.float64)
            edit, own = new.wanted - before, old.found - before
            xx += float((own * own).sum())
            xd += float((own * edit).sum())
            dd += float((edit * edit).sum())
        if not (0 < dd < np.inf and xx < np.inf):
            return None
        return xd / dd if xx - xd * xd / dd <= _NEAR**2 * dd else None
