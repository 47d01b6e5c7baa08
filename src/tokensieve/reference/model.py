"""The reference model: a LLaVA-1.5 in miniature, built from the original transformers classes.

CLIP vision tower with a CLS token (penultimate features, CLS dropped), two-layer GELU projector, Llama decoder; 144
visual tokens (120 px, patch 10). Word-level tokenizer over the closed vocabulary of the scenes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokensieve.reference.questions import ANSWERS, PHRASES, TYPES
from tokensieve.reference.things import CANVAS, TOKEN
from tokensieve.reference.vocabulary import COLOURS, NAMES

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast

SPECIAL: tuple[str, ...] = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "USER:", "ASSISTANT:")

GENERATIONS = (TYPES[:8], TYPES[8:])  # question types in the order in which they were added

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: {% else %}ASSISTANT: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}"
    "{% if message['role'] == 'user' %} {% else %}</s>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def vocabulary() -> list[str]:
    """Return all tokens; the index of a token is its id.

    Special tokens come first. The words of each generation of question types follow those of the one before, so that
    a word keeps its id where types are added.
    """
    words: dict[str, None] = {}
    for types, others in zip(GENERATIONS, ({"?", "a", "an", *NAMES, *COLOURS}, set[str]()), strict=True):
        texts = [text for type in types for text in (*PHRASES[type], *ANSWERS[type])]
        added = others.union(*(text.replace("{}", "").replace("?", "").split() for text in texts))
        words |= dict.fromkeys(sorted(added))
    return [*SPECIAL, *words]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer of lower-case words and punctuation, with `<s>` in front, `<unk>` and left padding."""
    from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, processors
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    ids = {word: number for number, word in enumerate(vocabulary())}
    core = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+(-\w+)*|[^\w\s]"), "removed", invert=True)
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", ids["<s>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        padding_side="left",
        model_max_length=2048,
        additional_special_tokens=["<image>", "USER:", "ASSISTANT:"],
        clean_up_tokenization_spaces=False,
    )


def build_processor() -> LlavaProcessor:
    """Build a processor from the tokenizer, a PIL-only CLIP image processor and a chat template like LLaVA-1.5's."""
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": CANVAS}, crop_size={"height": CANVAS, "width": CANVAS}
        ),
        tokenizer=build_tokenizer(),
        patch_size=TOKEN,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(
    seed: int = 0, width: int = 128, vision_layers: int = 6, text_layers: int = 4
) -> LlavaForConditionalGeneration:
    """Build a model with new weights in float32."""
    import torch
    from transformers import CLIPVisionConfig, GenerationConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    ids = {word: number for number, word in enumerate(vocabulary())}
    special = {"bos_token_id": ids["<s>"], "eos_token_id": ids["</s>"], "pad_token_id": ids["<pad>"]}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=width,
            num_hidden_layers=vision_layers,
            num_attention_heads=4,
            image_size=CANVAS,
            patch_size=TOKEN,
            hidden_act="gelu",
        ),
        text_config=LlamaConfig(
            vocab_size=len(ids),
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=text_layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=2048,
            initializer_range=0.06,  # with the default 0.02, for wide models, attention would stay flat
            **special,
        ),
        image_token_index=ids["<image>"],
        image_seq_length=(CANVAS // TOKEN) ** 2,
        projector_hidden_act="gelu",
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
        **special,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(**special, max_new_tokens=4, do_sample=False)
    return model
