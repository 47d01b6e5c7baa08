"""Check that converted weights are those of a model."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from tokensieve.errors import Refusal

LISTED = 5  # most names per kind of fault in an error


def check_fit(converted: Mapping[str, Tensor], expected: Mapping[str, Tensor], model: str) -> None:
    """Refuse weights that are missing, unexpected or of another shape, all in one error.

    Args:
        converted, expected: weights by name; of the latter, shapes alone are read.
        model: the class that they are for.

    Raises:
        Refusal: with the kind, number and first names of the faults.
    """
    shared = converted.keys() & expected.keys()
    misshapen = [
        f"{name} is {list(converted[name].shape)}, not {list(expected[name].shape)}"
        for name in sorted(shared)
        if converted[name].shape != expected[name].shape
    ]
    faults = {
        "missing": sorted(expected.keys() - converted.keys()),
        "unexpected": sorted(converted.keys() - expected.keys()),
        "of another shape": misshapen,
    }
    reports = [
        f"{len(names)} {fault}: {', '.join(names[:LISTED])}{', …' if len(names) > LISTED else ''}"
        for fault, names in faults.items()
        if names
    ]
    if reports:
        raise Refusal(f"the checkpoint does not fit {model}: {'; '.join(reports)}")
