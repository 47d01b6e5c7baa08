"""SparseVLM's raters, which all its methods go by: the words that see the image."""

import torch
from torch import Tensor

from tokensieve.tokens import DecoderTokens, given


def raters(image: DecoderTokens) -> Tensor:
    """The words that rate, `[B, M]` bool: of all words' softmax over the text at the LLM's entry, those above the mean.

    The softmax is averaged over the visual tokens. Where no word is above the mean, all of them rate.
    """
    user_text = given(image.user_text)
    mask = user_text.mask
    visual, text = given(image.input_embeddings).float(), given(user_text.input_embeddings).float()
    share = (visual @ text.transpose(-1, -2)).masked_fill(~mask[:, None], -torch.inf).softmax(-1).mean(1)
    above = mask & (share > share.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True))
    return above | (mask & ~above.any(-1, keepdim=True))


def rated(image: DecoderTokens) -> tuple[Tensor, Tensor]:
    """What the raters attend to, mean over heads, `[B, M, N]` with zeros for other words; and the raters."""
    by = raters(image)
    return given(image.attention).mean(1).masked_fill(~by[..., None], 0), by
