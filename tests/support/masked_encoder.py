"""Qwen's vision encoders with some patches masked out: transformers' own full run, in which no query sees them.

This is the reference for a run on the other patches alone. Nothing of Tokensieve takes part.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.vision_utils import get_vision_window_index

from tests.support import models, prompts
from tests.support.families import Image, Sample
from tests.support.oracle import Encoded

FAMILIES = ("qwen2-vl", "qwen2.5-vl", "qwen3-vl", "qwen3.5")
PATCHES = 4  # of a visual token
NAME = "masked_for_tests"


def flat(image: Image, *areas: tuple[slice, slice]) -> Image:
    """Return the image with the first visual token of each area (rows, columns of tokens) repeated over the area."""
    assert image.grid is not None
    cells = image.pixels.clone().view(*image.grid, PATCHES, -1)
    for rows, columns in areas:
        cells[rows, columns] = cells[rows.start or 0, columns.start or 0].clone()
    return replace(image, inputs={**image.inputs, "pixel_values": cells.view(len(image.pixels), -1)})


def sample(name: str, text: tuple[int, ...], shapes: tuple[tuple[int, int], ...], seed: int, *areas: Any) -> Sample:
    """Return a prompt as ``prompts.sample`` does, with flat areas in each of its images."""
    made = prompts.sample(name, text, shapes, seed)
    return replace(made, images=[flat(image, *areas) for image in made.images])


@dataclass
class _Kept:
    """Which patches stay, `[P]` bool in the running order of the encoder, and how many of them were passed.

    ``weights`` are those of the latest sequence, `[H, P, P]`.
    """

    patches: Tensor
    passed: int = 0
    weights: Tensor = field(default_factory=lambda: torch.empty(0))


_kept: list[_Kept] = []


def _attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, scaling: float, **__: Any) -> Any:
    """Attend inside one sequence; the sequences of a layer come in the encoder's running order."""
    state, length = _kept[-1], key.shape[-2]
    seen = state.patches[state.passed : state.passed + length]
    state.passed = (state.passed + length) % len(state.patches)
    scores = query @ key.transpose(-1, -2) * scaling
    # not -inf: a window without a kept patch must not make NaN
    weights = scores.masked_fill(~seen, -1e9).softmax(-1)
    state.weights = weights[0]
    return (weights @ value).transpose(1, 2), None


@cache
def _model(name: str) -> Any:
    AttentionInterface.register(NAME, _attention)
    model = models.build(name)
    model.model.visual.config._attn_implementation = NAME
    return model


@contextmanager
def _masked(patches: Tensor) -> Iterator[_Kept]:
    _kept.append(_Kept(patches))
    try:
        yield _kept[-1]
    finally:
        assert _kept.pop().passed == 0


def encode(name: str, image: Image, kept: tuple[int, ...]) -> Encoded:
    """Return the features of the kept tokens of an image, and their deepstack planes, from the masked full run."""
    return _run(name, image, kept)[0]


def attention_received(name: str, image: Image, kept: tuple[int, ...]) -> Tensor:
    """Return the attention that each kept token receives in the last layer of the masked full run, `[K]`."""
    return _run(name, image, kept)[1]


@cache
@torch.no_grad()
def _run(name: str, image: Image, kept: tuple[int, ...]) -> tuple[Encoded, Tensor]:
    model, grid = _model(name), image.inputs["image_grid_thw"]
    order = running_order(name, grid)
    stays = torch.zeros(image.tokens, dtype=torch.bool).index_fill(0, torch.tensor(kept), True)[order]
    patches = stays.repeat_interleave(PATCHES)
    with _masked(patches) as state:
        out = model.model.visual(image.pixels, grid_thw=grid)
    planes = list(getattr(out, "deepstack_features", None) or [])
    # mean over heads and the queries that stay, then over the patches of each token
    received = state.weights[:, patches][:, :, patches].mean((0, 1)).view(-1, PATCHES).mean(1)
    rows = Encoded(out.pooler_output, planes).mixed(torch.eye(image.tokens)[list(kept)])
    return rows, received[order[stays].argsort()]


def running_order(name: str, grid: Tensor) -> Tensor:
    """Return the visual tokens in the order in which the encoder runs them: Qwen2.5-VL's window by window."""
    if name != "qwen2.5-vl":
        return torch.arange(int(grid.prod(-1).sum()) // PATCHES)
    config = _model(name).config.vision_config
    return get_vision_window_index(grid, 2, config.window_size, config.patch_size)[0]
