"""Images of random sizes in the frontend alone: the placeholders that it promises are the rows that a method leaves.

``TOKENSIEVE_SIZES`` is the number of images per family.
"""

import os
import random

import pytest

from tests.vllm.apart import run_apart
from tests.vllm.checkpoints import IMAGE_TOKEN, PROCESSORS, picture, save
from tokensieve.vllm.private import installed

SPECS = ("uniform(keep=3)", "pool(keep=0.5)", "divprune(keep=9)")
LARGEST = {"pixtral": 400, "mistral3": 400}  # larger ones are shrunk to 224


@pytest.mark.parametrize("family", list(PROCESSORS))
def test_promises_equal_what_methods_leave(family, tmp_path):
    if family == "mistral3" and installed().startswith("0.30."):
        pytest.skip("vLLM 0.30 rounds the sizes of Mistral 3's images down, and its processor rounds them up")
    images = int(os.environ.get("TOKENSIEVE_SIZES", "40"))
    differences, tokens = run_apart(promises, family, save(family, tmp_path), images)
    assert differences == []
    assert tokens > images * 3


def promises(family: str, folder: str, images: int) -> tuple[list, int]:
    """Return what differed, and the visual tokens of all images before any reduction."""
    from transformers import AutoProcessor
    from vllm.config import ModelConfig
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.multimodal.processing import ProcessorInputs
    from vllm.multimodal.processing.context import TimingContext

    from tokensieve.vllm import engine_options, register

    register()
    options = engine_options(folder, SPECS[0], allowed=SPECS[1:])
    frontend = MULTIMODAL_REGISTRY.create_processor(ModelConfig(folder, max_model_len=512, **options))
    processor, draw = AutoProcessor.from_pretrained(folder), random.Random(0)
    prompt = f"what is {IMAGE_TOKEN[family]} a b"
    differences, total = [], 0
    for number in range(images):
        image = picture(number, draw.randint(29, LARGEST.get(family, 300)), draw.randint(29, LARGEST.get(family, 300)))
        name = draw.choice(SPECS).split("(")[0]
        keep = draw.choice([draw.randint(1, 40), round(draw.uniform(0.01, 1), 3)])
        items = frontend.info.parse_mm_data({"image": [image]})
        ids = frontend.info.get_tokenizer().encode(prompt)

        def promised(choice, items=items, ids=ids):
            return frontend.apply(ProcessorInputs(ids, items, hf_processor_mm_kwargs=choice), TimingContext())

        whole = processor(text=prompt, images=[image], return_tensors="pt")["input_ids"][0].tolist()
        unreduced = promised({"tokensieve_keep": 1.0})["prompt_token_ids"]
        out = promised({"tokensieve_keep": keep, "tokensieve_method": name})
        (place,) = out["mm_placeholders"]["image"]
        rows = place.length if place.is_embed is None else int(place.is_embed.sum())
        left = rows_left(frontend, whole, out["mm_kwargs"]["image"][0].get_data(), name, keep)
        token = frontend.family.image_token(frontend.config)
        first, end = whole.index(token), len(whole) - whole[::-1].index(token)
        filled = [*whole[:first], *[token] * (end - first), *whole[end:]]  # text between tokens is a row of the image
        if unreduced != filled or rows != left:
            differences.append((image.size, name, keep, len(unreduced), len(whole), rows, left))
        total += whole.count(token)
    return differences, total


def rows_left(frontend, whole: list[int], fields: dict, name: str, keep) -> int:
    """Let the method decide about random features: the kept tokens, and the text from the image's first to its last."""
    import torch

    from tokensieve.engine.connector.decide import ConnectorEvidence, decide
    from tokensieve.engine.handoff import EncoderOutputs
    from tokensieve.methods import parse

    family, image = frontend.family, frontend.family.image_token(frontend.config)
    layouts = family.parts(family.layout(frontend.config, family.size(frontend.config, fields)))
    features = [torch.randn(layout.patches, 4) for layout in layouts]
    outputs = EncoderOutputs(layouts, {}, [], [], [], 0, (), None)
    evidence = ConnectorEvidence(
        layouts, features, [], outputs, list(range(len(layouts))), None, [0] * len(layouts), lambda rows: rows
    )
    decisions = decide(parse(name, keep=keep)[0], "image", evidence, [[layout.patches] for layout in layouts])
    span = whole[whole.index(image) : len(whole) - whole[::-1].index(image)]
    return sum(len(decision.anchors) for decision in decisions) + len(span) - span.count(image)
