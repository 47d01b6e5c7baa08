"""Objects of a harness, as far as Tokensieve reads them."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from tokensieve.harness.attached import Counts


@dataclass
class Request:
    metadata: dict[str, Any] = field(default_factory=dict)


def attachment() -> Any:
    return SimpleNamespace(counts=Counts())
