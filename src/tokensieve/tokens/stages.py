"""The tokens of each stage: :class:`VisualTokens` and the evidence that a method can request there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from tokensieve.tokens.base import VisualTokens
from tokensieve.tokens.evidence import ByLayer, DecoderUserText, Tiles, UserText


@dataclass(frozen=True, eq=False, kw_only=True)
class ConnectorTokens(VisualTokens):
    """Tokens that are about to enter the LLM: the projector's rows.

    Attributes:
        cls_attention: by encoder layer `[B, N]`, the attention of the [CLS] token: post-softmax, mean over heads.
        cls_attention_single_head: by encoder layer `[B, N]`, the same with all heads joined into one.
        attention_received: by encoder layer `[B, N]`, the attention that each token receives: mean over heads and
            queries.
        encoder_keys: by encoder layer `[B, N, H, E]`, the keys.
        encoder_states: by encoder layer `[B, N, C]`, the hidden states that leave it.
        cls_similarity: `[B, N]`, cosine of each patch to the [CLS] token in the vision encoder's output.
        patches: `[B, N, C]`, the rows that enter the projector.
        project: the projector, from rows `[R, C]` like the patches to rows `[R, D]` like the features.
        rows_beside: `[B, S, C]`, the rows of the net that have passed the vision encoder's layers beside the patches.
        pixel_hash: `[B]` int64, a number that depends on the image's pixels alone.
        user_text: the user's words, as the LLM's input embeddings.
        tiles: where the vision encoder received the image in tiles; else ``None``.
    """

    cls_attention: ByLayer = field(default_factory=ByLayer)
    cls_attention_single_head: ByLayer = field(default_factory=ByLayer)
    attention_received: ByLayer = field(default_factory=ByLayer)
    encoder_keys: ByLayer = field(default_factory=ByLayer)
    encoder_states: ByLayer = field(default_factory=ByLayer)
    cls_similarity: Tensor | None = None
    patches: Tensor | None = None
    project: Callable[[Tensor], Tensor] | None = None
    rows_beside: Tensor | None = None
    pixel_hash: Tensor | None = None
    user_text: UserText | None = None
    tiles: Tiles | None = None

    other_shapes: ClassVar = ("pixel_hash", "rows_beside")


@dataclass(frozen=True, eq=False, kw_only=True)
class EncoderTokens(VisualTokens):
    """Tokens inside the vision encoder, with the evidence of the running layer.

    Attributes:
        sizes: `[B, N]` float32, the number of patches that each token stands for; ``None``: one each.
        specials: rows such as [CLS] that stand before the tokens and never leave.
        cls_attention, cls_attention_single_head, attention_received: `[B, N]`, as in :class:`ConnectorTokens`.
        encoder_keys, encoder_values: `[B, N, H, E]`.
        value_attention: `[B, N]`, the softmax of the products of the [CLS] token's value with all values, mean over
            heads; without [CLS], of every value, mean over them.
        earlier_scores: `[B, N]`, the scores of the method's last decision; ``None`` in the first of its layers.
        layers_to_come: later layers in which the method is called.
    """

    sizes: Tensor | None = None
    specials: int = 0
    cls_attention: Tensor | None = None
    cls_attention_single_head: Tensor | None = None
    attention_received: Tensor | None = None
    encoder_keys: Tensor | None = None
    encoder_values: Tensor | None = None
    value_attention: Tensor | None = None
    earlier_scores: Tensor | None = None
    layers_to_come: int = 0


@dataclass(frozen=True, eq=False, kw_only=True)
class DecoderTokens(VisualTokens):
    """Tokens inside the LLM; ``features`` are the hidden states that enter the layer before which tokens leave.

    Attributes:
        coordinates: `[B, N, 2]`, row and column of each token in its image, if the tokens once formed one grid.
        entered: tokens of each image that entered the LLM; ``None``: N.
        layer: the number of the layer before which tokens leave.
        attention: `[B, H, Q, N]`, post-softmax attention of the last token, or of each word, to the tokens.
        separator_attention: `[B, H, N]`, post-softmax attention of the token that follows the image, to its tokens.
        gradient: `[B, N, D]`, of the cross-entropy of the layer's own guess to ``features``.
        keys: `[B, N, E]`, key states with the heads side by side.
        layer_input: `[B, N, D]`, the hidden states that entered the previous layer.
        mlp_input: `[B, N, D]`, the rows that entered the MLP of the previous layer.
        input_embeddings: `[B, N0, D]`, the rows that entered the LLM, of all N0 tokens that entered.
        rope_gain: `[B, N, d]`, a vector of ones, rotated by the rotary embedding at each token's position.
        connector_scores: `[B, N]`, the scores that the connector method ranked the tokens by, if it did.
        query_attention: `[B, H, N]`, the attention of the net's learned query to the tokens, before or after a softmax.
        encoder_states: by encoder layer `[B, N, C]`, the hidden states that leave it.
        user_text: the hidden states of the user's words.
    """

    coordinates: Tensor | None = None
    entered: int | None = None
    layer: int = 0
    attention: Tensor | None = None
    separator_attention: Tensor | None = None
    gradient: Tensor | None = None
    keys: Tensor | None = None
    layer_input: Tensor | None = None
    mlp_input: Tensor | None = None
    input_embeddings: Tensor | None = None
    rope_gain: Tensor | None = None
    connector_scores: Tensor | None = None
    query_attention: Tensor | None = None
    encoder_states: ByLayer = field(default_factory=ByLayer)
    user_text: DecoderUserText | None = None

    other_shapes: ClassVar = ("attention", "separator_attention", "input_embeddings", "query_attention")
