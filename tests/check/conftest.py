"""The data module of the tests of data."""

from tests.data.conftest import make_datamodule  # noqa: F401
