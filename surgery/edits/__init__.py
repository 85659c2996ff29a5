"""Edits: one op, one file. The registry maps an op to the model of its recipe fields."""

from surgery.edits.interface import Addition, Edit, Fields, Layout, Reader, RecipeFiles, Target
from surgery.registry import Registry

OPS: Registry[type[Fields]] = Registry(
    "op",
    {
        "neurons": "surgery.edits.neurons:NeuronsFields",
        "heads": "surgery.edits.heads:HeadsFields",
        "sae": "surgery.edits.sae:SaeFields",
        "direction": "surgery.edits.direction:DirectionFields",
        "layers": "surgery.edits.layers:LayersFields",
        "merge": "surgery.edits.merge:MergeFields",
        "lm_head_spectrum": "surgery.edits.lm_head_spectrum:LmHeadSpectrumFields",
        "head_spectrum": "surgery.edits.head_spectrum:HeadSpectrumFields",
        "tensor": "surgery.edits.tensor:TensorFields",
        "low_rank": "surgery.edits.low_rank:LowRankFields",
        "lora": "surgery.edits.lora:LoraFields",
    },
)

__all__ = ["OPS", "Addition", "Edit", "Fields", "Layout", "Reader", "RecipeFiles", "Target"]
