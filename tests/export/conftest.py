from __future__ import annotations

import pytest

from tests.models import Zoo, shared_zoo


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return shared_zoo(tmp_path_factory.mktemp("zoo"))
