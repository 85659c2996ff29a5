"""From the whole graph to the least of it that fails, and the nearest that does not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.localize.segments import same
from surgery.localize.trial import CLOSENESS
from surgery.repro.caches import is_cache, real
from surgery.repro.healing import nearest
from surgery.repro.parts import renamed, typed
from surgery.repro.runs import every_value, outputs, problem
from surgery.repro.shrinking import Case, shrunk
from surgery.repro.side import Side

Array = NDArray[Any]
Arrays = dict[str, Array]


WELL = 4
"""A changed model must be this many times better than it need be."""


class Reduction:
    """Of one site of a graph on one batch; `sites` holds PyTorch's values, `limit` is the error
    allowed.

    inputs: a run of `caches.fed`; strict: the site is an output of the model, whose name, type and
    padding count too.
    """

    def __init__(
        self,
        theirs: Side,
        fresh: Side | None,
        site: str,
        inputs: Arrays,
        sites: Arrays,
        limit: float,
        strict: bool,
    ) -> None:
        self._theirs, self._fresh, self._site, self._strict = theirs, fresh, site, strict
        self._sites = {name: array for name, array in sites.items() if name != site}
        self._batch = inputs
        self._value = theirs.value(site)
        self._known = theirs.known(self._sites, inputs)
        self._inputs = theirs.feed(inputs) | self._known
        self._expected = self._wanted(sites[site], limit)
        self._twins: dict[str, str] = {}

    def _wanted(self, value: Array, limit: float) -> Arrays:
        own = real(self._site, value, self._batch)
        finite: Array = np.isfinite(value.reshape(*own.shape, -1)).min(axis=-1)
        if not self._strict:
            finite = own
        name = self._site if self._strict else self._value
        return {
            "name": np.array(name),
            "value": value,
            "real": own,
            "finite": finite,
            "limit": np.array(limit),
            "strict": np.array(self._strict),
        }

    def run(self) -> tuple[Case, str, str] | None:
        """The case, what is wrong, and what is otherwise in the passing model; None where nothing
        is wrong."""
        whole = self._part(())
        self._shape(whole)
        kind = problem(whole, self._inputs, self._expected)
        stops = self._stops()
        edges = problem(self._part(stops), self._inputs, self._expected)
        kind = edges if edges and not self._strict else kind
        if not kind:
            return None
        shows = self._shows(kind)
        known = self._matched(stops)
        self._inputs |= known
        cuts = [*stops, *known]
        count = last_failing(
            len(cuts), lambda n: shows(Case(self._part(cuts[:n]), None, *self._io))
        )
        case = Case(self._part(cuts[:count]), None, *self._io)
        own = self._counterpart(cuts[:count])
        case = replace(case, inputs=dict(self._inputs))
        strict = {**case.expected, "limit": case.expected["limit"] / WELL}
        well = self._right(replace(case, expected=strict))
        healed = nearest(case.failing, own, self._strict, well, self._right(case))
        words, passing = healed or ("", None)
        case = replace(case, passing=passing)
        rows, length = self._batch["input_ids"].shape
        case = shrunk(case, rows, length, lambda each: shows(each) and self._passes(each))
        return self._finished(case), kind, words

    @property
    def _io(self) -> tuple[Arrays, Arrays]:
        return self._inputs, self._expected

    def _part(self, stops: Sequence[str]) -> Any:
        part = self._theirs.cut(self._site, stops)
        output = part.graph.output[0].name
        name = str(self._expected["name"])
        renames = self._strict and output != name and self._renames
        return renamed(part, {output: name}) if renames else part

    @property
    def _renames(self) -> bool:
        """Whether a run takes the graph's own output for the one asked for, whatever its name."""
        if is_cache(self._site):
            return self._site in self._theirs.values
        fed = outputs(self._theirs.cut(self._site, ()), self._inputs).get(self._value)
        return fed is not None and fed.ndim == 3

    def _shape(self, whole: Any) -> None:
        """Within a graph, what PyTorch gives is compared in the shape it has there."""
        if self._strict:
            return
        found = outputs(whole, self._inputs).get(self._value)
        value, own = self._expected["value"], self._expected["real"]
        if found is not None and found.size == value.size and found.shape != value.shape:
            spread = np.broadcast_to(
                own.reshape(*own.shape, *[1] * (value.ndim - own.ndim)), value.shape
            )
            self._expected["value"] = value.reshape(found.shape)
            own = spread.reshape(found.shape)
            self._expected |= {"real": own, "finite": own}

    def _stops(self) -> list[str]:
        """The values before the site at which PyTorch's are known, in the graph's order."""
        order = {n: i for i, node in enumerate(self._theirs.model.graph.node) for n in node.output}
        end = order.get(self._value, 0)
        before = [name for name in self._known if order.get(name, end) < end]
        return sorted(before, key=lambda name: order[name])

    def _shows(self, kind: str) -> Callable[[Case], bool]:
        return lambda case: problem(case.failing, case.inputs, case.expected) == kind

    def _passes(self, case: Case) -> bool:
        return case.passing is None or not problem(case.passing, case.inputs, case.expected)

    def _right(self, case: Case) -> Callable[[Any], bool]:
        return lambda model: not problem(model, case.inputs, case.expected)

    def _matched(self, stops: Sequence[str]) -> Arrays:
        """Values between those of PyTorch that a fresh graph has too, with its numbers."""
        if self._fresh is None or self._site not in self._fresh.values:
            return {}
        mine = every_value(self._part(stops), self._inputs)
        known = self._fresh.known(self._sites, self._batch)
        self._fresh_inputs = self._fresh.feed(self._batch) | known
        ours = every_value(self._fresh.cut(self._site, list(known)), self._fresh_inputs)
        fixed = self._constant(self._part(stops))
        found: Arrays = {}
        for name, array in mine.items():
            alike = array.ndim >= 2 and name not in fixed and name != str(self._expected["name"])
            twin = _twin(array, ours) if alike else None
            if twin is not None and np.isfinite(ours[twin].astype(np.float64)).all():
                found[name], self._twins[name] = ours[twin], twin
        return found

    def _constant(self, part: Any) -> set[str]:
        fixed = {tensor.name for tensor in part.graph.initializer}
        for node in part.graph.node:
            if all(name in fixed for name in node.input if name):
                fixed |= set(node.output)
        return fixed

    def _counterpart(self, stops: Sequence[str]) -> Any | None:
        """The same part of the fresh graph, its inputs under the names they have in the failing
        one."""
        fresh = self._fresh
        if fresh is None or self._site not in fresh.values or not hasattr(self, "_fresh_inputs"):
            return None
        sites = {value: site for site, value in self._theirs.values.items()}
        names = {fresh.values[sites[n]]: n for n in stops if sites.get(n) in fresh.values}
        names |= {self._twins[name]: name for name in stops if name in self._twins}
        part = fresh.cut(self._site, list(names))
        read = {port.name for port in part.graph.input}
        names = {own: name for own, name in names.items() if own in read and self._fit(own, name)}
        for own in read - set(names):
            array = self._fresh_inputs[own]
            clash = own in self._inputs and not np.array_equal(self._inputs[own], array)
            names[own] = f"fresh input/{own}" if clash else own
            self._inputs[names[own]] = array
        names[part.graph.output[0].name] = str(self._expected["name"])
        return renamed(part, names)

    def _fit(self, own: str, name: str) -> bool:
        """Whether a value has one shape in both graphs: a batch may be flattened in one."""
        known = self._fresh_inputs.get(own)
        return known is None or known.shape == self._inputs[name].shape

    def _finished(self, case: Case) -> Case:
        """Without inputs that nobody reads, and with what is left declared."""
        read = {port.name for model in case.models() for port in model.graph.input}
        for model in case.models():
            typed(model, {**case.inputs, **outputs(model, case.inputs)})
        inputs = {name: array for name, array in sorted(case.inputs.items()) if name in read}
        return replace(case, inputs=inputs)


def _twin(array: Array, others: Mapping[str, Array]) -> str | None:
    for name, other in others.items():
        alike = other.shape == array.shape and other.dtype == array.dtype
        if alike and same(array, other, CLOSENESS[0]):
            return name
    return None


def last_failing(count: int, fails: Callable[[int], bool]) -> int:
    """The largest of 0 … `count` that fails, by halves; 0 is taken to."""
    if fails(count):
        return count
    low, high = 0, count
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fails(middle) else (low, middle)
    return low
