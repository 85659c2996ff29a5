"""What stored tensors are: their roles, and how they stand to the residual stream."""

from __future__ import annotations

from dataclasses import dataclass

from surgery.addresses import Region


@dataclass(frozen=True)
class Role:
    """What one stored tensor is: `kind` is `weight` or `bias`; `layer` is None outside blocks,
    `expert` but in the modules of one."""

    role: str
    layer: int | None
    kind: str
    expert: int | None = None

    def __str__(self) -> str:
        layer = "" if self.layer is None else f".{self.layer}"
        expert = "" if self.expert is None else f".{self.expert}"
        return f"{self.role}{layer}{expert}.{self.kind}"


@dataclass(frozen=True)
class Writer:
    """A tensor that writes to the residual stream; `axis` is the one of residual width.

    `norm` is the role of the norm that what it writes goes through, if there is one.
    """

    tensor: str
    axis: int
    norm: str | None = None


@dataclass(frozen=True)
class Reader:
    """A matrix that reads the residual stream; `axis` is the one of residual width.

    `norm` is the role of the norm between the stream and the matrix, if there is one.
    """

    tensor: str
    axis: int
    norm: str | None = None


@dataclass(frozen=True)
class Band:
    """Some outputs of a projection: a region of its weight or bias, and the axis they lie along."""

    region: Region
    axis: int


@dataclass(frozen=True)
class BiasSlot:
    """Where a bias is or, with `config_key`, would be once the config turns it on."""

    tensor: str
    config_key: str | None = None
