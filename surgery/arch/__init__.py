"""Model families: facts as JSON, one file each, and `identify`, which maps a checkpoint to one."""

from surgery.arch.families import FAMILIES
from surgery.arch.identification import extend, identify, widened
from surgery.arch.interface import Architecture
from surgery.arch.roles import Band, BiasSlot, Reader, Role, Writer

__all__ = [
    "FAMILIES",
    "Architecture",
    "Band",
    "BiasSlot",
    "Reader",
    "Role",
    "Writer",
    "extend",
    "identify",
    "widened",
]
