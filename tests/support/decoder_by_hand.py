"""Decoder methods by hand: one sample at a time, block by block, eager attention, no cache, no padding, no engine.

Prompt and answer are one sequence: the model is causal, so what is decided from the prompt is not changed by what
follows, and one pass gives the logits of every greedy step.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tests.support import laws_reference as reference
from tests.support.laws_tiny import IMAGE, QWEN, Sample


@dataclass
class Block:
    """What a block did to the sequence, `[L, …]`, that a later decision may look at."""

    entered: Tensor
    attention: Tensor  # [H, L, L], post-softmax
    keys: Tensor  # [L, heads · d], after rotary
    middle: Tensor  # what the MLP was given


@dataclass
class Sequence:
    """One prompt with its answer inside the LLM.

    Attributes:
        rows: `[L, D]` hidden states.
        planes: `[levels, L, D]`, deepstack features still to be added; zero on text.
        positions: `[axes, L]`.
        images: rows of each image's tokens.
        words: rows of the user's words.
        prompt: rows before the answer.
        left: per image, original indices of its tokens.
        mixed: per image, `[slots, tokens at the LLM's entry]`, what the stages made of them.
        places: per image, (height, width).
    """

    rows: Tensor
    planes: Tensor
    positions: Tensor
    images: list[list[int]]
    words: list[int]
    prompt: int
    left: list[list[int]]
    mixed: list[Tensor]
    places: list[tuple[int, int]]
    entry: Tensor
    entry_images: list[list[int]]
    entry_words: list[int]
    seen: list[Block] = field(default_factory=list)
    counts: list[list[int]] = field(default_factory=list)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def rotary(decoder, sequence: Sequence) -> tuple[Tensor, Tensor]:
    ids = sequence.positions[:, None] if len(sequence.positions) == 3 else sequence.positions
    cos, sin = decoder.rotary_emb(sequence.rows, ids)
    return cos[0], sin[0]


def attend(decoder, number: int, sequence: Sequence, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output, probabilities and keys of one block's attention on normed rows, written out."""
    module = decoder.layers[number].self_attn
    size, (cos, sin) = module.head_dim, rotary(decoder, sequence)

    def heads(projection, norm) -> Tensor:
        x = projection(rows).view(len(rows), -1, size)
        return (norm(x) if norm is not None else x).transpose(0, 1)

    q = turn(heads(module.q_proj, getattr(module, "q_norm", None)), cos, sin)
    k = turn(heads(module.k_proj, getattr(module, "k_norm", None)), cos, sin)
    v = heads(module.v_proj, None)
    groups = len(q) // len(k)
    scores = q @ k.repeat_interleave(groups, 0).transpose(-1, -2) / size**0.5
    future = torch.ones(len(rows), len(rows)).triu(1).bool()
    weights = scores.masked_fill(future, -torch.inf).softmax(-1)
    out = weights @ v.repeat_interleave(groups, 0)
    return module.o_proj(out.transpose(0, 1).flatten(1)), weights, k.transpose(0, 1).flatten(1)


def enter(model, family: str, sample: Sample, kept, encoded, policy: str, answer: list[int]) -> Sequence:
    """The sequence at the LLM's entry: of every image only the tokens ``kept`` stand in it, with ``encoded`` rows."""
    stay = reference.columns(sample, kept)
    ids = torch.tensor([*(sample.ids[column] for column in stay), *answer])
    visual = (ids == IMAGE) & (torch.arange(len(ids)) < len(stay))  # an answer may hold any id
    embeds = model.get_input_embeddings()(ids)
    levels = len(encoded[0].planes) if encoded else 0
    planes = torch.zeros(levels, *embeds.shape)
    if encoded:
        embeds[visual] = torch.cat([e.rows for e in encoded])
        for level in range(levels):
            planes[level][visual] = torch.cat([e.planes[level] for e in encoded])
    positions, following = reference.positions(family, sample)
    positions = positions[:, stay]
    if policy == "contiguous" and len(stay) < len(sample.ids):
        positions, following = torch.arange(len(stay)).expand_as(positions), len(stay)
    tail = torch.arange(following, following + len(answer)).expand(len(positions), -1)
    images, rows = [], iter(visual.nonzero().flatten().tolist())
    for indices in kept:
        images.append([next(rows) for _ in indices])
    first = images[0][0] if images else 0
    prompt = len(stay)
    words = [i for i in range(first, prompt) if 5 <= int(ids[i]) < 190]
    left = [[int(i) for i in indices] for indices in kept]
    places = [image.grid for image in sample.images]
    return Sequence(
        embeds, planes, torch.cat([positions, tail], 1), images, words, prompt, left,
        [torch.eye(len(image)) for image in images], places, embeds, [list(i) for i in images], list(words),
    )  # fmt: skip


def leave(sequence: Sequence, matrices: list[Tensor], anchors: list[list[int]], policy: str) -> None:
    """Apply W `[K, N]` to each image; its slots stand at ``anchors`` (numbers among its tokens)."""
    rows, planes = sequence.rows.clone(), sequence.planes.clone()
    gone: set[int] = set()
    for number, (matrix, slots) in enumerate(zip(matrices, anchors, strict=True)):
        image = sequence.images[number]
        places = [image[a] for a in slots]
        rows[places] = matrix @ sequence.rows[image]
        planes[:, places] = matrix @ sequence.planes[:, image]
        sequence.mixed[number] = matrix @ sequence.mixed[number]
        gone |= set(image) - set(places)
        sequence.images[number] = places
        sequence.left[number] = [sequence.left[number][a] for a in slots]
    stay = [i for i in range(len(rows)) if i not in gone]
    number_of = {old: new for new, old in enumerate(stay)}
    sequence.rows, sequence.planes, sequence.positions = rows[stay], planes[:, stay], sequence.positions[:, stay]
    sequence.images = [[number_of[i] for i in image] for image in sequence.images]
    sequence.words = [number_of[i] for i in sequence.words]
    sequence.prompt -= len(gone)
    if policy == "contiguous" and gone:
        sequence.positions = torch.arange(len(stay)).expand_as(sequence.positions)


@torch.no_grad()
def run(model, family, sample, rule, kept, encoded, policy: str, answer: list[int]) -> tuple[Tensor, Sequence]:
    """Logits after the prompt and after each token of the answer; and the sequence at the end.

    Before each of its ``stages``, ``rule(stage, sequence, number, decoder)`` decides for image ``number``: W `[K, N]`
    and the anchors of its rows.
    """
    decoder = model.model.language_model
    sequence = enter(model, family, sample, kept, encoded, policy, answer)
    for number, block in enumerate(decoder.layers):
        if number in rule.stages:
            stage = rule.stages.index(number)
            decisions = [rule(stage, sequence, i, decoder) for i in range(len(sequence.images))]
            leave(sequence, [m for m, _ in decisions], [a for _, a in decisions], policy)
        sequence.counts.append([len(image) for image in sequence.images])
        entered = sequence.rows
        out, weights, keys = attend(decoder, number, sequence, block.input_layernorm(entered))
        middle = block.post_attention_layernorm(entered + out)
        sequence.rows = entered + out + block.mlp(middle)
        sequence.seen.append(Block(entered, weights, keys, middle))
        if number < len(sequence.planes):
            sequence.rows = sequence.rows + sequence.planes[number]
    logits = model.lm_head(decoder.norm(sequence.rows))
    assert family in QWEN or len(sequence.positions) == 1
    return logits[sequence.prompt - 1 :], sequence
