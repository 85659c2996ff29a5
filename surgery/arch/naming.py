"""How one file spells the names of tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from surgery.arch.facts import ModuleFact


@dataclass(frozen=True)
class Naming:
    """`prefix` is what the file puts before the base model's names; `norms` how it calls the
    weight and bias of norms, where it does not call them so."""

    prefix: str
    norms: Mapping[str, str] = field(default_factory=dict)

    def tensor(
        self, module: ModuleFact, layer: int | None, kind: str, expert: int | None = None
    ) -> str:
        """The name under which a module's weight or bias is stored."""
        path = module.path.format(layer=layer, expert=expert)
        suffix = "bias" if module.type == "bias" else kind
        if module.type == "norm":
            suffix = self.norms.get(kind, kind)
        return f"{'' if module.root else self.prefix}{path}.{suffix}"
