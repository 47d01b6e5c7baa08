"""VipLLaVA: LLaVA-1.5 with the concatenated features of several CLIP layers."""

from tokensieve.models.family import Family


class VipLlava(Family):
    name = "vipllava"
    title = "VipLLaVA"
    model_types = ("vipllava",)
