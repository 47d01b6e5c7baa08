"""The small ViLT of the reference scenes: a classifier of answers that starts with the reference model's vision tower.

Published ViLTs start from a pretrained ViT; this one starts from the CLIP tower of the bundled model. Its blocks are
ViLT's blocks, so they are copied. ViLT has no normalisation between embeddings and blocks: the tower's is folded into
the embeddings with its mean scale, and what that leaves wrong is distilled away (`tokensieve.train.vilt_reference`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tokensieve.reference.benchmark import PUBLISHED
from tokensieve.reference.model import build_tokenizer, vocabulary
from tokensieve.reference.questions import ANSWERS
from tokensieve.reference.scenes import CANVAS, TOKEN

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import ViltForQuestionAnswering, ViltProcessor

COPIED, JOINT = 5, 3  # layers from the tower, up to the features that the LLaVA reads; and new ones above them
LABELS = tuple(dict.fromkeys(answer for type in PUBLISHED for answer in ANSWERS[type]))
WORDS = 16  # positions for text: the longest question has 9 tokens, `<s>` and question mark included


def build_processor() -> ViltProcessor:
    """The reference model's words and pictures, padded on the right as encoders are."""
    from transformers import ViltProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = build_tokenizer()
    tokenizer.padding_side = "right"
    side = {"height": CANVAS, "width": CANVAS}
    return ViltProcessor(CLIPImageProcessorPil(size={"shortest_edge": CANVAS}, crop_size=side), tokenizer)


def build_model(seed: int = 0) -> ViltForQuestionAnswering:
    """A freshly initialised model, float32."""
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
    """Start `model` from a CLIP tower of its width: embeddings and the first layers.

    `pixels` `[B, 3, 120, 120]`: images to take the mean scale of the tower's first normalisation from.
    """
    import torch

    embeddings, first = model.vilt.embeddings, tower.embeddings
    norm = tower.pre_layrnorm
    with torch.no_grad():
        scale = norm.weight / first(pixels)[:, 1:].std(-1, correction=0).mean()
        kernel = first.patch_embedding.weight
        embeddings.patch_embeddings.projection.weight.copy_((kernel - kernel.mean(0)) * scale.view(-1, 1, 1, 1))
        embeddings.patch_embeddings.projection.bias.zero_()
        places = first.position_embedding.weight
        embeddings.position_embeddings[0].copy_((places - places.mean(1, keepdim=True)) * scale + norm.bias)
        embeddings.cls_token[0, 0] = norm(first.class_embedding + places[0]) - embeddings.position_embeddings[0, 0]
        embeddings.token_type_embeddings.weight[1] = 0.0
    for theirs, ours in zip(tower.encoder.layers, model.vilt.encoder.layer[:COPIED], strict=False):
        pairs = {
            theirs.layer_norm1: ours.layernorm_before,
            theirs.self_attn.q_proj: ours.attention.attention.query,
            theirs.self_attn.k_proj: ours.attention.attention.key,
            theirs.self_attn.v_proj: ours.attention.attention.value,
            theirs.self_attn.out_proj: ours.attention.output.dense,
            theirs.layer_norm2: ours.layernorm_after,
            theirs.mlp.fc1: ours.intermediate.dense,
            theirs.mlp.fc2: ours.output.dense,
        }
        for source, target in pairs.items():
            target.load_state_dict(source.state_dict())


def mark_places(model: ViltForQuestionAnswering, size: float = 0.9, waves: int = 4, seed: int = 0) -> Tensor:
    """Add row and column of each patch to its position embedding, and return what was added, `[145, D]`.

    Slow cosines of both, along random directions. The tower hardly tells its patches apart by place: in its features a
    linear probe finds no corner. `size`: root mean square of what is added, next to a token's 0.9.
    """
    import torch

    table, side = model.vilt.embeddings.position_embeddings, CANVAS // TOKEN
    along = (torch.arange(side) + 0.5) * torch.pi / side
    cosines = torch.stack([(wave * along).cos() / wave for wave in range(1, waves + 1)], 1)
    rows, columns = cosines.repeat_interleave(side, 0), cosines.repeat(side, 1)
    draw = torch.Generator().manual_seed(seed)
    places = torch.cat([rows, columns], 1) @ torch.randn(2 * waves, table.shape[-1], generator=draw)
    marks = torch.cat([places.new_zeros(1, places.shape[1]), places * size / places.square().mean().sqrt()])
    with torch.no_grad():
        table += marks
    return marks
