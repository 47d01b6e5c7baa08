"""Find SparseVLM's raters, the words that resemble the image, for all of its methods."""

import torch
from torch import Tensor

from tokensieve.tokens import DecoderTokens, given


def raters(image: DecoderTokens) -> Tensor:
    """Return the words that rate, `[B, M]` bool: those above the mean in the softmax over all words.

    The softmax is that of the dot products of LLM input embeddings, averaged over the visual tokens. If no word is
    above the mean, all of them rate.
    """
    text = given(image.user_text)
    visual_rows, text_rows = given(image.input_embeddings).float(), given(text.input_embeddings).float()
    logits = (visual_rows @ text_rows.transpose(-1, -2)).masked_fill(~text.mask[:, None], -torch.inf)
    share = logits.softmax(-1).mean(1)
    above = text.mask & (share > share.sum(-1, keepdim=True) / text.mask.sum(-1, keepdim=True))
    return above | (text.mask & ~above.any(-1, keepdim=True))


def rater_attention(image: DecoderTokens) -> tuple[Tensor, Tensor]:
    """Return the attention of the raters, mean over heads, `[B, M, N]` with zeros for other words, and the raters."""
    is_rater = raters(image)
    return given(image.attention).mean(1).masked_fill(~is_rater[..., None], 0), is_rater
