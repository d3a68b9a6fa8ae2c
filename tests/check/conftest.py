from tests.data.conftest import make_datamodule

__all__ = ["make_datamodule"]  # a fixture
