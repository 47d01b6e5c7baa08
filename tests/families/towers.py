"""Stand-ins for the timm towers of FastVLM and PerceptionLM, which transformers only builds where timm is installed.

They have the interface of transformers' ``timm_wrapper``: no choice of attention kernel, and for FastVLM a feature map.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling


class TinyTowerConfig(PreTrainedConfig):
    model_type = "tiny_timm"
    hidden_size: int = 32
    patch_size: int = 14
    image_size: int = 70
    convolutional: bool = False

    @property
    def model_args(self) -> dict:
        return {"embed_dim": self.hidden_size}


class TinyTower(PreTrainedModel):
    config_class = TinyTowerConfig
    main_input_name = "pixel_values"
    _supports_sdpa = True

    def __init__(self, config: TinyTowerConfig) -> None:
        super().__init__(config)
        self.stem = nn.Conv2d(3, config.hidden_size, config.patch_size, config.patch_size)
        if config.convolutional:
            self.blocks = nn.ModuleList(nn.Conv2d(config.hidden_size, config.hidden_size, 3, padding=1) for _ in "ab")
        else:
            self.cls = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
            options = {"dim_feedforward": 64, "dropout": 0.0, "batch_first": True, "norm_first": True}
            self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(config.hidden_size, 4, **options) for _ in "ab")
        self.post_init()

    def forward(self, pixel_values: Tensor, **kwargs) -> BaseModelOutputWithPooling:
        states = self.stem(pixel_values)
        if not self.config.convolutional:
            states = torch.cat([self.cls.expand(len(states), -1, -1), states.flatten(2).transpose(1, 2)], 1)
        for block in self.blocks:
            states = torch.tanh(block(states)) if self.config.convolutional else block(states)
        return BaseModelOutputWithPooling(last_hidden_state=states)


AutoConfig.register("tiny_timm", TinyTowerConfig)
AutoModel.register(TinyTowerConfig, TinyTower)
