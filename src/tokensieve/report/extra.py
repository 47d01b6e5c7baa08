"""The one line a user reads when the optional packages of reports are absent."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from tokensieve.errors import MissingExtra


@contextmanager
def needs_report_extra() -> Iterator[None]:
    """Turn a failed import inside the block into an ImportError that says what to install."""
    try:
        yield
    except ImportError as error:
        raise MissingExtra(f'reports need {error.name}: pip install "tokensieve[report]"') from None


def check_report_extra() -> None:
    """Raise that ImportError now, before hours of work, if the packages are absent."""
    with needs_report_extra():
        for name in ("jinja2", "matplotlib"):
            if find_spec(name) is None:
                raise ImportError(name=name)
