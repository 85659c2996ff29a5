"""A batch as one run of a graph: all positions at once, or those after its split over PyTorch's
caches of those before, so that a cache that was left wrong is not taken for one that is read wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.errors import EnvironmentFault
from surgery.runtimes.graph import PRESENT
from surgery.stimuli import Batch

Array = NDArray[Any]
Arrays = dict[str, Array]


def is_cache(site: str) -> bool:
    """Whether it is an output `present.N.key|value`: [batch, heads, length, size]."""
    return site.startswith(PRESENT)


def fed(batch: Batch, torch: Mapping[str, Array]) -> Arrays:
    """What one run is fed: ids and positions after the batch's split, the mask of all, and what
    PyTorch's caches in `torch`, which are of all positions, hold of those before.

    A cache has the name of the output that leaves it. Raises `EnvironmentFault` where PyTorch
    keeps fewer positions, as behind a window that slides.
    """
    ids = {name: array[:, batch.split :] for name, array in batch.inputs().items()}
    caches = {name: array for name, array in torch.items() if is_cache(name)}
    length = batch.input_ids.shape[1]
    for name, array in caches.items():
        if batch.split and array.shape[2] != length:
            raise EnvironmentFault(
                f"PyTorch keeps {array.shape[2]} of {length} positions in {name}, so that no run "
                "can go on over its caches"
            )
    before = {name: array[:, :, : batch.split] for name, array in caches.items()}
    return {**ids, "attention_mask": batch.attention_mask, **before}


def after(batch: Batch, torch: Mapping[str, Array]) -> Arrays:
    """PyTorch's values of such a run: caches whole, others after the split. Values without a row
    for each position stay only where nothing is split off."""
    shape = batch.input_ids.shape
    rows = {n: a[:, batch.split :] for n, a in torch.items() if a.shape[:2] == shape}
    whole = {n: a for n, a in torch.items() if is_cache(n) or not batch.split}
    return rows | whole


def real(site: str, value: Array, inputs: Mapping[str, Array]) -> NDArray[np.bool_]:
    """Which entries along a value's first axes belong to real tokens of a run: [batch, heads,
    length] of a cache, [batch, length] of what has a row for each position, else all of [batch]."""
    mask = inputs["attention_mask"].astype(bool)
    own = mask[:, mask.shape[1] - inputs["input_ids"].shape[1] :]
    if is_cache(site) and value.shape[2:3] == mask.shape[1:]:
        return np.broadcast_to(mask[:, None], value.shape[:3])
    return own if value.shape[:2] == own.shape else np.ones(value.shape[:1], np.bool_)
