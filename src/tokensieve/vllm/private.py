"""List every name of vLLM's that the plug-in uses and that vLLM does not promise, each with its use.

A release may rename any of them, and an override that is never called fails silently. So no engine is started if a name
is missing or has other parameters (:func:`check`), and a test names what changed in a new release.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

from packaging.version import Version

from tokensieve.errors import Refusal
from tokensieve.version import TESTED_VLLM


@dataclass(frozen=True)
class Name:
    """One name of vLLM's.

    Attributes:
        path: "module:attribute.attribute"; alternatives of several releases are separated by " | ".
        use: what the plug-in does with it.
        parameters: the first parameters of a function after ``self``, by name and in order.
    """

    path: str
    use: str
    parameters: tuple[str, ...] | None = None


_PROCESSOR = "vllm.multimodal.processing:BaseMultiModalProcessor"
_DUMMY = "vllm.multimodal.processing:BaseDummyInputsBuilder"
_MODELS = "vllm.model_executor.models"
_MODEL = f"{_MODELS}.interfaces:SupportsMultiModal"
_ATTENTION = "vllm.model_executor.layers.attention.mm_encoder_attention:MMEncoderAttention"

NAMES = (
    # the frontend: one request
    Name("vllm.model_executor.models.registry:ModelRegistry.register_model", "makes the reduced classes known"),
    Name("vllm.model_executor.models.registry:ModelRegistry.get_supported_archs", "registers each of them once"),
    Name("vllm.multimodal:MULTIMODAL_REGISTRY.register_processor", "gives a reduced class its processor"),
    Name("vllm.multimodal.registry:_ProcessorFactories.processor", "the factory of vLLM's processor, which is wrapped"),
    Name("vllm.multimodal.registry:_ProcessorFactories.info", "goes on to the reduced class"),
    Name("vllm.multimodal.registry:_ProcessorFactories.dummy_inputs", "goes on to the reduced class"),
    Name(f"{_PROCESSOR}.apply", "takes our options out of a request", ("inputs", "timing_ctx")),
    Name(f"{_PROCESSOR}.get_dummy_inputs | {_DUMMY}.get_dummy_processor_inputs", "marks the inputs for profiling"),
    Name(
        f"{_PROCESSOR}._get_prompt_updates",
        "shortens the placeholders of an image",
        ("mm_items", "hf_processor_mm_kwargs", "out_mm_kwargs"),
    ),
    Name(
        f"{_PROCESSOR}._apply_prompt_updates",
        "checks positions, and counts tokens",
        ("token_ids", "mm_prompt_updates"),
    ),
    Name("vllm.multimodal.processing:ProcessorInputs.get_mm_hashes", "adds the request's choice to an image's hash"),
    Name("vllm.multimodal.cache:BaseMultiModalProcessorCache.invalidate", "forgets the images of a refused request"),
    Name(f"vllm.multimodal.processing:ProcessorInputs.cache | {_PROCESSOR}.cache", "holds these images"),
    Name("vllm.multimodal.processing:ProcessorInputs.prompt", "the ids in which the user's text is found"),
    Name("vllm.multimodal.processing:ProcessorInputs.mm_data_items", "shows whether there is an image"),
    Name("vllm.multimodal.processing:ProcessorInputs.hf_processor_mm_kwargs", "holds a request's options"),
    Name("vllm.multimodal.processing:BaseProcessingInfo.get_hf_config", "holds the engine's choices"),
    Name("vllm.multimodal.processing:BaseProcessingInfo.get_hf_processor", "renders templates for the user's text"),
    Name("vllm.multimodal.processing:BaseProcessingInfo.get_tokenizer", "finds the user's text"),
    Name("vllm.multimodal.processing:PromptUpdate.modality", "only images are shortened"),
    Name("vllm.multimodal.processing:PromptUpdate.content", "the whole placeholders of an image"),
    Name("vllm.multimodal.processing:PromptReplacement.replacement", "the shortened placeholders"),
    Name("vllm.multimodal.processing:PromptUpdateDetails.full", "the placeholders of an image with their surroundings"),
    Name("vllm.multimodal.processing:PromptUpdateDetails.is_embed", "which of them are rows of the image"),
    # what travels from the frontend to the worker
    Name("vllm.multimodal.inputs:MultiModalKwargsItem.get_data", "the fields of an image"),
    Name("vllm.multimodal.inputs:MultiModalFieldElem.data", "one field"),
    Name("vllm.multimodal.inputs:MultiModalFieldElem.field", "how the fields of a batch are joined"),
    Name("vllm.multimodal.inputs:MultiModalBatchedField.keep_on_cpu", "a plan is read without a copy from the device"),
    Name("vllm.multimodal.inputs:MultiModalFeatureSpec.data", "the plan of an image"),
    Name("vllm.multimodal.inputs:MultiModalFeatureSpec.modality", "videos have no plan"),
    Name("vllm.multimodal.inputs:MultiModalFeatureSpec.mm_position", "where an image stands in the prompt"),
    Name("vllm.multimodal.inputs:PlaceholderRange.offset", "its first token"),
    Name("vllm.multimodal.inputs:PlaceholderRange.length", "its number of tokens"),
    Name("vllm.multimodal.inputs:PlaceholderRange.is_embed", "which of them are rows of the image"),
    # the worker
    Name(f"{_MODEL}.embed_multimodal", "encodes, decides and reduces", ()),
    Name(
        f"{_MODEL}.embed_input_ids",
        "takes the offsets off the embeddings",
        ("input_ids", "multimodal_embeddings", "is_multimodal"),
    ),
    Name(f"{_MODEL}.get_language_model", "embeds the user's text, and text between an image's tokens", ()),
    Name(
        f"{_MODELS}.interfaces:SupportsMRoPE.get_mrope_input_positions",
        "gives the original positions",
        ("input_tokens", "mm_features"),
    ),
    Name("vllm.transformers_utils.config:uses_mrope", "asks a model for positions if its config has M-RoPE sections"),
    Name(f"{_ATTENTION}.forward_native", "queries and keys are read before it runs", ("query", "key", "value")),
    Name(f"{_ATTENTION}.num_heads", "the heads of this rank"),
    Name(f"{_ATTENTION}.scale", "the scaling of the scores"),
    Name("vllm.distributed:tensor_model_parallel_all_gather", "joins the heads of all ranks", ("input_", "dim")),
    # the options that an engine is refused for
    Name("vllm.config:ModelConfig.multimodal_config", "refusals"),
    Name("vllm.config:MultiModalConfig.is_multimodal_pruning_enabled", "vLLM's own pruning is refused"),
    Name("vllm.config:MultiModalConfig.mm_encoder_tp_mode", "ranks that encode other images are refused"),
    Name("vllm.config:CompilationConfig.cudagraph_mm_encoder", "a captured vision encoder is refused"),
    Name("vllm.config:CompilationConfig.compile_mm_encoder", "a compiled one is refused if attention is read"),
    Name("vllm.config:ParallelConfig.pipeline_parallel_size", "refused with original positions"),
    Name("vllm.config:VllmConfig.speculative_config", "refused with original positions"),
)

_CLIP = (
    Name(f"{_MODELS}.clip:CLIPVisionModel.vision_model", "its layers are read"),
    Name(f"{_MODELS}.clip:CLIPVisionTransformer.encoder", "its layers are read"),
    Name(f"{_MODELS}.clip:CLIPEncoder.layers", "its layers are read"),
    Name(f"{_MODELS}.clip:CLIPEncoderLayer.self_attn", "its attention is read"),
    Name(f"{_MODELS}.clip:CLIPAttention.attn", "its attention is read"),
)
_SIGLIP = tuple(Name(name.path.replace("clip:CLIP", "siglip:Siglip"), name.use) for name in _CLIP)
_PIXTRAL = (
    Name(f"{_MODELS}.pixtral:PixtralHFVisionModel.transformer", "its layers are read"),
    Name(f"{_MODELS}.pixtral:PixtralHFTransformer.layers", "its layers are read"),
    Name(f"{_MODELS}.pixtral:PixtralHFTransformerBlock.attention", "its attention is read"),
    Name(f"{_MODELS}.pixtral:PixtralHFAttention.attn", "its attention is read"),
)
_MISTRAL3 = f"{_MODELS}.mistral3:Mistral3"
_INTERNVL = f"{_MODELS}.interns1_vit:InternS1Vision"
_IDEFICS3 = (
    Name(f"{_MODELS}.idefics3:Idefics3ForConditionalGeneration.model", "holds encoder and projector"),
    Name(f"{_MODELS}.idefics3:Idefics3Model.vision_model", "its layers are read"),
    Name(f"{_MODELS}.idefics3:Idefics3Model.connector", "merged rows enter it"),
    Name(f"{_MODELS}.idefics2_vision_model:Idefics2VisionTransformer.encoder", "its layers are read"),
    Name(f"{_MODELS}.idefics2_vision_model:Idefics2Encoder.layers", "its layers are read"),
    Name(f"{_MODELS}.idefics2_vision_model:Idefics2EncoderLayer.self_attn", "its attention is read"),
    Name(f"{_MODELS}.idefics2_vision_model:Idefics2VisionAttention.attn", "its attention is read"),
)


def _qwen(module: str, blocks: str, attention: str) -> tuple[Name, ...]:
    return (
        Name(f"{_MODELS}.{module}:{blocks}.blocks", "its layers are read"),
        Name(f"{_MODELS}.{attention}.attn", "its attention is read"),
    )


OF_FAMILY: dict[str, tuple[Name, ...]] = {
    "LlavaForConditionalGeneration": (
        *_CLIP,
        *_SIGLIP,
        Name(f"{_MODELS}.llava:LlavaForConditionalGeneration.vision_tower", "its layers are read"),
        Name(f"{_MODELS}.llava:LlavaForConditionalGeneration.multi_modal_projector", "merged rows enter it"),
        *_PIXTRAL,
    ),
    "Mistral3ForConditionalGeneration": (
        *_PIXTRAL,
        Name(f"{_MISTRAL3}ForConditionalGeneration.vision_tower", "its layers are read"),
        Name(f"{_MISTRAL3}ForConditionalGeneration.multi_modal_projector", "merged rows enter its middle"),
        Name(f"{_MISTRAL3}MultiModalProjector.patch_merger", "merged rows enter its layer"),
        Name(f"{_MISTRAL3}PatchMerger.merging_layer", "merged rows enter it"),
        Name(f"{_MISTRAL3}MultiModalProjector.linear_1", "follows the merging layer"),
        Name(f"{_MISTRAL3}MultiModalProjector.act", "follows the merging layer"),
        Name(f"{_MISTRAL3}MultiModalProjector.linear_2", "follows the merging layer"),
    ),
    "InternS1ForConditionalGeneration": (
        Name(f"{_MODELS}.interns1:InternS1ForConditionalGeneration.vision_tower", "its layers are read"),
        Name(f"{_MODELS}.interns1:InternS1ForConditionalGeneration.multi_modal_projector", "merged rows enter it"),
        Name(f"{_INTERNVL}Model.encoder", "its layers are read"),
        Name(f"{_INTERNVL}Encoder.layer", "its layers are read"),
        Name(f"{_INTERNVL}Layer.attention", "its attention is read"),
        Name(f"{_MODELS}.interns1_vit:InternSdpaAttention.attn", "its attention is read"),
    ),
    "Idefics3ForConditionalGeneration": _IDEFICS3,
    "SmolVLMForConditionalGeneration": _IDEFICS3,
    "Qwen2VLForConditionalGeneration": _qwen("qwen2_vl", "Qwen2VisionTransformer", "qwen2_vl:Qwen2VisionAttention"),
    "Qwen2_5_VLForConditionalGeneration": (
        *_qwen("qwen2_5_vl", "Qwen2_5_VisionTransformer", "qwen2_5_vl:Qwen2_5_VisionAttention"),
        Name(
            f"{_MODELS}.qwen2_5_vl:Qwen2_5_VisionTransformer.get_window_index_thw",
            "puts the rows of an image in order",
            ("grid_t", "grid_h", "grid_w"),
        ),
    ),
    "Qwen3VLForConditionalGeneration": _qwen(
        "qwen3_vl", "Qwen3_VisionTransformer", "qwen2_5_vl:Qwen2_5_VisionAttention"
    ),
}
"""Names that one family uses, by the architecture of vLLM's class."""


