"""The hand reference of every family: its unmodified language model, one sample at a time, no cache, no padding.

Nothing of the engine is used. Text and images are merged here, positions counted, masks written out, deepstack planes
aligned and, for methods inside the LLM, blocks called one by one. The tower and the projector are the model's own.

Prompt and answer are one sequence, and one pass gives the logits of every greedy step: no column of the prompt sees
what follows the prompt. That includes the second turn of a conversation, which is more answer.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.support.families import FAMILIES, IMAGE, Image, Sample, pictures


def noise(name: str) -> float:
    """What float32 may differ by, on logits with a standard deviation of about 2."""
    return 1e-3 if name == "qwen3.5" else 1e-4  # linear layers prefill in chunks and decode in steps


@dataclass(frozen=True, eq=False)
class Encoded:
    """Features of one image as the language model takes them, and its deepstack planes."""

    rows: Tensor
    planes: list[Tensor]

    def mixed(self, matrix: Tensor) -> Encoded:
        return Encoded(matrix @ self.rows, [matrix @ plane for plane in self.planes])


@torch.no_grad()
def encode(model: Any, name: str, sample: Sample) -> list[Encoded]:
    """The images of one sample through tower and projector."""
    if not sample.images:
        return []
    takes, given = inspect.signature(model.model.get_image_features).parameters, pictures(name, [sample])
    out = model.model.get_image_features(**{key: value for key, value in given.items() if key in takes})
    sizes = [image.tokens for image in sample.images]
    pooled = out.pooler_output
    rows = torch.cat([entry.flatten(0, -2) for entry in ([pooled] if isinstance(pooled, Tensor) else pooled)])
    levels = getattr(out, "deepstack_features", None) or []  # per level, one plane per image
    planes = [list(image) for image in zip(*levels, strict=True)] or [[] for _ in sizes]
    return [Encoded(*both) for both in zip(torch.split(rows, sizes), planes, strict=True)]


def language_model(model: Any) -> Any:
    return model.model.text_model if hasattr(model.model, "text_model") else model.model.language_model


def positions(name: str, sample: Sample) -> tuple[Tensor, int]:
    """Position ids `[axes, L]` of the whole prompt, and the id of the token after it."""
    family = FAMILIES[name]
    if family.axes == 1:
        return torch.arange(len(sample.ids))[None] + family.first_position, len(sample.ids) + family.first_position
    ids, images, out, column, at = sample.ids, iter(sample.images), [], 0, 0
    while column < len(ids):
        if ids[column] != IMAGE:
            out.append((at, at, at))
            at, column = at + 1, column + 1
            continue
        h, w = next(images).grid or (0, 0)
        out += [(at, at + y, at + x) for y in range(h) for x in range(w)]
        at, column = at + max(h, w), column + h * w
    return torch.tensor(out).T, at


def image_columns(sample: Sample) -> list[list[int]]:
    """Per image, the columns of the prompt where its tokens stand; marks may stand between."""
    columns, out = iter([column for column, i in enumerate(sample.ids) if i == IMAGE]), []
    for image in sample.images:
        out.append([next(columns) for _ in range(image.tokens)])
    return out


@dataclass
class Sequence:
    """One prompt with its answer, `[L, …]`.

    Attributes:
        rows: embeddings, or hidden states between blocks.
        planes: `[levels, L, D]`, deepstack features still to be added; zero on text.
        positions: `[axes, L]`.
        owner: `[L]`, number of the image that a row belongs to, −1: none.
        prompt: rows before the answer.
    """

    rows: Tensor
    planes: Tensor
    positions: Tensor
    owner: Tensor
    prompt: int

    def keep(self, stay: Tensor) -> None:
        """Only rows where ``stay`` `[L]` is True."""
        self.prompt = int(stay[: self.prompt].sum())
        self.rows, self.owner, self.positions = self.rows[stay], self.owner[stay], self.positions[:, stay]
        self.planes = self.planes[:, stay]


def enter(model: Any, name: str, sample: Sample, kept: Any, encoded: list[Encoded], answer: list[int]) -> Sequence:
    """The sequence at the LLM's entry: of each image only the tokens ``kept`` stand in it, with ``encoded`` rows."""
    columns = image_columns(sample)
    stand = [[own[int(i)] for i in indices] for own, indices in zip(columns, kept, strict=True)]
    gone = {column for own in columns for column in own} - {column for own in stand for column in own}
    stay = [column for column in range(len(sample.ids)) if column not in gone]
    ids = torch.tensor([*(sample.ids[column] for column in stay), *answer])
    embeds = model.get_input_embeddings()(ids)
    if name == "ovis2":  # the marks around an image have embeddings of the visual table
        table, marks = model.model.visual_embeddings_table.weight, model.config.visual_indicator_token_ids
        for number, mark in enumerate(marks):
            embeds[ids == mark] = table[len(table) - len(marks) + number]
    owner = torch.full((len(ids),), -1)
    planes = torch.zeros(len(encoded[0].planes) if encoded else 0, *embeds.shape)
    for number, own in enumerate(stand):
        places = [stay.index(column) for column in own]
        owner[places], embeds[places] = number, encoded[number].rows
        for level, plane in enumerate(encoded[number].planes):
            planes[level, places] = plane
    numbered, following = positions(name, sample)
    tail = torch.arange(following, following + len(answer)).expand(len(numbered), -1)
    return Sequence(embeds, planes, torch.cat([numbered[:, stay], tail], 1), owner, len(stay))


