"""Stand-ins for the timm towers of FastVLM and PerceptionLM, which transformers only builds where timm is installed.

They have the interface of transformers' ``timm_wrapper``: no choice of attention kernel, and for FastVLM a feature map.
Their attention goes by the names of timm's: fused, it calls torch's kernel; else the matrix passes ``attn_drop``.
Patches meet in attention only, so that a test can tell which of them a visual token shows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling


class TinyTowerConfig(PreTrainedConfig):
    model_type = "tiny_timm"
    hidden_size: int = 32
    convolutional: bool = False
    class_token: bool = True

    @property
    def model_args(self) -> dict:
        return {"embed_dim": self.hidden_size}


class Attention(nn.Module):
    """Of rows `[B, n, C]` or a map `[B, C, H, W]`; patches are rotated, special tokens before them are not."""

    def __init__(self, dim: int, heads: int, specials: int = 0) -> None:
        super().__init__()
        self.num_heads, self.num_prefix_tokens, self.scale = heads, specials, (dim // heads) ** -0.5
        self.fused_attn = True
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.q_norm, self.k_norm = nn.LayerNorm(dim // heads), nn.LayerNorm(dim // heads)
        self.attn_drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        rows = x if x.ndim == 3 else x.flatten(2).transpose(1, 2)
        query, key, value = self.qkv(rows).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query, key = self.rotated(self.q_norm(query)), self.rotated(self.k_norm(key))
        if self.fused_attn:
            mixed = scaled_dot_product_attention(query, key, value)
        else:
            mixed = self.attn_drop((query * self.scale @ key.transpose(-2, -1)).softmax(-1)) @ value
        out = self.proj(mixed.transpose(1, 2).flatten(2))
        return out if x.ndim == 3 else out.transpose(1, 2).reshape(x.shape)

    def rotated(self, heads: Tensor) -> Tensor:
        special, patches = heads.split([self.num_prefix_tokens, heads.shape[-2] - self.num_prefix_tokens], -2)
        angle = 0.1 * torch.arange(patches.shape[-2])[:, None]
        a, b = patches.chunk(2, -1)
        turned = torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)
        return torch.cat([special, turned], -2)


class Block(nn.Module):
    def __init__(self, dim: int, specials: int) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(dim), Attention(dim, 4, specials)
        self.mlp = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 64), nn.GELU(), nn.Linear(64, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm(x))
        return x + self.mlp(x)


class Stage(nn.Module):
    def __init__(self, before: int, dim: int, stride: int, depth: int) -> None:
        super().__init__()
        self.downsample = nn.Conv2d(before, dim, stride, stride)
        mixers = [
            nn.ModuleDict({"token_mixer": Attention(dim, 4), "mlp": nn.Conv2d(dim, dim, 1)}) for _ in range(depth)
        ]
        self.blocks = nn.Sequential(*mixers)

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        for block in self.blocks:
            x = torch.tanh(x + block["token_mixer"](x))
            x = torch.tanh(x + block["mlp"](x))
        return x


class PerceptionEncoder(nn.Module):
    def __init__(self, dim: int, class_token: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, dim, 14, 14)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if class_token else None
        self.blocks = nn.ModuleList(Block(dim, int(class_token)) for _ in range(4))

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        return x


class FastVit(nn.Module):
    """Its first stage attends, too, between cells a quarter of the size."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.stages = nn.Sequential(Stage(3, dim, 7, 1), Stage(dim, dim, 2, 3))
        self.final_conv = nn.Conv2d(dim, dim, 1)

    def forward_features(self, x: Tensor) -> Tensor:
        return torch.tanh(self.final_conv(self.stages(x)))


class TinyTower(PreTrainedModel):
    config_class = TinyTowerConfig
    main_input_name = "pixel_values"
    _supports_sdpa = True

    def __init__(self, config: TinyTowerConfig) -> None:
        super().__init__(config)
        dim = config.hidden_size
        self.timm_model = FastVit(dim) if config.convolutional else PerceptionEncoder(dim, config.class_token)
        self.post_init()

    def forward(self, pixel_values: Tensor, **kwargs) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(last_hidden_state=self.timm_model.forward_features(pixel_values))


AutoConfig.register("tiny_timm", TinyTowerConfig)
AutoModel.register(TinyTowerConfig, TinyTower)
