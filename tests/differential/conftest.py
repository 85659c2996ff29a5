"""What the tests of the differential run share: clean cases, and defects planted in copies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from corners import Here
from differential.lab import Lab


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    root = tmp_path_factory.mktemp("lab")
    return Lab(root, Here(root / "cache"))


Plant = Callable[..., Path]


@pytest.fixture
def plant(tmp_path: Path) -> Plant:
    """`plant(onnx_file, defect, ...)`: a copy of the file with the defects in it."""

    def make(source: Path, *defects: Callable[[onnx.ModelProto], None]) -> Path:
        model = onnx.load(str(source))
        for defect in defects:
            defect(model)
        target = tmp_path / f"defect-{len(list(tmp_path.iterdir()))}.onnx"
        onnx.save(model, str(target))
        return target

    return make
