"""Inputs of vectors at published sizes, drawn by integer arithmetic: every release of torch draws the same numbers."""

import torch
from torch import Tensor, nn

WORD = 0xFFFFFFFF


def drawn(seed: int, *shape: int) -> Tensor:
    """Draw numbers in [−1, 1), multiples of 2⁻²³, float32."""
    number = torch.Size(shape).numel()
    x = torch.arange(number, dtype=torch.int64) + seed * 0x9E3779B1 & WORD
    for _ in range(2):  # a hash of 32 bits: no product reaches 2⁶³
        x = ((x >> 16) ^ x) * 0x45D9F3B & WORD
    return ((((x >> 16) ^ x) >> 8).float() / 2**23 - 1).view(shape)


def bells(seed: int, *shape: int) -> Tensor:
    """Draw numbers of a bell-shaped distribution: sums of four, in [−4, 4), of standard deviation 1.15."""
    return sum(drawn(4 * seed + part, *shape) for part in range(4))


def positive(seed: int, *shape: int) -> Tensor:
    """Draw attention-like numbers in [2⁻²⁴, 1], of which a few are much larger than the others."""
    return ((drawn(seed, *shape) + 1) / 2).square().square().clamp(min=2.0**-24)


def attention_rows(seed: int, batch: int, heads: int, total: int, levels: int = 0) -> Tensor:
    """Draw attention to N tokens, `[B, H, N]`; few ``levels`` make ties."""
    rows = positive(seed, batch, heads, total)
    return rows if not levels else (rows * levels).round() / levels


def rows_with_copies(seed: int, total: int, width: int, copies: int = 0, zeros: int = 0) -> Tensor:
    """Draw rows `[N, D]`, of which the last ``copies`` repeat the first ones and ``zeros`` more are zero."""
    rows = bells(seed, total, width)
    rows[total - copies :] = rows[:copies]
    rows[copies : copies + zeros] = 0
    return rows


def clip_rows(seed: int, frames: int, size: int, width: int, scene: int = 4, noise: float = 0.3) -> Tensor:
    """Draw a video `[T, n, D]` in scenes of ``scene`` frames; its first places stand still, the others vary."""
    rows = bells(seed, -(-frames // scene), size, width).repeat_interleave(scene, 0)[:frames]
    rows[:, size // 3 :] += noise * bells(seed + 1, frames, size - size // 3, width)
    return rows


def words_mask(words: int, lengths: list[int]) -> Tensor:
    """Return a mask `[B, words]`, 1 on the first ``lengths[b]`` words."""
    return (torch.arange(words) < torch.tensor(lengths)[:, None]).long()


def weights(seed: int, shapes: dict[str, tuple[int, ...]], sharp: float) -> dict[str, Tensor]:
    """Draw the weights of a layer by name: norms near 1, queries and keys up to ``sharp``, others up to 0.25."""
    out = {}
    for number, (name, shape) in enumerate(sorted(shapes.items())):
        scale = sharp if any(part in name for part in ("qkv", "self.query", "self.key", "q_proj", "k_proj")) else 0.25
        rows = drawn(seed * 100 + number, *shape) * scale
        out[name] = rows + 1 if "norm" in name.lower() and name.endswith("weight") else rows
    return out


def fill(encoder: nn.Module, seed: int, sharp: float) -> None:
    """Draw the weights of a CLIP vision encoder; its module may be wrapped as ``vision_model``."""
    own = {name.removeprefix("vision_model."): weight for name, weight in encoder.named_parameters()}
    for name, rows in weights(seed, {name: tuple(weight.shape) for name, weight in own.items()}, sharp).items():
        own[name].data.copy_(rows)
