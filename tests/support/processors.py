"""Real processors for the tiny models, with a tokenizer of their 200 token ids."""

from functools import cache
from typing import Any

from tests.support.families import BOS, END, EOS, IMAGE, PAD, START, VIDEO, VOCABULARY

TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}MARK{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}"
)
WORDS = [
    "what", "is", "the", "this", "of", "first", "image", "picture", "which", "one", "red", "blue", "A", "B", ".", "?",
]  # fmt: skip


@cache
def processor(name: str) -> Any:
    """Return the processor of a tiny model: "qwen2-vl" or "llava-next"."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import LlavaNextProcessor, PreTrainedTokenizerFast, Qwen2VLProcessor
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    special = {
        PAD: "<pad>",
        BOS: "<s>",
        EOS: "</s>",
        START: "<start>",
        END: "<end>",
        VIDEO: "<video>",
        IMAGE: "<image>",
    }
    names = [special.get(number, f"w{number}") for number in range(VOCABULARY)]
    names[5 : 5 + len(WORDS)] = WORDS
    names[4] = "<unk>"
    core = Tokenizer(WordLevel({word: number for number, word in enumerate(names)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", extra_special_tokens=list(special.values())
    )
    if name == "qwen2-vl":
        tokenizer.image_token, tokenizer.video_token = "<image>", "<video>"
        images = Qwen2VLImageProcessorPil(size={"shortest_edge": 28 * 28, "longest_edge": 56 * 56 * 4}, patch_size=14)

        class ImagesOnly(Qwen2VLProcessor):
            def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> type:
                return type(argument)  # the class of video processors needs torchvision

        return ImagesOnly(images, tokenizer, None, TEMPLATE.replace("MARK", "<start><image><end>"))
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": 56},
        crop_size={"height": 56, "width": 56},
        image_grid_pinpoints=[[56, 112], [112, 56], [112, 112]],
    )
    return LlavaNextProcessor(
        images, tokenizer, 14, "default", TEMPLATE.replace("MARK", "<image>"), num_additional_image_tokens=1
    )