def masks(name: str, config: Any, sequence: Sequence) -> dict[str, Tensor]:
    """What may be attended to, `[1, 1, L, L]` additive, by kind of layer."""
    length = len(sequence.rows)
    query, key = torch.arange(length)[:, None], torch.arange(length)[None]
    block = torch.zeros(length, length, dtype=torch.bool)
    if FAMILIES[name].bidirectional == "image":
        block = (sequence.owner[:, None] == sequence.owner) & (sequence.owner >= 0)
    if FAMILIES[name].bidirectional == "prompt":
        block = (query < sequence.prompt) & (key < sequence.prompt)
    near = query - key < (getattr(config, "sliding_window", None) or length)
    if FAMILIES[name].bidirectional == "prompt":  # PaliGemma 2: whatever the distance
        seen = {"full_attention": (key <= query) | block, "sliding_attention": ((key <= query) & near) | block}
    else:
        seen = {"full_attention": (key <= query) | block, "sliding_attention": ((key <= query) | block) & near}
    return {kind: torch.zeros(1, 1, length, length).masked_fill(~allowed, -1e30) for kind, allowed in seen.items()}


def kinds(config: Any) -> list[str]:
    alike = "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"
    return getattr(config, "layer_types", None) or [alike] * config.num_hidden_layers


@torch.no_grad()
def forward(model: Any, name: str, sequence: Sequence) -> Tensor:
    """Logits `[L, vocabulary]` by one call of the language model."""
    decoder = language_model(model)
    mask = masks(name, decoder.config, sequence)
    every = set(kinds(decoder.config))
    deepstack = {}
    if len(sequence.planes):
        visual = sequence.owner >= 0
        deepstack = {"visual_pos_masks": visual[None], "deepstack_visual_embeds": list(sequence.planes[:, visual])}
    out = decoder(
        inputs_embeds=sequence.rows[None],
        position_ids=sequence.positions[:, None] if FAMILIES[name].axes == 3 else sequence.positions,
        attention_mask=mask[every.pop()] if len(every) == 1 else {**mask, "linear_attention": None},
        use_cache=False,
        **deepstack,
    )
    return model.lm_head(out.last_hidden_state[0])


