"""The table of supported cross-modal encoders: how each is loaded, hooked and listed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tokensieve.engine.fusion.co_attention import BridgeTower, Meter
from tokensieve.engine.fusion.host import Host
from tokensieve.engine.fusion.vilt import Vilt
from tokensieve.errors import Refusal
from tokensieve.methods.base import Stage


def _vilt_for_answers() -> Any:
    from transformers import ViltForQuestionAnswering

    return ViltForQuestionAnswering


def _meter_for_answers() -> Any:
    from tokensieve.fusion.meter import MeterForQuestionAnswering

    return MeterForQuestionAnswering


@dataclass(frozen=True)
class FusionFamily:
    """One kind of cross-modal encoder. Text and image attend to each other inside the model, where fusion methods act.

    Attributes:
        model_type: as in the model's config.
        host: installs a fusion method in a live model of this kind.
        classifier: returns the class that chooses among answers; ``None`` if there is none.
    """

    name: str
    title: str
    model_type: str
    host: type[Host]
    classifier: Callable[[], Any] | None = None
    stages: tuple[Stage, ...] = ("fusion",)
    modalities: tuple[str, ...] = ("image",)
    limits: str = ""

    @property
    def model_types(self) -> tuple[str, ...]:
        return (self.model_type,)


FUSION_FAMILIES = (
    FusionFamily("vilt", "ViLT: answers, pairs of images, retrieval", "vilt", Vilt, _vilt_for_answers),
    FusionFamily("meter", "METER (tokensieve.fusion.meter): the same", "meter", Meter, _meter_for_answers),
    FusionFamily("bridgetower", "BridgeTower: retrieval", "bridgetower", BridgeTower),
)


def is_fusion(model: Any) -> bool:
    """Return whether a live model is a cross-modal encoder."""
    return _model_type(model) in {family.model_type for family in FUSION_FAMILIES}


def host_of(model: Any) -> type[Host]:
    """Return the class that installs a fusion method in this model.

    Raises:
        Refusal: if the model is not a known cross-modal encoder; names those that are known.
    """
    hosts = {family.model_type: family.host for family in FUSION_FAMILIES}
    model_type = _model_type(model)
    if model_type not in hosts:
        raise Refusal(
            f"{type(model).__name__} (model type {model_type!r}) is no cross-modal encoder; "
            f"supported: {', '.join(hosts)}"
        )
    return hosts[model_type]


def longest_text(config: Any) -> int:
    """Return the largest number of text tokens that a cross-modal encoder has positions for."""
    text = getattr(config, "text_config", None)
    if text is None:
        return int(config.max_position_embeddings)
    return int(text.max_position_embeddings - 2)  # RoBERTa's positions begin after its padding index


def _model_type(model: Any) -> str:
    return str(getattr(getattr(model, "config", None), "model_type", None))
