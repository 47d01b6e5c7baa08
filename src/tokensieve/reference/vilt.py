"""The small ViLT of the reference scenes: a classifier of answers that starts with the reference model's vision tower.

Published ViLTs start from a pretrained ViT; this one starts from the CLIP encoder of the bundled model, whose layers
have ViLT's structure and are copied. ViLT has no normalisation between embeddings and layers, so the encoder's is
folded into the embeddings with its mean scale. Distillation removes the remaining error
(`tokensieve.train.vilt_reference`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tokensieve.reference.model import build_tokenizer, vocabulary
from tokensieve.reference.places import place_marks
from tokensieve.reference.questions import ANSWERS, Type
from tokensieve.reference.things import CANVAS, TOKEN

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import ViltForQuestionAnswering, ViltProcessor

COPIED, JOINT = 5, 3  # layers from the CLIP encoder, up to the features that the LLaVA uses; new layers above them
# its classifier has one-word answers to one question about one image
ASKED: tuple[Type, ...] = ("colour", "name", "where", "frame", "read", "count", "exist")
LABELS = tuple(dict.fromkeys(answer for type in ASKED for answer in ANSWERS[type]))
WORDS = 16  # positions for text: the longest question has 9 tokens, with `<s>` and question mark


def build_processor() -> ViltProcessor:
    """Build a processor with the reference model's tokenizer and image processor, padding on the right."""
    from transformers import ViltProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = build_tokenizer()
    tokenizer.padding_side = "right"
    side = {"height": CANVAS, "width": CANVAS}
    return ViltProcessor(CLIPImageProcessorPil(size={"shortest_edge": CANVAS}, crop_size=side), tokenizer)


def build_model(seed: int = 0) -> ViltForQuestionAnswering:
    """Build a model with new weights in float32."""
    import torch
    from transformers import ViltConfig, ViltForQuestionAnswering

    config = ViltConfig(
        vocab_size=len(vocabulary()),
        max_position_embeddings=WORDS,
        hidden_size=128,
        num_hidden_layers=COPIED + JOINT,
        num_attention_heads=4,
        intermediate_size=512,
        image_size=CANVAS,
        patch_size=TOKEN,
        layer_norm_eps=1e-5,
        initializer_range=0.06,
        pad_token_id=0,
        id2label=dict(enumerate(LABELS)),
        label2id={label: number for number, label in enumerate(LABELS)},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ViltForQuestionAnswering(config)


def copy_tower(tower: Any, model: ViltForQuestionAnswering, pixels: Tensor) -> None:
    """Copy embeddings and the first layers of a CLIP encoder of the same width into `model`.

    `pixels` `[B, 3, 120, 120]` are images that give the mean scale of the encoder's first normalisation.
    """
    import torch

    embeddings, first = model.vilt.embeddings, tower.embeddings
    norm = tower.pre_layrnorm
    with torch.no_grad():
        # a layer norm subtracts the mean and divides by the standard deviation: the mean is linear and goes into the
        # kernel and the positions, the deviation is replaced by its mean over images
        scale = norm.weight / first(pixels)[:, 1:].std(-1, correction=0).mean()
        kernel = first.patch_embedding.weight
        embeddings.patch_embeddings.projection.weight.copy_((kernel - kernel.mean(0)) * scale.view(-1, 1, 1, 1))
        embeddings.patch_embeddings.projection.bias.zero_()
        positions = first.position_embedding.weight
        embeddings.position_embeddings[0].copy_((positions - positions.mean(1, keepdim=True)) * scale + norm.bias)
        embeddings.cls_token[0, 0] = norm(first.class_embedding + positions[0]) - embeddings.position_embeddings[0, 0]
        embeddings.token_type_embeddings.weight[1] = 0.0
    for source_layer, layer in zip(tower.encoder.layers, model.vilt.encoder.layer[:COPIED], strict=False):
        pairs = {
            source_layer.layer_norm1: layer.layernorm_before,
            source_layer.self_attn.q_proj: layer.attention.attention.query,
            source_layer.self_attn.k_proj: layer.attention.attention.key,
            source_layer.self_attn.v_proj: layer.attention.attention.value,
            source_layer.self_attn.out_proj: layer.attention.output.dense,
            source_layer.layer_norm2: layer.layernorm_after,
            source_layer.mlp.fc1: layer.intermediate.dense,
            source_layer.mlp.fc2: layer.output.dense,
        }
        for source, target in pairs.items():
            target.load_state_dict(source.state_dict())


def mark_places(model: ViltForQuestionAnswering, size: float = 0.9) -> Tensor:
    """Add row and column of each patch to its position embedding; return the added rows, `[145, D]`.

    The encoder's features hardly depend on the place: a linear probe cannot read from them in which corner a patch is.
    `size` is the root mean square of the added rows; a token's is 0.9.
    """
    import torch

    table = model.vilt.embeddings.position_embeddings
    marks = place_marks(table.shape[-1], size)
    with torch.no_grad():
        table += marks
    return marks
