"""Tiny random cross-modal encoders, and batches for them."""

import torch
from transformers import (
    BridgeTowerConfig,
    BridgeTowerForImageAndTextRetrieval,
    CLIPVisionConfig,
    RobertaConfig,
    ViltConfig,
    ViltForImageAndTextRetrieval,
    ViltForImagesAndTextClassification,
    ViltForQuestionAnswering,
)

from tokensieve.fusion.meter import (
    MeterConfig,
    MeterForImageAndTextRetrieval,
    MeterForImagesAndTextClassification,
    MeterForQuestionAnswering,
)

WORDS, PAD = 11, 1
HOSTS = ("vilt", "meter", "bridgetower")
SPEC = {
    "vilt": "pumer(layers=(1, 3), prune=0.2, merge=0.3, merge_text=0.25)",
    "meter": "pumer(layers=(0, 2), prune=0.2, merge=0.3, merge_text=0.25)",
    "bridgetower": "pumer(layers=(0, 2), prune=0.2, merge=0.3, merge_text=0.25)",
}


def vilt(head=ViltForQuestionAnswering, **more):
    torch.manual_seed(0)
    config = ViltConfig(
        hidden_size=32,
        num_hidden_layers=5,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        vocab_size=50,
        max_position_embeddings=16,
        num_labels=5,
        **more,
    )
    return _spread(head(config))


def vilt_pairs():
    return vilt(ViltForImagesAndTextClassification, num_images=2, modality_type_vocab_size=3)


def vilt_retrieval():
    return vilt(ViltForImageAndTextRetrieval)


def meter(head=MeterForQuestionAnswering, **more):
    torch.manual_seed(0)
    text = RobertaConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    vision = CLIPVisionConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=32, patch_size=8
    )
    config = MeterConfig(
        text_config=text.to_dict(),
        vision_config=vision.to_dict(),
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        num_labels=5,
        **more,
    )
    return _spread(head(config))


def meter_pairs():
    return meter(MeterForImagesAndTextClassification, modality_type_vocab_size=3)


def meter_retrieval():
    return meter(MeterForImageAndTextRetrieval)


def bridgetower():
    torch.manual_seed(0)
    config = BridgeTowerConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        text_config={
            "hidden_size": 32,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 64,
            "vocab_size": 50,
            "max_position_embeddings": 40,
        },
        # stock BridgeTower gives its vision blocks one head per 64 columns, and at least one
        vision_config={"hidden_size": 64, "num_hidden_layers": 4, "patch_size": 8, "image_size": 32},
    )
    return _spread(BridgeTowerForImageAndTextRetrieval(config))


MODELS = {"vilt": vilt, "meter": meter, "bridgetower": bridgetower}


def _spread(model):
    """Weights large enough that tokens differ and attention is not uniform."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 or "token" in name or "embedding" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    return model.eval()


def batch(rows=3, images=1, ragged=True, seed=0):
    """Texts of different lengths, right-padded, and their images."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 50, (rows, WORDS), generator=g)
    lengths = [WORDS - 3 * row if ragged else WORDS for row in range(rows)]
    mask = torch.tensor([[1] * n + [0] * (WORDS - n) for n in lengths])
    shape = (rows, 3, 32, 32) if images == 1 else (rows, images, 3, 32, 32)
    pixels = torch.randn(shape, generator=g)
    return {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask, "pixel_values": pixels}


def alone(inputs, row):
    """One row of a batch without its padding."""
    words = int(inputs["attention_mask"][row].sum())
    one = {key: value[row : row + 1] for key, value in inputs.items()}
    return {**one, "input_ids": one["input_ids"][:, :words], "attention_mask": one["attention_mask"][:, :words]}


def logits(model, inputs, seed=0):
    torch.manual_seed(seed)
    with torch.no_grad():
        return model(**inputs).logits
