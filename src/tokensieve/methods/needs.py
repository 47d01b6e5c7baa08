"""The evidence that methods request, by stage: nothing else is computed.

These three classes are the table of evidence. Each field states how its evidence is read and how it is shown to users.
New evidence takes two edits: a field here, and the field of the same name in ``tokensieve.tokens``.
"""

# ruff: noqa: RUF009 (`evidence` makes dataclass fields, as `dataclasses.field` does)

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeAlias

from torch import Tensor

from tokensieve import ops
from tokensieve.tokens import Layers, resolve_layers

ReadAttention: TypeAlias = Callable[[Tensor, Tensor, float, Tensor | None], Tensor]
HiddenState: TypeAlias = Literal["LLM input", "layer input", "MLP input"]


@dataclass(frozen=True)
class Evidence:
    """The way to obtain one kind of evidence. At most one of ``read``, ``hidden`` and ``rope`` is set.

    Attributes:
        label: the name that users see; "" hides it.
        read: computes it from the queries, keys, scaling and mask of one attention module.
        read_without_cls: the same where the vision encoder has no [CLS] token.
        of_values: ``read`` receives the values in the place of queries and keys, and a scaling of 1.
        hidden: the hidden states in the LLM that it is a copy of.
        rope: computes it from the (cos, sin) of the LLM's rotary embedding.
        merged: a token that was merged inside the vision encoder has the sum, or the mean, of its members' evidence.
    """

    label: str = ""
    read: ReadAttention | None = None
    read_without_cls: ReadAttention | None = None
    of_values: bool = False
    hidden: HiddenState | None = None
    rope: Callable[[Tensor, Tensor], Tensor] | None = None
    merged: Literal["sum", "mean"] = "mean"


def evidence(label: str = "", *, default: Any = False, **ways: Any) -> Any:
    """Declare one field of a needs class; ``ways`` are the attributes of :class:`Evidence`."""
    return field(default=default, metadata={"evidence": Evidence(label, **ways)})


CLS_ATTENTION: dict[str, Any] = {
    "label": "[CLS] attention",
    "read": ops.attention_from_cls,
    "read_without_cls": ops.attention_received,
    "merged": "sum",
}
CLS_ATTENTION_SINGLE_HEAD = CLS_ATTENTION | {
    "read": ops.attention_from_cls_single_head,
    "read_without_cls": ops.attention_received_single_head,
}


@dataclass(frozen=True)
class StageNeeds:
    """Base of the needs of one stage; as it stands, nothing is requested."""

    @classmethod
    def table(cls) -> dict[str, Evidence]:
        """Return all evidence that can be requested at this stage, by name."""
        return {f.name: f.metadata["evidence"] for f in fields(cls)}

    def requests(self, name: str) -> bool:
        """Return whether this evidence is requested; False where the stage has no evidence of that name."""
        value = getattr(self, name, None)
        return value is not None and value is not False  # layer 0 is a request

    def requested(self) -> dict[str, Evidence]:
        """Return the requested evidence by name."""
        return {name: evidence for name, evidence in self.table().items() if self.requests(name)}

    @property
    def reads_attention(self) -> bool:
        """Whether queries or keys of an attention module must be read."""
        return any(evidence.read is not None for evidence in self.requested().values())

    def readers(self, has_cls: bool) -> dict[str, ReadAttention]:
        """Return the reader of each requested evidence; without [CLS], that of its substitute where there is one."""
        readers = {}
        for name, evidence in self.requested().items():
            read = evidence.read if has_cls or evidence.read_without_cls is None else evidence.read_without_cls
            if read is not None:
                readers[name] = read
        return readers

    def __str__(self) -> str:
        labels = [evidence.label.format(getattr(self, name)) for name, evidence in self.requested().items()]
        return ", ".join(filter(None, dict.fromkeys(labels))) or "nothing"


@dataclass(frozen=True)
class Needs(StageNeeds):
    """Evidence for a connector method. Layers are those of the vision encoder: negative ones count from the last, and a
    float is a share of the depth.

    Attributes:
        cls_attention: layers in which the attention of the [CLS] token is read: one, several or a slice.
        cls_attention_single_head: the same with all heads joined into one.
        attention_received: layers in which the attention that each token receives is read.
        encoder_keys: layers whose keys are read.
        encoder_states: layers whose output is read.
        cls_similarity: cosine of each patch to the [CLS] token in the vision encoder's output.
        patches: the rows that enter the projector.
        project: the projector, to run on other rows.
        rows_beside: the rows of the net's parameter ``rows_beside``, after they have read the patches in the layers.
        pixel_hash: a number that depends on the image's pixels alone.
        user_text: the embeddings of the user's words.
        grid: the tokens must form a grid.
        video: the tokens must be those of a video's frames; images stay whole.
    """

    cls_attention: Layers | None = evidence(default=None, **CLS_ATTENTION)
    cls_attention_single_head: Layers | None = evidence(default=None, **CLS_ATTENTION_SINGLE_HEAD)
    cls_similarity: bool = evidence("[CLS] similarity")
    attention_received: Layers | None = evidence(
        "attention received", default=None, read=ops.attention_received, merged="sum"
    )
    encoder_keys: Layers | None = evidence("encoder keys", default=None, read=ops.keys_by_head)
    encoder_states: Layers | None = evidence("encoder states", default=None)
    patches: bool = evidence("patches")
    project: bool = evidence("projector")
    rows_beside: bool = evidence("rows beside the encoder")
    pixel_hash: bool = evidence()
    user_text: bool = evidence("text")
    grid: bool = evidence("grid")
    video: bool = evidence("video")

    def readers_by_layer(self, depth: int, has_cls: bool) -> dict[int, dict[str, ReadAttention]]:
        """Return :meth:`readers` by layer of a vision encoder of ``depth`` layers."""
        by_layer: dict[int, dict[str, ReadAttention]] = {}
        for name, read in self.readers(has_cls).items():
            for layer in resolve_layers(getattr(self, name), depth):
                by_layer.setdefault(layer, {})[name] = read
        return by_layer


