"""Small random videos in which some things stand still, as ConnectorTokens."""

import torch

from tokensieve.tokens import ByLayer, ConnectorTokens

DEPTH = 2


def clip(seed=0, frames=6, grid=(3, 4), batch=1, width=8, noise=0.3, dtype=torch.float32):
    """B videos of two scenes: the left half of the picture stands still up to noise, the rest is new in every frame."""
    g, (h, w) = torch.Generator().manual_seed(seed), grid

    def normal(*shape):
        return torch.randn(batch, *shape, generator=g)

    still = normal(2, h, w, width)
    scene = torch.tensor([0] * (frames // 2) + [1] * (frames - frames // 2))
    rows = still[:, scene] + noise * normal(frames, h, w, width)
    rows[:, :, :, w // 2 :] = normal(frames, h, w - w // 2, width)
    total = frames * h * w
    attention = ByLayer({DEPTH - 1: normal(frames, h * w).mul(2).softmax(-1).flatten(1)}, DEPTH)
    features = rows.view(batch, total, width).to(dtype)
    return ConnectorTokens(
        features, grid=(frames * h, w), frames=frames, cls_attention=attention, attention_received=attention
    )


def long_clip(frames, size, width, seed=0):
    """One video of ``frames`` frames of ``size`` tokens, about half of them still, in scenes of eight frames."""
    g = torch.Generator().manual_seed(seed)
    scenes = torch.randn(-(-frames // 8), size, width, generator=g)
    rows = scenes.repeat_interleave(8, 0)[:frames]
    moving = torch.rand(frames, size, generator=g) < 0.5
    rows[moving] = torch.randn(int(moving.sum()), width, generator=g)
    attention = ByLayer({DEPTH - 1: torch.rand(1, frames * size, generator=g)}, DEPTH)
    return ConnectorTokens(
        rows.view(1, -1, width), frames=frames, cls_attention=attention, attention_received=attention
    )
