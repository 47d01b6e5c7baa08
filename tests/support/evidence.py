"""What the laws say about every image-text-to-text type of transformers, each on a tiny random model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from tests.support import families, models, zoo, zoo_prompts, zoo_sizes
from tests.support import prompts as family_prompts
from tokensieve.check import Laws
from tokensieve.errors import Refusal
from tokensieve.models import family_of
from tokensieve.models.generic import REFUSED

METHODS = {"features": "divprune(keep=3)", "encoder": "fastervlm(keep=3)", "decoder": "fastv(layer=2, keep=3)"}
"""One method for each kind of evidence: features only, attention of the vision encoder, attention of the LLM."""
NOISE = 1e-3
"""Deviation of the unmodified model's batch from its single prompts, relative to its logits, that is rounding."""
BY_BATCH = "the unmodified model answers a batch otherwise than its prompts one by one: single prompts were checked"


def declared() -> dict[str, str]:
    """Return {model type: the first model of it} of the family matrix."""
    names: dict[str, str] = {}
    types = {name: model_type for model_type, name in reversed(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.items())}
    for name, family in families.FAMILIES.items():
        names.setdefault(types[f"{family.classes}ForConditionalGeneration"], name)
    return names


def evidence(model_type: str, methods: Iterable[str] = METHODS) -> dict[str, Any]:
    """Return what the laws say about one type.

    {"recognised": how, "stages": {kind: {"status", "reason", "skipped": laws}}, "remark"}, or {"refused": reason}.
    """
    if model_type in REFUSED:
        return {"refused": REFUSED[model_type]}
    config_type = "gemma3" if model_type == "shieldgemma2" else model_type  # a fine-tuned Gemma 3
    if config_type in declared() and config_type not in zoo_sizes.CHANGES:
        name = declared()[config_type]
        model, samples = models.tiny_model(name), family_prompts.batch(name, "one-and-two")

        def prompts(numbers: Any) -> Any:
            return family_prompts.collate(name, [samples[i] for i in numbers])
    else:
        model = zoo.tiny_model(model_type)
        prompts = zoo_prompts.prompts(model, model_type)
    try:
        family = family_of(model)
    except Refusal as refusal:
        return {"refused": str(refusal)}
    laws, remark = Laws(model, prompts), ""
    if laws.floor > NOISE * float(laws.unreduced.logits.abs().max()):
        laws, remark = Laws(model, prompts, count=1), BY_BATCH
    stages = {kind: _stage(laws, METHODS[kind]) for kind in methods}
    return {"recognised": "discovered" if family.untested else family.title, "stages": stages, "remark": remark}


def _stage(laws: Laws, method: str) -> dict[str, Any]:
    torch.manual_seed(0)
    verdicts = list(laws.check(method))
    statuses = {verdict.status for verdict in verdicts}
    status = "failed" if "FAIL" in statuses else "refused" if "refused" in statuses else "passed"
    reasons = {v.reason for v in verdicts if v.reason and (v.status == "FAIL" or v.status == status)}
    return {
        "status": status,
        "reason": "; ".join(sorted(reasons)) if status != "passed" else "",
        "skipped": {v.law: v.reason for v in verdicts if v.status == "skipped"},
    }
