"""PaliGemma: a SigLIP encoder and a linear projector; the prompt attends to itself in both directions."""

from tokensieve.models.family import Family


class PaliGemma(Family):
    name = "paligemma"
    title = "PaliGemma"
    model_types = ("paligemma",)
    per_layer_masks = True
    first_position = 1
