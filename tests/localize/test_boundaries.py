"""The boundaries of graphs: of tiny ones by hand, and of every exporter's the same."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
from onnx import parser

from surgery.arch import identify
from surgery.arch.roles import Role
from surgery.checkpoint import Checkpoint
from surgery.export import default_task
from surgery.export.lineage import trace
from surgery.localize.boundaries import find_boundaries, owners_of
from tests.export.test_lineage_faults import torch_export
from tests.localize.campaign import FAMILIES, VOCAB
from tests.models import MODELS, Zoo

HEAD = '<ir_version: 8, opset_import: ["": 20]> g (float[B, L, 4] x) => (float[B, L, 4] y)'


def graph(weights: str, nodes: str) -> Any:
    text = f"{HEAD} <{weights}> {{ {nodes} }}"
    return parser.parse_model(text).graph


def facts(**types: str) -> Any:
    """An architecture whose roles have these module types."""
    modules = {role: SimpleNamespace(type=kind) for role, kind in types.items()}
    tie = SimpleNamespace(embed="embed", head="lm_head")
    return SimpleNamespace(facts=SimpleNamespace(modules=modules, tie=tie, scaled_embedding=False))


def sites(found: Any, owners: dict[str, Role], arch: Any) -> dict[str, str]:
    return {b.site: b.value for b in find_boundaries(found, owners, arch)}


NORM = Role("mlp_norm", 0, "weight")
DECOMPOSED = """
    h = Mul(x, x)
    two = Constant <value_float = 2.0> ()
    p = Pow(h, two)
    m = ReduceMean(p)
    r = Sqrt(m)
    n = Div(h, r)
    y = Mul(n, w)
