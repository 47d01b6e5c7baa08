"""METER for transformers. The import registers its config, model and question answering with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForVisualQuestionAnswering

from tokensieve.fusion.meter.configuration import MeterConfig
from tokensieve.fusion.meter.heads import (
    MeterForImageAndTextRetrieval,
    MeterForImagesAndTextClassification,
    MeterForQuestionAnswering,
)
from tokensieve.fusion.meter.modeling import MeterModel, MeterModelOutput

AutoConfig.register(MeterConfig.model_type, MeterConfig, exist_ok=True)
AutoModel.register(MeterConfig, MeterModel, exist_ok=True)
AutoModelForVisualQuestionAnswering.register(MeterConfig, MeterForQuestionAnswering, exist_ok=True)

__all__ = [
    "MeterConfig",
    "MeterForImageAndTextRetrieval",
    "MeterForImagesAndTextClassification",
    "MeterForQuestionAnswering",
    "MeterModel",
    "MeterModelOutput",
]
