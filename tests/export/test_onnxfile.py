"""Every bad ONNX file is refused in one line before a runtime opens it (hazards 17, 18, 20)."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from surgery.errors import OnnxError
from surgery.export import onnxfile
from surgery.process import Limits
from tests.onnx_files import TABLE, endless, enormous, externally, lookup, model, save


def refusal(path: Path, initializers: Path | None = None) -> str:
    with pytest.raises(OnnxError) as caught:
        onnxfile.read(path, initializers)
    text = str(caught.value)
    assert "\n" not in text
    assert text.isprintable()
    return text


@pytest.mark.parametrize("make", [lookup, endless, enormous])
def test_a_well_formed_file_is_read(tmp_path: Path, make: Callable[[], Any]) -> None:
    proto = make()
    assert onnxfile.read(save(proto, tmp_path / "m.onnx")) == proto


def test_external_data_is_left_on_disk(tmp_path: Path) -> None:
    found = onnxfile.read(externally(lookup(), tmp_path / "m.onnx"))
    assert not found.graph.initializer[0].raw_data


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "0 bytes"),
        (b"not protobuf at all", "not an ONNX"),
        (lookup().SerializeToString()[:-9], "not an ONNX file"),
        (b"\x08\x0a", "not an ONNX model"),
    ],
)
def test_empty_garbage_and_truncated_files(tmp_path: Path, data: bytes, reason: str) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(data)
    assert reason in refusal(path)


def test_missing_files_folders_and_fifos_do_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert "No such file" in refusal(tmp_path / "none.onnx")
    assert "not a regular file" in refusal(tmp_path)
    assert "not a regular file" in refusal(tmp_path / "fifo")


def test_a_file_over_2_gib_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    with path.open("wb") as file:
        file.truncate(2**31)
    assert "external data" in refusal(path)


def twice(proto: onnx.ModelProto) -> None:
    proto.graph.initializer.append(proto.graph.initializer[0])


def no_source(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].output[0] = "other"


def no_input(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].input[1] = "nowhere"


def cycle(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].output[0] = "a"
    proto.graph.node[0].input[1] = "b"
    proto.graph.node.append(helper.make_node("Identity", ["a"], ["b"]))
    proto.graph.node.append(helper.make_node("Identity", ["a"], ["logits"]))


def made_twice(proto: onnx.ModelProto) -> None:
    proto.graph.node.append(helper.make_node("Identity", ["table"], ["logits"]))


def new_opset(proto: onnx.ModelProto) -> None:
    proto.opset_import[0].version = 999


def new_domain(proto: onnx.ModelProto) -> None:
    proto.opset_import.append(helper.make_opsetid("evil.example", 1))


def not_imported(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].domain = "evil.example"


def unknown_op(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].op_type = "Gathre\x1b[31m"


def wrong_size(proto: onnx.ModelProto) -> None:
    proto.graph.initializer[0].dims[0] += 1


def negative_size(proto: onnx.ModelProto) -> None:
    proto.graph.initializer[0].dims[0] = -1


def unknown_type(proto: onnx.ModelProto) -> None:
    proto.graph.initializer[0].data_type = 99


def training(proto: onnx.ModelProto) -> None:
    proto.training_info.add()


def in_a_subgraph(proto: onnx.ModelProto) -> None:
    proto.CopyFrom(endless())
    proto.graph.node[1].attribute[0].g.node[1].input[0] = "nowhere"


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (twice, "initializer 'table' is given twice"),
        (no_source, "output 'logits' is made by no node"),
        (no_input, "'nowhere' of node 'Gather' is made nowhere"),
        (cycle, "'b' of node 'Gather' is made only later"),
        (made_twice, "value 'logits' is given twice"),
        (new_opset, "opset 999"),
        (new_domain, "unknown operator domain 'evil.example'"),
        (not_imported, "domain 'evil.example', not imported"),
        (unknown_op, r"unknown operator 'Gathre\x1b[31m'"),
        (wrong_size, "its shape needs 192 bytes, the file holds 176"),
        (negative_size, "negative size"),
        (unknown_type, "unknown element type 99"),
        (training, "training graphs"),
        (in_a_subgraph, "'nowhere' of node 'Add' is made nowhere"),
    ],
)
def test_a_broken_graph_is_refused_with_its_reason(
    tmp_path: Path, damage: Callable[[Any], None], reason: str
) -> None:
    proto = lookup()
    damage(proto)
    assert reason in refusal(save(proto, tmp_path / "m.onnx"))


def test_functions_of_the_model_are_known_operators(tmp_path: Path) -> None:
    proto = lookup()
    own, ops = [helper.make_opsetid("local", 1)], [helper.make_opsetid("", 20)]
    body = [helper.make_node("Identity", ["x"], ["y"])]
    proto.functions.append(helper.make_function("local", "Same", ["x"], ["y"], body, ops))
    proto.opset_import.extend(own)
    proto.graph.node[0].output[0] = "rows"
    proto.graph.node.append(helper.make_node("Same", ["rows"], ["logits"], domain="local"))
    onnxfile.read(save(proto, tmp_path / "m.onnx"))
    proto.functions[0].node[0].input[0] = "z"
    assert "'z' of node 'Identity' is made nowhere" in refusal(save(proto, tmp_path / "m.onnx"))


def test_a_file_that_onnxruntime_saved_is_read(tmp_path: Path) -> None:
    """It declares every domain that ONNX Runtime knows; no node may be of one all the same."""
    import onnxruntime

    options, path = onnxruntime.SessionOptions(), tmp_path / "saved.onnx"
    options.optimized_model_filepath, options.log_severity_level = str(path), 3
    data = save(lookup(), tmp_path / "m.onnx").read_bytes()
    onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    proto = onnxfile.read(path)
    assert "com.microsoft.nchwc" in {opset.domain for opset in proto.opset_import}
    proto.graph.node[0].domain = "com.microsoft.nchwc"
    assert "unknown operator" in refusal(save(proto, tmp_path / "n.onnx"))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"location": "../weights.bin"}, "expected a relative path"),
        ({"location": "a/../weights.bin"}, "expected a relative path"),
        ({"location": "/etc/passwd"}, "expected a relative path"),
        ({"location": "C:weights.bin"}, "expected a relative path"),
        ({"location": "..\\weights.bin"}, "expected a relative path"),
        ({"location": ""}, "expected a relative path"),
        ({"location": "none.bin"}, "No such file"),
        ({"location": "folder"}, "not a regular file"),
        ({"location": "link.bin"}, "goes through a link"),
        ({"location": "linked/weights.bin"}, "goes through a link"),
        ({"location": "hard.bin"}, "hard link"),
        ({"offset": "-4"}, "expected a whole number"),
        ({"offset": "1e3"}, "expected a whole number"),
        ({"offset": "9" * 400}, "expected a whole number"),
        ({"offset": "4"}, "which has only 176 bytes"),
        ({"length": "175"}, "external data has 175"),
        ({"length": "-1"}, "expected a whole number"),
        ({"basepath": "x"}, "key 'basepath'"),
    ],
)
def test_bad_external_data_is_refused(tmp_path: Path, fields: dict[str, str], reason: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    other = tmp_path / "other.bin"
    other.write_bytes(TABLE.tobytes())
    (tmp_path / "link.bin").symlink_to("other.bin")
    (tmp_path / "linked").symlink_to(".")
    os.link(other, tmp_path / "hard.bin")
    text = refusal(externally(lookup(), tmp_path / "m.onnx", **fields))
    assert reason in text
    assert "'table'" in text


def test_external_data_hidden_in_sparse_and_nested_tensors_is_found(tmp_path: Path) -> None:
    def outside(name: str, shape: tuple[int, ...]) -> TensorProto:
        kind = TensorProto.INT64 if name == "indices" else TensorProto.FLOAT
        tensor = TensorProto(name=name, data_type=kind, dims=shape)
        tensor.data_location = TensorProto.EXTERNAL
        entry = tensor.external_data.add()
        entry.key, entry.value = "location", "../secret"
        return tensor

    sparse = lookup()
    values = numpy_helper.from_array(np.ones(1, np.float32), "values")
    sparse.graph.sparse_initializer.append(
        helper.make_sparse_tensor(values, outside("indices", (1,)), [9])
    )
    assert "'indices'" in refusal(save(sparse, tmp_path / "sparse.onnx"))
    nested = endless()
    constant = helper.make_node("Constant", [], ["c"], value=outside("hidden", (2,)))
    nested.graph.node[1].attribute[0].g.node.append(constant)
    assert "'hidden'" in refusal(save(nested, tmp_path / "nested.onnx"))


def test_external_data_may_lie_in_a_folder_that_is_named(tmp_path: Path) -> None:
    weights, graphs = tmp_path / "weights", tmp_path / "graphs"
    weights.mkdir()
    graphs.mkdir()
    externally(lookup(), weights / "m.onnx").rename(graphs / "m.onnx")
    assert "No such file" in refusal(graphs / "m.onnx")
    onnxfile.check(graphs / "m.onnx", initializers=weights, session=True)


def test_all_three_readers_must_accept_a_file(tmp_path: Path) -> None:
    onnxfile.check(save(lookup(), tmp_path / "good.onnx"), session=True)
    cast = helper.make_node("Cast", ["input_ids"], ["logits"])
    with pytest.raises(OnnxError, match=r"onnx\.checker: .*'to' is missing"):
        onnxfile.check(save(model([cast], ["input_ids"], "logits", []), tmp_path / "a.onnx"))
    same = helper.make_node("Sqrt", ["input_ids"], ["logits"])
    mistyped = save(model([same], ["input_ids"], "logits", []), tmp_path / "b.onnx")
    onnxfile.check(mistyped)
    with pytest.raises(OnnxError, match="onnxruntime"):
        onnxfile.check(mistyped, session=True)
    with pytest.raises(OnnxError, match=r"onnx\.checker"):
        onnxfile.check(mistyped, full=True)


def test_a_checker_that_runs_out_of_time_has_refused(tmp_path: Path) -> None:
    path = save(lookup(), tmp_path / "m.onnx")
    with pytest.raises(OnnxError, match=r"m\.onnx: was refused: timeout"):
        onnxfile.check(path, limits=Limits(0.05))
