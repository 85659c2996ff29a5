from tests.localize.conftest import bases

__all__ = ["bases"]
