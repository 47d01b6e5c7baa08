"""How many tokens to keep: an int is tokens per image, a float in (0, 1] a share of the image's tokens."""

from typing import TypeAlias

Budget: TypeAlias = int | float


def check_budget(keep: Budget) -> Budget:
    """Return ``keep`` unchanged if it is a budget; raise ``ValueError`` naming what is allowed otherwise."""
    allowed = "a whole number of tokens >= 1, or a share in (0, 1]"
    if isinstance(keep, bool) or not isinstance(keep, int | float):
        raise ValueError(f"keep must be {allowed}; got {keep!r}")
    if (keep < 1) if isinstance(keep, int) else not 0 < keep <= 1:
        raise ValueError(f"keep must be {allowed}; got {keep}")
    return keep


def parse_budget(text: str) -> Budget:
    """Read a budget as a user types it: ``64`` is tokens, ``0.25`` and ``1.0`` are shares, ``25%`` too."""
    try:
        if text.endswith("%"):
            return check_budget(float(text[:-1]) / 100)
        return check_budget(float(text) if any(c in text.lower() for c in ".en") else int(text))
    except ValueError as error:
        if "keep must be" in str(error):
            raise
        raise ValueError(f"keep must be a whole number of tokens or a share in (0, 1]; got {text!r}") from None


def count(keep: Budget, total: int) -> int:
    """Tokens that ``keep`` leaves of an image of ``total`` tokens: at least 1, at most ``total``."""
    wanted = keep if isinstance(keep, int) else round(keep * total)
    return min(max(wanted, 1), total)
