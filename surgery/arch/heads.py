"""Which outputs of a projection are the queries, keys or values of one head.

A separate projection holds head after head, [heads, dh]. A fused one has one of two layouts:

- `blocks`: part after part by their sizes, [heads·dh ‖ kv_heads·dh ‖ kv_heads·dh]: GPT-2, MPT
  and Phi-3, and multi-query attention, which is this with one key-value head;
- `groups`: key-value head after key-value head, each with the queries that share it, its key and
  its value, [kv_heads, heads/kv_heads + 2, dh]: Falcon's new decoder and, with one query a group,
  the layout interleaved by head [heads, 3, dh] of GPT-NeoX, BLOOM and Falcon-RW.
"""

from __future__ import annotations

from collections.abc import Mapping

from surgery.arch.facts import ModuleFact
from surgery.arch.sizes import evaluate

PARTS = ("q", "k", "v")


def kv_group(head: int, sizes: Mapping[str, int]) -> int:
    """The key-value head that attention head `head` reads."""
    return head // (sizes["heads"] // sizes["kv_heads"])


def head_rows(module: ModuleFact, part: str, head: int, sizes: Mapping[str, int]) -> range:
    """The outputs of `module` that are `part` (q, k or v) of attention head `head`."""
    dim, group = sizes["head_dim"], kv_group(head, sizes)
    if module.parts and module.layout == "groups":
        queries = sizes["heads"] // sizes["kv_heads"]
        slot = {"q": head % queries, "k": queries, "v": queries + 1}[part]
        start = (group * (queries + 2) + slot) * dim
    else:
        start = part_start(module, part, sizes) + (head if part == "q" else group) * dim
    return range(start, start + dim)


def part_start(module: ModuleFact, part: str, sizes: Mapping[str, int]) -> int:
    """The first output of `part` of a projection in blocks; 0 for one that is not fused."""
    names = list(module.parts)
    before = names[: names.index(part)] if names else []
    return sum(evaluate(module.parts[name], sizes) for name in before)
