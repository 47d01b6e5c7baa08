"""The transformers releases that the families are tested with, read from this package's own requirement."""

from __future__ import annotations

import warnings
from functools import cache
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet


@cache
def tested_range() -> SpecifierSet | None:
    """Return the tested range of transformers releases; ``None`` in a checkout that is not installed."""
    try:
        requirements = [Requirement(line) for line in requires("tokensieve") or []]
    except PackageNotFoundError:
        return None
    return next((entry.specifier for entry in requirements if entry.name == "transformers"), None)


def warn_if_untested() -> None:
    """Warn in one line if the installed transformers is outside of the tested range; it may work all the same."""
    installed, tested = version("transformers"), tested_range()
    if tested is not None and not tested.contains(installed, prereleases=True):
        warnings.warn(
            f"transformers {installed} is not among the versions that Tokensieve is tested with "
            f"({tested}); `tokensieve check` runs the equivalence checks (laws) on your model",
            stacklevel=3,
        )


TESTED = next((entry.version for entry in tested_range() or () if entry.operator == ">="), "unknown")
"""The oldest transformers release that the families are tested with, such as "5.23"."""
