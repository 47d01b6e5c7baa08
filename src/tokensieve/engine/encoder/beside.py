"""Rows of a net that read the patches beside the layers of a vision encoder, which never see them (isolated attention).

Such a row passes through the layers as a patch does: norms, projections and MLP are the layer's own. It attends to all
patches as they enter the layer, to itself, and to the rows before it, so that the first of the rows do not depend on
how many there are. The patches run in the layer's own forward. They stay the same to the last bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from tokensieve.engine.inflight import InFlight
from tokensieve.errors import Refusal
from tokensieve.methods import EncoderMethod, Method
from tokensieve.models import Family
from tokensieve.models.vit import VitLayer


@dataclass(eq=False)
class RowsBeside:
    """The rows beside the layers in one call of the vision encoder.

    Attributes:
        rows: `[images, S, C]`; ``None`` before the first layer.
        patches: the keys and the values of the patches in the running layer, `[images, n, C]` each.
        running: the rows run through the layer, whose projections are not read then.
    """

    rows: Tensor | None = None
    patches: dict[str, Tensor] = field(default_factory=dict)
    running: bool = False


class BesideHooks:
    """Hooks on the layers of one vision encoder, which run the parameter ``rows_beside`` `[S, C]` of a net beside them.

    Args:
        methods: those that are attached.
        method: the connector method that requests the rows.

    Raises:
        Refusal: if the vision encoder is not a plain ViT, tokens leave inside it, or the rows have another width.
    """

    def __init__(
        self, family: Family, model: Any, methods: Sequence[Method], method: Method, net: nn.Module, flight: InFlight
    ) -> None:
        self.tower: Any = family.tower(model)
        layers = family.vit_layers(self.tower)
        if not layers:
            raise Refusal(
                f"the net of {method.info.name} reads beside the layers of the vision encoder, which is supported in "
                f"LLaVA with CLIP or SigLIP; got {family.title}"
            )
        inside = next((stage for stage in methods if isinstance(stage, EncoderMethod)), None)
        if inside is not None:
            raise Refusal(
                f"{method.info.name} reads all patches in the vision encoder, inside which {inside} drops some"
            )
        rows: Any = net.rows_beside
        config: Any = self.tower.config
        width = config.hidden_size
        if rows.shape[-1] != width:
            raise Refusal(
                f"{method.info.name} needs one layer of the vision encoder, of width {width}, before the projector; "
                f"this model has {rows.shape[-1]} there: set one vision_feature_layer in its config"
            )
        self.net, self.flight, self._handles = net, flight, list[Any]()
        for number, vit in enumerate(layers[: family.layers_used(model)]):
            attention: Any = vit.attention
            self._handles += [
                attention.k_proj.register_forward_hook(partial(self._keep, "key")),
                attention.v_proj.register_forward_hook(partial(self._keep, "value")),
                vit.layer.register_forward_hook(partial(self._after_layer, number, vit)),
            ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    @property
    def _pass(self) -> RowsBeside | None:
        call = self.flight.encoding
        return None if call is None or self.flight.paused else call.beside

    def _keep(self, name: str, projection: nn.Module, args: Any, output: Tensor) -> None:
        beside = self._pass
        if beside is not None and not beside.running:
            beside.patches[name] = output

    def _after_layer(self, number: int, vit: VitLayer, layer: nn.Module, args: Any, output: Tensor) -> None:
        beside = self._pass
        if beside is None:
            return
        if number == 0:
            beside.rows = self._entered(output)
        assert beside.rows is not None
        beside.running = True
        try:
            beside.rows = _step(vit, beside.rows, beside.patches["key"], beside.patches["value"])
        finally:
            beside.running = False
            beside.patches.clear()

    def _entered(self, patches: Tensor) -> Tensor:
        """Return the rows as they enter the first layer: without positions, and behind CLIP's first norm."""
        rows = self.net.to(patches.device).rows_beside
        assert isinstance(rows, Tensor)
        rows = rows.to(patches.dtype).expand(len(patches), -1, -1)
        norm = getattr(self.tower, "pre_layrnorm", None)
        return rows if norm is None else norm(rows)


def _step(vit: VitLayer, rows: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Run rows `[B, S, C]` through one layer, beside patches with these keys and values `[B, n, C]`."""
    layer: Any = vit.layer
    attention: Any = vit.attention
    normed = layer.layer_norm1(rows)
    projected = (attention.q_proj(normed), attention.k_proj(normed), attention.v_proj(normed))
    joined = projected[0], torch.cat([keys, projected[1]], 1), torch.cat([values, projected[2]], 1)
    query, key, value = (part.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for part in joined)
    count, patches = rows.shape[1], keys.shape[1]
    before = torch.ones(count, patches + count, dtype=torch.bool, device=rows.device).tril(patches)
    mixed = scaled_dot_product_attention(query, key, value, before, scale=attention.scale)
    rows = rows + attention.out_proj(mixed.transpose(1, 2).flatten(2))
    passed: Tensor = rows + vit.mlp(vit.norm(rows))
    return passed
