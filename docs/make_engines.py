"""Write the tables of ``docs/engines.md``: which method runs on which family in which engine, and why not.

``python docs/make_engines.py`` reads the plug-in's own refusals, with the default sizes of each family's config.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from tokensieve.errors import Refusal
from tokensieve.methods import Method, MethodInfo, list_methods, parse
from tokensieve.vllm.families import FAMILIES, REFUSED, ServedFamily
from tokensieve.vllm.settings import unserved

PAGE = Path(__file__).with_name("engines.md")
BEGIN, END = "<!-- tables: made by docs/make_engines.py -->", "<!-- end of the tables -->"
HERE = {
    "encoder": "yes",
    "connector": "yes",
    "decoder": "yes",
    "fusion": "in ViLT, METER and BridgeTower",
}


def page(text: str) -> str:
    """Return the page with its tables written anew."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{chr(10).join(_tables())}\n{END}{after}"


def _tables() -> Iterator[str]:
    yield from ("", "| method | acts | under transformers (`attach`) | in vLLM |", "|---|---|---|---|")
    for info in list_methods():
        method = with_budget(info)
        reason = unserved(method)
        runs = "yes" if reason is None else f"no: {reason}"
        yield f"| [`{info.name}`](methods/{info.name}.md) | {info.stage} | {HERE[info.stage]} | {runs} |"
    yield from ("", "| family in vLLM | model types | vLLM's class | methods that it cannot run |", "|---|---|---|---|")
    for family in FAMILIES:
        types = ", ".join(f"`{name}`" for name in family.model_types)
        yield f"| {family.title} | {types} | `{family.architecture}` | {exceptions(family)} |"
    for model_type, reason in REFUSED.items():
        yield f"| – | `{model_type}` | – | refused: {reason} |"


def with_budget(info: MethodInfo) -> Method:
    """Return a method with a budget, if it can have one."""
    spec = f"{info.name}(keep=16)" if "keep" in info.parameters else info.name
    try:
        (method,) = parse(spec)
    except Refusal:
        (method,) = parse(info.name)
    return method


def exceptions(family: ServedFamily) -> str:
    """Return the methods that a family cannot run though vLLM can, with the reason."""
    config = default_config(family)
    reasons: dict[str, list[str]] = {}
    for method in map(with_budget, list_methods()):
        if unserved(method) is None:
            reason = family.unserved(config, method)
            if reason is not None:
                reasons.setdefault(reason, []).append(f"`{method.info.name}`")
    return "; ".join(f"{', '.join(names)}: {reason}" for reason, names in reasons.items()) or "none"


def default_config(family: ServedFamily) -> dict[str, Any]:
    """Return the default config of a family's first model type: the sizes of its first published model."""
    config: dict[str, Any] = AutoConfig.for_model(family.model_types[0]).to_dict()
    if not family.describes(config):  # LLaVA's default tower is CLIP
        pixtral = {"vision_config": {"model_type": "pixtral"}, "vision_feature_layer": -1}
        config = AutoConfig.for_model(family.model_types[0], **pixtral).to_dict()
    return config


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text("utf-8")), "utf-8")
