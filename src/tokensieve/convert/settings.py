"""The config, tokenizer and processor of a converted checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from tokensieve.errors import Refusal, first_line
from tokensieve.loading import DEFAULTS, Place
from tokensieve.loading.place import from_pretrained

MODEL_TYPES = ("llava", "llava_llama", "llava_mini_llama", "pmod_llava_llama")
SELECT = {"patch": "default", "cls_patch": "full"}
MULTIPLE = 64  # the rows of the vocabulary are padded to
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")

# Vicuna's prompt as the authors' evaluations have it ("vicuna_v1"), with the images before the text of their turn.
CHAT_TEMPLATE = (
    "{% macro text(content) %}{% if content is string %}{{ content }}{% else %}"
    "{% for part in content if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}{% endmacro %}"
    "{% if messages[0]['role'] == 'system' %}{{ text(messages[0]['content']) }}{% else %}"
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions.{% endif %} "
    "{% for message in messages if message['role'] != 'system' %}"
    "{% if message['role'] == 'user' %}USER: "
    "{% if message['content'] is not string %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}{% endif %}"
    "{{ text(message['content']) }} "
    "{% else %}ASSISTANT: {{ text(message['content']) }}</s>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def check_settings(settings: Mapping[str, Any], source: Path) -> None:
    """Refuse a checkpoint of another format, or of a kind of LLaVA that transformers' class does not compute."""
    if "vision_config" in settings:
        raise Refusal(f"{source} is in the format of transformers; there is nothing to convert")
    if not isinstance(settings.get("mm_vision_tower"), str):
        raise Refusal(f"{source} is no LLaVA in its original format: its config.json names no mm_vision_tower")
    allowed: dict[str, tuple[Any, ...]] = {
        "model_type": MODEL_TYPES,
        "image_aspect_ratio": (None, "square", "pad"),  # "anyres" is LLaVA-NeXT
        "mm_patch_merge_type": (None, "flat"),
        "mm_use_im_start_end": (None, False),
        "mm_vision_select_feature": (None, *SELECT),
        "s2": (None, False),
    }
    for name, values in allowed.items():
        if (got := settings.get(name)) not in values:
            listed = ", ".join(str(value) for value in values if value is not None)
            raise Refusal(f"{source} has {name} {got!r}; supported is LLaVA-1.5 on Llama: {listed}")


def check_projector(settings: Mapping[str, Any], source: Path) -> None:
    """Refuse a projector other than LLaVA-1.5's two layers."""
    if (kind := settings.get("mm_projector_type")) != "mlp2x_gelu":
        raise Refusal(f"{source} has mm_projector_type {kind!r}; supported: mlp2x_gelu")


class Tower:
    """The vision encoder that a checkpoint was trained on: config, image processor and, where asked for, weights."""

    def __init__(self, place: Place) -> None:
        config = from_pretrained(AutoConfig, place, DEFAULTS)
        if config.model_type == "clip":
            config = config.vision_config
        if config.model_type != "clip_vision_model":
            raise Refusal(
                f"the vision encoder {place.path} is a {config.model_type!r} model; supported: clip_vision_model"
            )
        self.place, self.config = place, config

    def weights(self) -> dict[str, Any]:
        """Return its weights by the names of transformers."""
        model, outcome = from_pretrained(CLIPVisionModel, self.place, DEFAULTS, output_loading_info=True)
        if missing := sorted(outcome["missing_keys"]):
            raise Refusal(f"the vision encoder {self.place.path} lacks {len(missing)} weights, such as {missing[0]}")
        return dict(model.state_dict())

    def image_processor(self, pad: bool) -> Any:
        """Return its image processor, which pads images to a square in the mean colour if ``pad``."""
        known = from_pretrained(AutoImageProcessor, self.place, DEFAULTS).to_dict()
        names = ("crop_size", "do_center_crop", "do_normalize", "do_rescale", "do_resize", "image_mean", "image_std",
                 "resample", "rescale_factor", "size")  # fmt: skip
        return LlavaImageProcessorPil(do_pad=pad, **{name: known[name] for name in names if name in known})


def make_processor(tokenizer: Any, tower: Tower, settings: Mapping[str, Any]) -> LlavaProcessor:
    """Return the processor: the authors' tokenizer with ``<image>``, the tower's image processor, Vicuna's prompt."""
    return LlavaProcessor(
        image_processor=tower.image_processor(settings.get("image_aspect_ratio") == "pad"),
        tokenizer=tokenizer,
        patch_size=tower.config.patch_size,
        vision_feature_select_strategy=_strategy(settings),
        num_additional_image_tokens=1,  # [CLS]
        chat_template=CHAT_TEMPLATE,
    )


def read_tokenizer(*folders: Path | None) -> Any:
    """Return the tokenizer of the first folder that has one, with the token ``<image>``.

    Raises:
        Refusal: if there is none, or it cannot be read.
    """
    present = [folder for folder in folders if folder and any((folder / name).is_file() for name in TOKENIZER_FILES)]
    if not present:
        tried = " or ".join(str(folder) for folder in folders if folder)
        raise Refusal(f"no tokenizer at {tried}: expected tokenizer.json or tokenizer.model")
    try:
        # with a config, the one in the folder is not read: its model type is unknown to transformers
        options: dict[str, Any] = {"config": LlamaConfig(), "trust_remote_code": False}
        # The authors tokenize the text behind an image apart, so that it begins with a space: "legacy" does, too.
        options |= {"legacy": True, "add_bos_token": True}
        tokenizer = AutoTokenizer.from_pretrained(present[0], **options)
    except Exception as error:  # a broken file, or a package that reads it is missing: many types
        needs = "" if (present[0] / "tokenizer.json").is_file() else "; tokenizer.model needs pip install sentencepiece"
        raise Refusal(f"the tokenizer at {present[0]} does not load: {first_line(error)}{needs}") from error
    tokenizer.init_kwargs["legacy"] = True  # is not stored otherwise
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.padding_side = "left"  # answers are generated behind the prompt
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def make_config(settings: Mapping[str, Any], tower: Tower, tokenizer: Any, rows: int) -> LlavaConfig:
    """Return the config of a model with this many rows of vocabulary.

    Raises:
        Refusal: if a number is missing or of a wrong type.
    """
    kept = LlamaConfig().to_dict().keys() | {"rope_theta", "rope_scaling"}
    text = {name: value for name, value in settings.items() if name in kept - {"model_type"} and value is not None}
    layer = settings.get("mm_vision_select_layer", -1)
    grid = tower.config.image_size // tower.config.patch_size
    strategy = _strategy(settings)
    try:
        return LlavaConfig(
            vision_config=tower.config,
            text_config=LlamaConfig(**text | {"vocab_size": rows, "pad_token_id": tokenizer.pad_token_id}),
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            image_seq_length=grid**2 + (strategy == "full"),
            projector_hidden_act="gelu",
            vision_feature_layer=layer,
            vision_feature_select_strategy=strategy,
            tie_word_embeddings=False,
        )
    except Exception as error:  # transformers checks types in its own error classes
        raise Refusal(
            f"the checkpoint's config.json has values that transformers refuses: {first_line(error)}"
        ) from error


def _strategy(settings: Mapping[str, Any]) -> str:
    return SELECT[settings.get("mm_vision_select_feature") or "patch"]