"""


def test_a_norm_taken_apart_begins_where_all_it_computes_comes_from() -> None:
    found = sites(
        graph("float[4] w = {1, 1, 1, 1}", DECOMPOSED), {"w": NORM}, facts(mlp_norm="norm")
    )
    assert found == {"stream before mlp_norm.0": "h", "mlp_norm.0": "y"}


def test_a_norm_in_one_operator_reads_the_stream() -> None:
    nodes = "h = Mul(x, x) y = LayerNormalization(h, w)"
    found = sites(graph("float[4] w = {1, 1, 1, 1}", nodes), {"w": NORM}, facts(mlp_norm="norm"))
    assert found == {"stream before mlp_norm.0": "h", "mlp_norm.0": "y"}


def test_what_is_made_of_a_weight_alone_is_still_the_weight() -> None:
    """Transposed and cast before it is used, the bias added after a reshape."""
    nodes = """
        t = Transpose(w)
        c = Cast <to = 1> (t)
        p = MatMul(x, c)
        q = Identity(p)
        y = Add(q, b)
    """
    weights = "float[1, 1] w = {1}, float[1] b = {1}"
    owners = {"w": Role("o_proj", 1, "weight"), "b": Role("o_proj", 1, "bias")}
    found = sites(graph(weights, nodes), owners, facts(o_proj="linear"))
    assert found == {"o_proj.1": "y"}  # its input is the graph's own


def test_what_heads_give_is_a_boundary_and_a_later_use_is_not() -> None:
    nodes = "h = Relu(x) p = MatMul(h, w) q = Relu(p) y = MatMul(q, w)"
    owners = {"w": Role("down_proj", 0, "weight")}
    found = sites(graph("float[1, 1] w = {1}", nodes), owners, facts(down_proj="linear"))
    assert found == {"down_proj.0 input": "h", "down_proj.0": "p"}


def test_one_table_is_embedding_and_head_by_how_it_is_used() -> None:
    nodes = """
        i = Cast <to = 7> (x)
        e = Gather(w, i)
        t = Transpose(w)
        y = MatMul(e, t)
    """
    owners = {"w": Role("embed", None, "weight")}
    arch = facts(embed="embedding", lm_head="linear")
    assert sites(graph("float[1, 1] w = {1}", nodes), owners, arch) == {
        "embed": "e",
        "lm_head": "y",
    }


def test_experts_have_no_boundary() -> None:
    owners = {"w": Role("expert_down_proj", 0, "weight", 1)}
    arch = facts(expert_down_proj="linear")
    assert not sites(graph("float[1, 1] w = {1}", "y = MatMul(x, w)"), owners, arch)


def test_a_graph_without_any_owner_has_no_boundary() -> None:
    assert not sites(graph("float[1] w = {1}", "y = Mul(x, w)"), {}, facts())


# ------------------------------------------------------------------------------- real exporters


def boundaries(path: Path, source: Path) -> dict[str, str]:
    lineage = trace(path, source)
    arch = identify(Checkpoint.open(source))
    owners = owners_of(((row.name, row.tensors) for row in lineage.rows), arch)
    model = onnx.load(str(path), load_external_data=False)
    return sites(model.graph, owners, arch)


def check(zoo: Zoo, model: str, folder: Path) -> None:
    """The same sites in every export, and one for the output of every stored matrix."""
    fields = {"vocab_size": VOCAB, **FAMILIES.get(model, {})}  # those that faults are planted in
    source = zoo.checkpoint(model, **fields)
    task = default_task(source).name
    portable = boundaries(zoo.onnx(model, task, **fields), source)
    linked_model = zoo.onnx(model, task, layout="linked", **fields)
    assert list(boundaries(linked_model, linked_model.parent)) == list(portable)
    arch = identify(Checkpoint.open(source))
    optional = {role for role, fact in arch.facts.modules.items() if fact.optional}
    for role in arch.roles.values():
        if role.expert is None and "expert" not in role.role and role.role not in optional:
            named = role.role if role.layer is None else f"{role.role}.{role.layer}"
            assert named in portable, named
    assert len(set(portable.values())) == len(portable)
    if "expert" not in " ".join(arch.facts.modules):  # PyTorch's own exporter cannot take these
        theirs = boundaries(torch_export(source, folder / "torch.onnx"), source)
        # It was traced at one length, so rows of positions and types are looked up beforehand.
        tables = {role for role, fact in arch.facts.modules.items() if fact.type == "embedding"}
        assert set(theirs) <= set(portable)
        assert set(portable) - set(theirs) <= tables - {"embed"}


@pytest.mark.parametrize("model", ["gpt2", "llama", "gemma2", "bert"])
def test_every_exporter_has_the_same_boundaries(zoo: Zoo, model: str, tmp_path: Path) -> None:
    check(zoo, model, tmp_path)


@pytest.mark.campaign
@pytest.mark.parametrize("model", MODELS)
def test_every_family_has_the_same_boundaries_by_every_exporter(
    zoo: Zoo, model: str, tmp_path: Path
) -> None:
    check(zoo, model, tmp_path)


def test_a_bias_added_with_an_activation_leaves_no_output_of_the_module() -> None:
    """What `BiasGelu` gives is the activation's; PyTorch's projection gives what comes before."""
    roles = {"w": Role("up_proj", 0, "weight"), "b": Role("up_proj", 0, "bias")}
    weights = "float[4, 4] w, float[4] b"
    plain = graph(weights, "m = MatMul(x, w) y = Add(m, b)")
    fused = graph(weights, "m = MatMul(x, w) y = com.microsoft.BiasGelu(m, b)")
    arch = facts(up_proj="linear")
    assert sites(plain, roles, arch) == {"up_proj.0": "y"}
    assert sites(fused, roles, arch) == {}


@pytest.mark.parametrize(("kind", "value"), [("BFLOAT16", "wide"), ("FLOAT", "rows")])
def test_rows_of_a_narrow_table_are_seen_in_the_type_that_is_computed_in(
    kind: str, value: str
) -> None:
    """ONNX Runtime gives no bfloat16 to Python; a cast of another table may be the fault itself."""
    nodes = "ids = Cast <to = 7> (x) rows = Gather(t, ids) wide = Cast <to = 1> (rows)"
    found = graph("float[4, 4] unused", f"{nodes} y = Relu(wide)")
    dtype = onnx.TensorProto.DataType.Value(kind)
    found.initializer.append(onnx.helper.make_tensor("t", dtype, [4, 4], [0.0] * 16))
    owners = {"t": Role("embed", None, "weight")}
    assert sites(found, owners, facts(embed="embedding")) == {"embed": value}
