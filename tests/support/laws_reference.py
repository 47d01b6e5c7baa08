"""The hand reference: the unmodified language model, fed one sample at a time with embeddings put together here.

Nothing of the engine is used: text and images are merged, M-RoPE ids counted, deepstack planes aligned and images
resized by the code of this file. One forward over prompt and answer gives the logits of every greedy step, because the
model is causal: no cache, no padding, no mask but ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from tests.support.laws_tiny import IMAGE, LLAVA, QWEN, Image, Sample

NOISE = 1e-4  # float32, on logits with a standard deviation of about 2


@dataclass(frozen=True, eq=False)
class Encoded:
    """Features of one image as the language model takes them, and its deepstack planes."""

    rows: Tensor
    planes: list[Tensor]

    def mixed(self, matrix: Tensor) -> Encoded:
        return Encoded(matrix @ self.rows, [matrix @ plane for plane in self.planes])


@torch.no_grad()
def encode(model, family: str, image: Image, cells: tuple[int, int] | None = None) -> Encoded:
    """One image alone through tower and projector, resized to ``cells`` visual tokens first if asked."""
    if family in LLAVA:
        pixels, tower = image.pixels[None], model.model.vision_tower
        if cells is not None:
            size = [n * tower.config.patch_size for n in cells]
            pixels = interpolate(pixels, size, mode="bicubic", antialias=True)
        states = tower(pixels, output_hidden_states=True, interpolate_pos_encoding=cells is not None).hidden_states[-2]
        return Encoded(model.model.multi_modal_projector(states[:, family == "llava-clip" :])[0], [])
    patches, (h, w), patch = image.pixels, image.grid, model.config.vision_config.patch_size
    if cells is not None and cells != image.grid:
        picture = unpack(patches, (2 * h, 2 * w), patch)
        h, w = cells
        picture = interpolate(picture[None], (2 * h * patch, 2 * w * patch), mode="bicubic", antialias=True)[0]
        patches = pack(picture, patch)
    out = model.model.visual(patches, grid_thw=torch.tensor([[1, 2 * h, 2 * w]]))
    return Encoded(out.pooler_output, list(getattr(out, "deepstack_features", None) or []))


def patch_order(rows: int, columns: int):
    """Top-left corners (in patches) in the order Qwen packs them: 2x2 groups in raster order, raster inside."""
    for top in range(0, rows, 2):
        for left in range(0, columns, 2):
            for down in range(2):
                for right in range(2):
                    yield top + down, left + right


def unpack(patches: Tensor, grid: tuple[int, int], size: int) -> Tensor:
    """Packed patches of a still image to `[3, H, W]`, one patch at a time."""
    picture = torch.empty(3, grid[0] * size, grid[1] * size)
    for row, (y, x) in zip(patches, patch_order(*grid), strict=True):
        frames = row.view(3, 2, size, size)
        assert torch.equal(frames[:, 0], frames[:, 1])
        picture[:, y * size : (y + 1) * size, x * size : (x + 1) * size] = frames[:, 0]
    return picture


def pack(picture: Tensor, size: int) -> Tensor:
    """Inverse of :func:`unpack`."""
    corners = patch_order(picture.shape[1] // size, picture.shape[2] // size)
    patches = [picture[:, y * size : (y + 1) * size, x * size : (x + 1) * size] for y, x in corners]
    return torch.stack([patch[:, None].repeat(1, 2, 1, 1).flatten() for patch in patches])


def positions(family: str, sample: Sample) -> tuple[Tensor, int]:
    """Position ids `[axes, L]` of the whole prompt, and the id of the token after it."""
    if family not in QWEN:
        return torch.arange(len(sample.ids))[None], len(sample.ids)
    ids, images, out, column, at = sample.ids, iter(sample.images), [], 0, 0
    while column < len(ids):
        if ids[column] != IMAGE:
            out.append((at, at, at))
            at, column = at + 1, column + 1
            continue
        h, w = next(images).grid
        out += [(at, at + y, at + x) for y in range(h) for x in range(w)]
        at, column = at + max(h, w), column + h * w
    return torch.tensor(out).T, at


def largest_grid(grid: tuple[int, int], budget: int) -> tuple[int, int]:
    """By trying all: the grid of at most ``budget`` cells that holds most tokens at the shape of ``grid``.

    A grid twice as stretched counts half its cells; of equals the one with more cells, then with fewer rows.
    """
    every = [(h, w) for h in range(1, grid[0] + 1) for w in range(1, grid[1] + 1) if h * w <= budget]

    def value(cells: tuple[int, int]) -> tuple[Fraction, int, int]:
        stretch = Fraction(cells[0] * grid[1], cells[1] * grid[0])
        return cells[0] * cells[1] * min(stretch, 1 / stretch), cells[0] * cells[1], -cells[0]

    return max(every, key=value)


def area_matrix(grid: tuple[int, int], cells: tuple[int, int]) -> Tensor:
    """Average pooling to any smaller grid, `[cells, tokens]`: repeat every token until plain pooling fits."""
    one_hot = torch.eye(grid[0] * grid[1]).view(-1, 1, *grid)
    fine = one_hot.repeat_interleave(cells[0], 2).repeat_interleave(cells[1], 3)
    return avg_pool2d(fine, grid).flatten(1).T


@torch.no_grad()
def logits(model, family, sample: Sample, kept, encoded, policy: str, answer: list[int]) -> Tensor:
    """Logits after the prompt and after each token of ``answer``, `[1 + len(answer), vocabulary]`.

    Args:
        kept: per image, original indices of the tokens that stand in the sequence.
        encoded: per image, the rows to put there.
        policy: "original" or "contiguous".
    """
    everything = full_logits(model, family, sample, kept, encoded, policy, answer)
    return everything[-1 - len(answer) :]


def columns(sample: Sample, kept) -> list[int]:
    """Columns of the prompt that stay."""
    stay, column, shown = [], 0, iter(zip(sample.images, kept, strict=True))
    while column < len(sample.ids):
        if sample.ids[column] != IMAGE:
            stay.append(column)
            column += 1
            continue
        image, indices = next(shown)
        stay += [column + int(i) for i in indices]
        column += image.tokens
    return stay


def full_logits(model, family, sample: Sample, kept, encoded, policy: str, answer: list[int]) -> Tensor:
    """Logits of every kept column and of the answer; differentiable."""
    stay = columns(sample, kept)
    ids = torch.tensor(sample.ids)[stay]
    visual = ids == IMAGE
    embeds = model.get_input_embeddings()(ids)
    if encoded:
        embeds = embeds.masked_scatter(visual[:, None], torch.cat([e.rows for e in encoded]))
    numbered, following = positions(family, sample)
    numbered = numbered[:, stay]
    dropped = len(stay) < len(sample.ids)
    if policy == "contiguous" and dropped:
        numbered, following = torch.arange(len(stay)).expand_as(numbered), len(stay)
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
    return model.lm_head(out.last_hidden_state[0])
