"""One graph, a foreign one or our fresh one, with what is known of it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.export import onnxfile
from surgery.export.tasks import find_task
from surgery.localize.graphs import FORCED, observed
from surgery.repro.caches import is_cache
from surgery.repro.parts import cut
from surgery.repro.runs import outputs
from surgery.runtimes import graph

Array = NDArray[Any]
Arrays = dict[str, Array]


@dataclass(frozen=True)
class Side:
    """One graph with what is known of it: the value at each site, caches that it gives among
    them."""

    model: Any
    folder: Path
    signature: graph.Signature
    values: Mapping[str, str]

    @classmethod
    def open(cls, given: Mapping[str, Any], task: str) -> Side:
        path, folder = Path(given["path"]), Path(given["folder"])
        model = onnxfile.read(path, folder)
        signature = graph.signature(model, find_task(task).output, str(path))
        return cls(model, folder, signature, given["values"] | _caches(model, signature))

    def value(self, site: str) -> str:
        """What the graph has at a site; of an output that it has not, another that stands at
        none, or else its first."""
        given = [value.name for value in self.model.graph.output]
        others = [name for name in given if name not in self.values.values()]
        return self.values.get(site) or [*others, *given][0]

    def feed(self, inputs: Mapping[str, Array]) -> Arrays:
        """The graph's inputs for a run of `caches.fed`; caches that are not given hold zeros, as
        many as the mask has positions more than there are ids."""
        rows, length = inputs["input_ids"].shape
        before = inputs["attention_mask"].shape[1] - length
        past = {}
        for link in self.signature.links:
            port = next(port for port in self.signature.ports if port.name == link.past)
            empty = np.zeros((rows, port.shape[1] or 0, before, port.shape[3] or 0), np.float32)
            past[link.past] = inputs.get(link.name, empty)
        return graph.feed(self.signature.ports, self.signature.roles, dict(inputs), past)

    def cut(self, site: str, stops: Sequence[str]) -> Any:
        return cut(self.model, self.value(site), stops, self.folder)

    def known(self, sites: Mapping[str, Array], inputs: Mapping[str, Array]) -> Arrays:
        """PyTorch's values by the graph's names, in the shapes they have there; of a graph that
        does not run, in their own."""
        mine = {self.values[site]: array for site, array in sites.items() if site in self.values}
        found = self._run(mine, inputs)
        return {
            name: array.reshape(found[name].shape) if name in found else array
            for name, array in mine.items()
            if name not in found or found[name].size == array.size
        }

    def introduced(self, sites: Mapping[str, Array], inputs: Mapping[str, Array]) -> Arrays:
        """What the graph makes at each site from PyTorch's values at all before it, in PyTorch's
        shapes, in the graph's order."""
        known = self.known(sites, inputs)
        found = self._run(known, inputs, known)
        order = {name: at for at, name in enumerate(self._order())}
        mine = [
            (site, found[value].reshape(sites[site].shape))
            for site, value in self.values.items()
            if value in found and found[value].size == sites[site].size
        ]
        return dict(sorted(mine, key=lambda pair: order.get(self.values[pair[0]], -1)))

    def _order(self) -> Iterable[str]:
        return (name for node in self.model.graph.node for name in node.output)

    def _run(
        self,
        values: Collection[str],
        inputs: Mapping[str, Array],
        given: Mapping[str, Array] | None = None,
    ) -> Arrays:
        """`values` of a run, with what is `given` read in their place; nothing where it fails."""
        forced = dict(given or {})
        fed = self.feed(inputs) | {FORCED + name: array for name, array in forced.items()}
        found = outputs(observed(self.model, values, forced), fed, self.folder)
        return {name: found[name] for name in values if name in found}


def _caches(model: Any, signature: graph.Signature) -> dict[str, str]:
    """Optimum's names of the caches that a graph gives to what it calls them."""
    names = {link.present: link.name for link in signature.links}
    given = {names.get(value.name, value.name): value.name for value in model.graph.output}
    return {name: value for name, value in given.items() if is_cache(name)}
