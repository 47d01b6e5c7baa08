"""Tiny checkpoints with a processor, saved as their authors would save them."""

import json
from pathlib import Path
from typing import Any

import torch

from tests.support.families import BOS, BREAK, END, EOS, IMAGE, PAD, START, WORDS
from tests.support.models import build
from tokensieve.reference.model import build_model, build_processor

TEMPLATE = (
    "{% for message in messages %}[INST]{{ message['role'] }} "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}[/INST] "
    "{% endfor %}{% if add_generation_prompt %}[INST]assistant "
    "{% if enable_thinking is defined and enable_thinking is false %}skip {% endif %}{% endif %}"
)
TEXT = "system user assistant what is in the image be brief skip on table colour cup ? one two 7 x"


def save_llava(folder: Path) -> Path:
    """Save a random LLaVA of the bundled model's shape."""
    build_model().save_pretrained(folder)
    build_processor().save_pretrained(folder)
    return folder


def save_adapter(folder: Path, base: Any | None = None, **options: Any) -> Path:
    """Save a LoRA adapter with random weights for :func:`save_llava`'s model, or another."""
    from peft import LoraConfig, get_peft_model

    options = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **options}
    torch.manual_seed(1)
    get_peft_model(base or build_model(), LoraConfig(**options)).save_pretrained(folder)
    return folder


def save_with_code(folder: Path) -> Path:
    """Save a LLaVA of an unknown model type, whose class comes with the checkpoint."""
    code = (
        "from transformers import LlavaConfig, LlavaForConditionalGeneration\n\n\n"
        "class OwnConfig(LlavaConfig):\n    model_type = 'own_llava'\n\n\n"
        "class OwnModel(LlavaForConditionalGeneration):\n    config_class = OwnConfig\n"
    )
    classes: dict[str, Any] = {}
    exec(code, classes)
    like = build_model()
    model = classes["OwnModel"](classes["OwnConfig"](**like.config.to_dict() | {"model_type": "own_llava"}))
    model.load_state_dict(like.state_dict())
    model.generation_config = like.generation_config
    model.save_pretrained(folder)
    build_processor().save_pretrained(folder)
    (folder / "modeling_own.py").write_text(code)
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForImageTextToText": "modeling_own.OwnModel"}
    changed = config | {"model_type": "own_llava", "architectures": ["OwnModel"], "auto_map": names}
    (folder / "config.json").write_text(json.dumps(changed))
    return folder


def save_in_hub_cache(cache: Path, name: str, revision: str) -> Path:
    """Save a LLaVA as the hub's client caches a branch that it has downloaded; return the cache."""
    repository, commit = cache / f"models--{name.replace('/', '--')}", "0123456789" * 4
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / revision).write_text(commit)
    save_llava(repository / "snapshots" / commit)
    return cache


def save_idefics3(folder: Path) -> Path:
    """Save a random Idefics3: ``do_image_splitting`` decides its tokens, and its chat template takes an option."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import Idefics3Processor, PreTrainedTokenizerFast
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    special = {"<pad>": PAD, "[INST]": BOS, "[/INST]": EOS, "<image>": IMAGE}
    special |= {"<fake_token_around_image>": START, "<end_of_utterance>": END, "<global-img>": BREAK}
    words = {word: number for number, word in enumerate(TEXT.split(), WORDS.start)} | special
    core = Tokenizer(WordLevel(words, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="[/INST]", additional_special_tokens=[*special][1:]
    )
    images = Idefics3ImageProcessorPil(size={"longest_edge": 224}, max_image_size={"longest_edge": 112})
    Idefics3Processor(images, tokenizer, image_seq_len=16, chat_template=TEMPLATE).save_pretrained(folder)
    build("idefics3").save_pretrained(folder)
    return folder
