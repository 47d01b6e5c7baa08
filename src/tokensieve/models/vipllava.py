"""VipLLaVA: LLaVA-1.5 with the features of several CLIP layers side by side."""

from tokensieve.models.family import Family


class VipLlava(Family):
    name = "vipllava"
    title = "VipLLaVA"
    model_types = ("vipllava",)
