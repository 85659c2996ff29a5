"""Outputs and inputs that are not what was asked for."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from onnx import ModelProto

from tests.differential import mutants
from tests.localize.seeds.target import Target, Truth


def _whole(how: Callable[[ModelProto], None]) -> Callable[[Target], Truth]:
    def plant(target: Target) -> Truth:
        how(target.model)
        return Truth()

    return plant


def _cut(model: ModelProto) -> None:
    sizes = model.graph.output[0].type.tensor_type.shape.dim
    mutants.cut_features(model, sizes[2].dim_value - 1 if sizes[2].dim_value else 7)


SEEDS: dict[str, Callable[[Target], Truth]] = {
    "another output": _whole(mutants.pool_output),
    "one feature less": _whole(_cut),
    "float16 output": _whole(mutants.to_float16),
    "output through float16": _whole(mutants.through_float16),
    "batch baked in": _whole(lambda m: mutants.add(m, np.zeros((2, 1, 1)))),
    "length baked in": _whole(lambda m: mutants.add(m, np.zeros((1, 7, 1)))),
    "impossible shape": _whole(lambda m: mutants.reshape(m, [7, 11, 13])),
    "NaN everywhere": _whole(mutants.nan_everywhere),
    "NaN in padded batches": _whole(mutants.nan_in_padded_batches),
    "NaN under padding": _whole(mutants.nan_at_padding),
    "ids through int8": _whole(mutants.narrow_ids),
}
