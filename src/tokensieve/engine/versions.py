"""Which transformers the hooks are tested with: what this package's own requirement says."""

from __future__ import annotations

import warnings
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement


def warn_if_untested() -> None:
    """One line where the installed transformers is outside of the range; it may well work, but nobody has looked."""
    installed = version("transformers")
    try:
        stated = [Requirement(line) for line in requires("tokensieve") or []]
    except PackageNotFoundError:  # run from a checkout: nothing is stated
        return
    for requirement in stated:
        if requirement.name == "transformers" and not requirement.specifier.contains(installed, prereleases=True):
            warnings.warn(
                f"transformers {installed} is not among the versions that Tokensieve is tested with "
                f"({requirement.specifier}); `tokensieve check` tells whether the laws hold on your model",
                stacklevel=3,
            )
