"""One graph, a foreign one or our fresh one, with what is known of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from surgery.export import onnxfile
from surgery.export.tasks import find_task
from surgery.localize.graphs import observed
from surgery.repro.parts import cut
from surgery.runtimes import graph

Array = NDArray[Any]
Arrays = dict[str, Array]


@dataclass(frozen=True)
class Side:
    """One graph with what is known of it: the value at each site."""

    model: Any
    folder: Path
    signature: graph.Signature
    values: Mapping[str, str]

    @classmethod
    def open(cls, given: Mapping[str, Any], task: str) -> Side:
        path, folder = Path(given["path"]), Path(given["folder"])
        model = onnxfile.read(path, folder)
        signature = graph.signature(model, find_task(task).output, str(path))
        return cls(model, folder, signature, given["values"])

    def feed(self, inputs: Mapping[str, Array]) -> Arrays:
        return graph.feed(self.signature.ports, self.signature.roles, dict(inputs))

    def cut(self, site: str, stops: Sequence[str]) -> Any:
        return cut(self.model, self.values[site], stops, self.folder)

    def known(self, sites: Mapping[str, Array], inputs: Mapping[str, Array]) -> Arrays:
        """PyTorch's values by the graph's names, in the shapes they have there."""
        mine = {self.values[site]: array for site, array in sites.items() if site in self.values}
        found = self._run(list(mine), inputs)
        return {
            name: array.reshape(found[name].shape)
            if name in found and found[name].size == array.size
            else array
            for name, array in mine.items()
        }

    def _run(self, values: Sequence[str], inputs: Mapping[str, Array]) -> Arrays:
        from surgery.runtimes.session import open_session

        try:
            shown = observed(self.model, values).SerializeToString()
            session = open_session(shown, self.folder, 1, level="disabled")
            return dict(zip(values, session.run(list(values), self.feed(inputs)), strict=True))
        except Exception:  # it is there because something fails
            return {}
