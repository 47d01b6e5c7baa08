"""The bundled model, or one of its shape, and an untrained small model for the rules that no answer decides."""

from tests.cli.conftest import model  # noqa: F401
