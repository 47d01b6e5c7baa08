"""One clear line when the optional packages of reports are not installed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from tokensieve.errors import MissingExtra


@contextmanager
def needs_report_extra() -> Iterator[None]:
    """Turn a failed import inside the block into a :class:`MissingExtra` with the command that installs it."""
    try:
        yield
    except ImportError as error:
        raise MissingExtra(f"reports need {error.name}", "report") from None


def check_report_extra() -> None:
    """Raise :class:`MissingExtra` now, before hours of work, if a package is not installed."""
    with needs_report_extra():
        for name in ("jinja2", "matplotlib"):
            if find_spec(name) is None:
                raise ImportError(name=name)
