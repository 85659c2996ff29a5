"""The safetensors folder: strict reading, byte-preserving staged writing, receipts."""

from surgery.checkpoint.folder import (
    CONFIG,
    EXPORT_RECEIPT,
    INDEX,
    LINEAGE,
    RECEIPT,
    SINGLE,
    Checkpoint,
)
from surgery.checkpoint.header import Header, TensorInfo
from surgery.checkpoint.staging import Staging
from surgery.checkpoint.tensorfile import TensorFile

__all__ = [
    "CONFIG",
    "EXPORT_RECEIPT",
    "INDEX",
    "LINEAGE",
    "RECEIPT",
    "SINGLE",
    "Checkpoint",
    "Header",
    "Staging",
    "TensorFile",
    "TensorInfo",
]