@dataclass(frozen=True)
class EncoderNeeds(StageNeeds):
    """Evidence for a method inside the vision encoder, read in the layer in which tokens leave.

    Attributes:
        cls_attention: the attention of the [CLS] token.
        cls_attention_single_head: the same with all heads joined into one.
        attention_received: the attention that each token receives.
        encoder_keys: the keys.
        encoder_values: the values.
        value_attention: the softmax of the products of the [CLS] token's value with all values.
        earlier_scores: the scores of the method's decision in the layer before.
        grid: the tokens must form a grid.
    """

    cls_attention: bool = evidence(**CLS_ATTENTION)
    cls_attention_single_head: bool = evidence(**CLS_ATTENTION_SINGLE_HEAD)
    attention_received: bool = evidence("attention received", read=ops.attention_received)
    encoder_keys: bool = evidence("encoder keys", read=ops.keys_by_head)
    encoder_values: bool = evidence("encoder values", read=ops.keys_by_head, of_values=True)
    value_attention: bool = evidence(
        "[CLS] attention by values",
        read=ops.attention_from_cls,
        read_without_cls=ops.attention_received,
        of_values=True,
    )
    earlier_scores: bool = evidence("earlier scores")
    grid: bool = evidence("grid")


@dataclass(frozen=True)
class DecoderNeeds(StageNeeds):
    """Evidence for a method inside the LLM, about the visual tokens and the user's words.

    Attributes:
        attention: attention rows of the last prompt token ("last") or of every word of the user ("words").
        separator_attention: attention rows of the token that follows each image, which sees no later word.
        side_blocks: read attention in the last block of the net: copies of layers, which run on a copy of the hidden
            states that enter the first layer before which tokens leave. At later layers there is no attention.
        same_layer: read attention and keys in the layer before which tokens leave (one extra partial forward). By
            default those of the previous layer are reused.
        gradient: the gradient of the layer's own guess to the hidden states that enter the layer before which tokens
            leave: of the cross-entropy at these places, counted from the end, with the likeliest words as labels.
        keys: the key states.
        layer_input: the hidden states that entered the previous layer.
        mlp_input: the rows that entered the MLP of the previous layer.
        input_embeddings: the rows that entered the LLM.
        final_norm: apply the LLM's final norm to the features.
        rope_gain: a vector of ones, rotated by the rotary embedding at each token's position.
        connector_scores: the scores that the connector method ranked the tokens by.
        query_attention: attention of the net's learned query, which stands behind the prompt, in the layer before
            tokens leave: its "logits" or the "log" of probabilities.
        encoder_states: layers of the vision encoder whose output is read, as in :class:`Needs`.
        user_text: the hidden states of the user's words; "all": of every token after the last image, with the chat
            template, and "words" are these tokens.
        grid: the coordinates of the tokens on their image's grid.
    """

    attention: Literal["last", "words"] | None = evidence("LLM attention of {}", default=None)
    separator_attention: bool = evidence("LLM attention of the token after the image")
    side_blocks: bool = evidence("blocks beside the LLM")
    same_layer: bool = evidence()
    gradient: tuple[int, ...] | None = evidence("gradient of the guess", default=None)
    keys: bool = evidence(read=ops.keys_joined)
    layer_input: bool = evidence(hidden="layer input")
    mlp_input: bool = evidence(hidden="MLP input")
    input_embeddings: bool = evidence(hidden="LLM input")
    final_norm: bool = evidence()
    rope_gain: bool = evidence(rope=ops.rope_gain)
    connector_scores: bool = evidence()
    query_attention: Literal["logits", "log"] | None = evidence("attention of a learned query", default=None)
    encoder_states: Layers | None = evidence("encoder states", default=None)
    user_text: bool | Literal["all"] = evidence("text")
    grid: bool = evidence("grid")

    @property
    def reads_attention(self) -> bool:
        return self.attention is not None or self.separator_attention or super().reads_attention