def changed(names: Iterable[Name]) -> list[str]:
    """Return one line for each name that the installed vLLM lacks, or has with other parameters."""
    return [line for name in names if (line := _difference(name)) is not None]


@cache
def check(architecture: str) -> None:
    """Refuse a vLLM that lacks a name that the plug-in needs for this architecture; warn of an untested release.

    Raises:
        Refusal: with one line per name.
    """
    version = installed()
    lowest, highest = TESTED_VLLM
    if lines := changed([*NAMES, *OF_FAMILY.get(architecture, ())]):
        raise Refusal(
            f"vLLM {version} is not the vLLM that the plug-in knows (tested: {lowest} to {highest}):\n"
            + "\n".join(lines)
        )
    if not Version(lowest).release <= Version(version).release[:2] <= Version(highest).release:
        warnings.warn(f"Tokensieve is not tested with vLLM {version} (tested: {lowest} to {highest})", stacklevel=2)


def installed() -> str:
    """Return vLLM's version; its distributions have several names."""
    version: str = import_module("vllm").__version__
    return version


def _difference(name: Name) -> str | None:
    """Return how the installed vLLM differs from a name, ``None`` if it does not."""
    reasons = []
    for path in name.path.split(" | "):
        value, reason = _resolve(path)
        if reason is None and name.parameters is not None:
            reason = _other_parameters(value, name.parameters)
        if reason is None:
            return None
        reasons.append(f"{path}: {reason} ({name.use})")
    return "; ".join(reasons)


