"""``tokensieve methods`` and ``tokensieve models``: lists of the methods and of the supported families."""

from __future__ import annotations

from dataclasses import asdict

from tokensieve.commands.arguments import Json
from tokensieve.commands.console import print_json, print_table


def methods(json: Json = False) -> None:
    """List the methods, with their parameters and papers."""
    from tokensieve.methods import list_methods

    infos = list_methods()
    if json:
        print_json([{**asdict(info), "needs": str(info.needs)} for info in infos])
        return
    rows = [
        (info.name, info.title, info.stage, str(info.needs), _parameters(info.parameters), info.paper) for info in infos
    ]
    print_table(("method", "what it does", "stage", "needs", "parameters", "paper"), rows, left=6)


def models(json: Json = False) -> None:
    """List the supported families of models."""
    from tokensieve.engine.fusion.families import FUSION_FAMILIES, FusionFamily
    from tokensieve.models import TESTED, Family, families

    supported: list[Family | FusionFamily] = [*families(), *FUSION_FAMILIES]
    if json:
        keys = ("name", "title", "model_types", "stages", "modalities", "limits")
        print_json([{key: getattr(family, key) for key in keys} | {"transformers": TESTED} for family in supported])
        return
    titles = [f"{f.title}; videos, too" if "video" in f.modalities else f.title for f in supported]
    rows = [
        (f.name, title, ", ".join(f.model_types), ", ".join(f.stages), f.limits or "–")
        for f, title in zip(supported, titles, strict=True)
    ]
    print_table(("family", "models", "model types", "stages", "limits"), rows, left=5)
    print(f"Tested with transformers {TESTED}.")


def _parameters(parameters: dict[str, object]) -> str:
    return ", ".join(f"{name}={default!r}" for name, default in parameters.items()) or "–"