@torch.no_grad()
def block_by_block(
    model: Any, name: str, sequence: Sequence, stages: dict[int, Tensor], policy: str = "original"
) -> Tensor:
    """Logits `[L', vocabulary]`, the blocks called one by one; before each of ``stages`` only some rows are left.

    Who sees whom is settled by the whole sequence: a window counts what left, too.
    """
    decoder, left = language_model(model), torch.arange(len(sequence.rows))
    whole = masks(name, decoder.config, sequence)
    for number, (block, kind) in enumerate(zip(decoder.layers, kinds(decoder.config), strict=True)):
        if number in stages:
            stay = stages[number][left]
            left = left[stay]
            sequence.keep(stay)
            if policy == "contiguous":
                sequence.positions = torch.arange(len(left)).expand_as(sequence.positions)
        ids = sequence.positions[:, None] if FAMILIES[name].axes == 3 else sequence.positions
        by_kind = "layer_type" in inspect.signature(decoder.rotary_emb.forward).parameters
        sequence.rows = block(
            sequence.rows[None],
            attention_mask=whole[kind][:, :, left][..., left],
            position_ids=sequence.positions[:1],
            position_embeddings=decoder.rotary_emb(sequence.rows[None], ids, *[kind] * by_kind),
        )[0]
        if number < len(sequence.planes):
            sequence.rows = sequence.rows + sequence.planes[number]
    return model.lm_head(decoder.norm(sequence.rows[None])[0])


def logits(model: Any, name: str, sample: Sample, kept: Any, encoded: list[Encoded], answer: list[int]) -> Tensor:
    """Logits after the prompt and after each token of ``answer``, `[1 + len(answer), vocabulary]`.

    Args:
        kept: per image, original indices of the tokens that stand in the sequence.
        encoded: per image, the rows to put there.
    """
    return forward(model, name, enter(model, name, sample, kept, encoded, answer))[-1 - len(answer) :]


def logits_inside(
    model: Any,
    name: str,
    sample: Sample,
    stages: dict[int, Any],
    answer: list[int],
    entered: Any = None,
    policy: str = "original",
) -> Tensor:
    """The same where tokens leave inside the LLM.

    Args:
        stages: before which blocks; per image, original indices of the tokens that are left then.
        entered: per image, original indices of the tokens that entered it; ``None``: all.
        policy: of positions.
    """
    entered = entered or [list(range(image.tokens)) for image in sample.images]
    features = [
        Encoded(e.rows[i], [p[i] for p in e.planes]) for e, i in zip(encode(model, name, sample), entered, strict=True)
    ]
    sequence = enter(model, name, sample, entered, features, answer)
    stays = {}
    for stage, kept in stages.items():
        stays[stage] = sequence.owner < 0
        for number, (before, after) in enumerate(zip(entered, kept, strict=True)):
            places = (sequence.owner == number).nonzero().flatten().tolist()
            stays[stage][[place for place, i in zip(places, before, strict=True) if i in after]] = True
    return block_by_block(model, name, sequence, stays, policy)[-1 - len(answer) :]


def attended(model: Any, name: str, sample: Sample, layer: int) -> list[Tensor]:
    """Attention of the last prompt token to each image's tokens in one block of the LLM, mean over heads."""
    weights = attention(model, name, sample, layer)
    return [weights[:, -1, own].mean(0) for own in image_columns(sample)]


@torch.no_grad()
def attention(model: Any, name: str, sample: Sample, layer: int) -> Tensor:
    """Attention in one block of the LLM, `[heads, L, L]`.

    ``model`` runs eager attention; nothing was dropped before.
    """
    whole = [range(image.tokens) for image in sample.images]
    sequence, seen = enter(model, name, sample, whole, encode(model, name, sample), []), []
    block = language_model(model).layers[layer].self_attn
    handle = block.register_forward_hook(lambda module, args, out: seen.append(out[1]))
    forward(model, name, sequence)
    handle.remove()
    return seen[0][0]


def rows_left(image: Image, kept: list[int]) -> set[int]:
    """Newline tokens whose row keeps a token."""
    left, first = set(), image.tokens if len(image.newlines) > 1 else 0
    if len(image.newlines) > 1:
        first = image.newlines[0] - (image.newlines[1] - image.newlines[0] - 1)
    for newline in image.newlines:
        if any(first <= i < newline for i in kept):
            left.add(newline)
        first = newline + 1
    return left