def _resolve(path: str) -> tuple[Any, str | None]:
    """Return the object of a path, or why there is none."""
    module, _, attributes = path.partition(":")
    try:
        value: Any = import_module(module)
    except ImportError as error:
        return None, f"cannot be imported: {error}"
    for attribute in attributes.split("."):
        owner, value = value, getattr(value, attribute, None)
        if value is None and not _declares(owner, attribute):
            return None, f"has no {attribute}"
    return value, None


def _declares(owner: Any, attribute: str) -> bool:
    """Return whether the objects of a class have an attribute: it is annotated, or assigned in a method."""
    classes = owner.__mro__ if isinstance(owner, type) else ()
    for kind in classes:
        if attribute in getattr(kind, "__annotations__", {}):
            return True
        if kind.__module__.startswith("vllm."):
            try:
                source = inspect.getsource(kind)
            except (OSError, TypeError):
                continue
            if re.search(rf"self\.{attribute}\b[^=\n]*=[^=]", source):
                return True
    return False


def _other_parameters(function: Any, expected: tuple[str, ...]) -> str | None:
    """Return how a function's parameters differ; further ones must have a default."""
    parameters = [p for p in inspect.signature(function).parameters.values() if p.name != "self"]
    first, further = parameters[: len(expected)], parameters[len(expected) :]
    open_ended = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    required = [p.name for p in further if p.default is p.empty and p.kind not in open_ended]
    names = tuple(p.name for p in first)
    if names == expected and not required:
        return None
    return f"takes ({', '.join((*names, *required))}), expected ({', '.join(expected)})"
