"""The hand reference for videos: the unmodified language model, fed one sample at a time, put together here.

Nothing of the engine is used. One forward over prompt and answer gives the logits of every greedy step, because the
model is causal: no cache, no padding, no mask but ones.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from tests.support.laws_reference import Encoded
from tests.support.laws_tiny import IMAGE, VIDEO
from tests.support.video_models import QWEN, SIDE, TIMED, Sample, Shown, collate


@torch.no_grad()
def encode(model, family: str, one: Shown) -> Encoded:
    """One image or video alone through tower and projector: a row for each of its placeholders."""
    base = model.model
    if family in QWEN:
        grid = torch.tensor([[one.frames, 2 * one.grid[0], 2 * one.grid[1]]])
        out = base.visual(one.pixels, grid_thw=grid)
        return Encoded(out.pooler_output, list(getattr(out, "deepstack_features", None) or []))
    if one.kind == "image":
        given = collate(family, [Sample([1], [one])])
        names = {name: given[name] for name in ("pixel_values", "image_sizes") if name in given}
        return Encoded(base.get_image_features(**names, return_dict=True).pooler_output[0], [])
    tower = base.video_tower if family == "video-llava" else base.vision_tower
    layer = -1 if family == "llava-onevision" else -2
    states = tower(one.pixels, output_hidden_states=True).hidden_states[layer]
    project = base.multi_modal_projector
    if family == "video-llava":
        return Encoded(project(states).flatten(0, 1), [])
    side = SIDE[family]
    if family == "llava-next-video":  # average pooling, then the projector
        blocks = states[:, 1:].view(one.frames, side // 2, 2, side // 2, 2, -1).mean((2, 4))
        return Encoded(project(blocks).flatten(0, 2), [])
    planes = project(states).view(one.frames, side, side, -1).permute(0, 3, 1, 2)
    smaller = interpolate(planes, size=one.grid, mode="bilinear").permute(0, 2, 3, 1).flatten(0, 2)
    return Encoded(torch.cat([smaller, base.image_newline[None]]), [])


def positions(family: str, sample: Sample) -> tuple[Tensor, int]:
    """Position ids `[axes, L]` of the whole prompt, and the id of the token after it."""
    if family not in QWEN:
        return torch.arange(len(sample.ids))[None], len(sample.ids)
    shown, out, at, column, frame = iter(sample.shown), [], 0, 0, 0
    one = None
    while column < len(sample.ids):
        if sample.ids[column] not in (IMAGE, VIDEO):
            out.append((at, at, at))
            at, column = at + 1, column + 1
            continue
        if one is None:
            one, frame = next(shown), 0
        h, w = one.grid
        # with timestamps each frame is numbered by itself; else Qwen2.5-VL counts four steps a frame, Qwen2-VL one
        step, frames = (0, 1) if family in TIMED else ({"qwen2-vl": 1, "qwen2.5-vl": 4}[family], one.frames)
        out += [(at + t * step, at + y, at + x) for t in range(frames) for y in range(h) for x in range(w)]
        at, column, frame = at + max(h, w), column + frames * h * w, frame + frames
        one = None if frame == one.frames else one
    return torch.tensor(out).T, at  # generate() counts on from the last column, even if a late frame's id is larger


@torch.no_grad()
def logits(model, family: str, sample: Sample, kept, encoded, policy: str, answer: list[int]) -> Tensor:
    """Logits after the prompt and after each token of ``answer``, `[1 + len(answer), vocabulary]`.

    Args:
        kept: for each thing shown, original indices of the tokens that stand in the sequence.
        encoded: for each, the rows to put there.
        policy: "original" or "contiguous".
    """
    ids = torch.tensor(sample.ids)
    stay = torch.ones_like(ids, dtype=torch.bool)
    placeholders = ((ids == IMAGE) | (ids == VIDEO)).nonzero().squeeze(-1)
    first = 0
    for one, indices in zip(sample.shown, kept, strict=True):
        own = placeholders[first : first + one.tokens]
        stay[own] = False
        stay[own[indices]] = True
        first += one.tokens
    ids, (numbered, following) = ids[stay], positions(family, sample)
    numbered = numbered[:, stay]
    if policy == "contiguous" and not bool(stay.all()):
        numbered, following = torch.arange(len(ids)).expand_as(numbered), len(ids)
    visual, embeds = (ids == IMAGE) | (ids == VIDEO), model.get_input_embeddings()(ids)
    if encoded:
        embeds[visual] = torch.cat([e.rows for e in encoded])
    if answer:
        embeds = torch.cat([embeds, model.get_input_embeddings()(torch.tensor(answer))])
        tail = torch.arange(following, following + len(answer)).expand(len(numbered), -1)
        numbered = torch.cat([numbered, tail], 1)
    deepstack = {}
    if encoded and encoded[0].planes:
        mask = torch.cat([visual, torch.zeros(len(answer), dtype=torch.bool)])[None]
        levels = zip(*(e.planes for e in encoded), strict=True)
        deepstack = {"visual_pos_masks": mask, "deepstack_visual_embeds": [torch.cat(level) for level in levels]}
    out = model.model.language_model(
        inputs_embeds=embeds[None],
        position_ids=numbered[:, None] if family in QWEN else numbered,
        attention_mask=torch.ones(1, len(embeds), dtype=torch.long),
        use_cache=False,
        **deepstack,
    )
    return model.lm_head(out.last_hidden_state[0])[-1 - len(answer) :]
