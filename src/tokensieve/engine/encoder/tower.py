"""Hooks inside the vision encoder: tokens leave or merge between its layers, and later layers run on the rest.

A layer of a plain ViT ends with ``rows + mlp(norm(rows))`` and holds these rows itself. A hook before the norm can
therefore shorten the MLP's input, but not the rows that the MLP's output is added to. Three hooks solve this: the hook
before the norm makes the short rows, the hook after the MLP keeps its output, and the hook after the layer returns
their sum instead. All are forward hooks. No ``forward`` is replaced (a library that spreads a model over devices may
have replaced it already), the layer's own code runs, and hidden states that are recorded later are the short ones.

At the end of the vision encoder every recorded state gets its native shape back: rows at their anchors, zeros between.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from tokensieve.engine.encoder.steps import TowerPass, TowerStep, apply_decision
from tokensieve.engine.inflight import InFlight
from tokensieve.engine.prompt.placeholders import equal_groups
from tokensieve.errors import Refusal
from tokensieve.methods import EncoderMethod
from tokensieve.models import Family
from tokensieve.models.versions import checkpoints_activations
from tokensieve.models.vit import layers_used
from tokensieve.ops import mask_bias
from tokensieve.reduction import Reduction
from tokensieve.tokens import EncoderTokens


class TowerHooks:
    """Hooks on the layers of one vision encoder, for one encoder method.

    Raises:
        Refusal: if the vision encoder is not a plain ViT, or lacks a layer.
    """

    def __init__(
        self, family: Family, model: Any, method: EncoderMethod, flight: InFlight, net: nn.Module | None = None
    ) -> None:
        self.tower: Any = family.tower(model)
        self.net = net
        self.method, self.flight, self.specials = method, flight, int(family.has_cls(self.tower))
        self._vit_layers = family.vit_layers(self.tower)
        if not self._vit_layers:
            raise Refusal(
                f"{method} drops tokens between the layers of the vision encoder; not supported in {family.title}: "
                "its patches run packed, in windows"
            )
        self._used_by_config = partial(family.layers_used, model)
        self.layers_in_all, self.depth = len(self._vit_layers), self._used_by_config()
        self.layers = method.layer_numbers(self.depth)
        self._handles: list[Any] = []

    def install(self) -> None:
        for number, vit in enumerate(self._vit_layers):
            self._handles.append(vit.attention.register_forward_pre_hook(self._add_bias, with_kwargs=True))
            if number not in self.layers:
                continue
            if not self.method.after_layer:
                self._handles.append(vit.norm.register_forward_pre_hook(partial(self._before_norm, number)))
                self._handles.append(vit.mlp.register_forward_hook(self._after_mlp))
            self._handles.append(vit.layer.register_forward_hook(partial(self._after_layer, number), prepend=True))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    # -- around the vision encoder ------------------------------------------------------------------------------------

    def start(
        self, inputs: dict[str, Any], grid: tuple[int, int], features: int | list[int] | None = None
    ) -> TowerPass:
        """Start a call of the vision encoder.

        Args:
            inputs: the arguments of the vision encoder.
            grid: (height, width) in patches of each image.
            features: the hidden states that this call takes as features; ``None``: those of the config.

        Raises:
            Refusal: if the call cannot be reduced correctly; nothing has run then.
        """
        used = self._used_by_config() if features is None else layers_used(self.tower, features)
        if used != self.depth:
            raise Refusal(
                f"{self.method} was attached to {self.depth} layers of the vision encoder; this call takes its "
                f"features from layer {used - 1}: set vision_feature_layer in the model's config before attaching"
            )
        if self.tower.training and checkpoints_activations(self.tower):
            raise Refusal(
                "gradient checkpointing runs layers twice and would reduce twice; turn it off in the vision encoder"
            )
        pixels: Tensor = inputs["pixel_values"]
        budgets = self.method.stage_budgets(grid[0] * grid[1], self.layers, self.depth)  # refuses one out of reach
        # images may keep different numbers of tokens: the padding must be masked
        ragged = len(pixels) > 1 and (budgets is None or self.method.adaptive)
        if self.method.proportional or ragged:
            kernel = str(self.tower.config._attn_implementation)
            if "flash" in kernel:
                raise Refusal(
                    f"{self.method} adds to attention scores, which {kernel} cannot: load the vision encoder with sdpa"
                )
        return TowerPass.start(grid, len(pixels), pixels.device)

    def restore(self, tower_pass: TowerPass, output: Any) -> None:
        """Give every state of the output its native shape, `[B, specials + N, D]`, in place."""
        output.last_hidden_state = self._native(tower_pass, output.last_hidden_state, self.layers_in_all - 1)
        if getattr(output, "hidden_states", None) is not None:
            states = enumerate(output.hidden_states, start=-1)
            output.hidden_states = tuple(self._native(tower_pass, rows, layer) for layer, rows in states)

    def _native(self, tower_pass: TowerPass, rows: Tensor | None, layer: int) -> Tensor | None:
        """Return the output of a layer with rows at their anchors and zeros between."""
        step = tower_pass.after(layer)
        if rows is None or step.layer < 0:
            return rows
        patches, (images, _, width) = rows[:, self.specials :], rows.shape
        index = step.anchors[..., None].expand_as(patches)
        # padding is scattered to an extra row after the last one, which is cut off
        native = patches.new_zeros(images, tower_pass.total + 1, width).scatter(1, index, patches)[:, :-1]
        return torch.cat([rows[:, : self.specials], native], 1)

    # -- hooks on the layers ------------------------------------------------------------------------------------------

    @property
    def _pass(self) -> TowerPass | None:
        """The running pass of this thread."""
        encoding = self.flight.encoding
        tower_pass: TowerPass | None = None if encoding is None else encoding.tower_pass
        return tower_pass

    def _add_bias(self, attention: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        tower_pass = self._pass
        if tower_pass is None or tower_pass.bias is None:
            return None
        return args, {**kwargs, "attention_mask": tower_pass.bias}

    def _before_norm(self, number: int, norm: nn.Module, args: Any) -> Any:
        tower_pass = self._pass
        if tower_pass is None:
            return None
        tower_pass.residual = self._reduce(tower_pass, number, args[0])
        return None if tower_pass.residual is None else (tower_pass.residual,)

    def _after_mlp(self, mlp: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        tower_pass = self._pass
        if tower_pass is None or tower_pass.residual is None:
            return None
        tower_pass.mlp_output = output
        return output[:, :1]  # broadcasts over the layer's long rows; `_after_layer` replaces the sum

    def _after_layer(self, number: int, layer: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        tower_pass = self._pass
        if tower_pass is None:
            return None
        if self.method.after_layer:
            return self._reduce(tower_pass, number, output)
        residual, mlp_output = tower_pass.residual, tower_pass.mlp_output
        tower_pass.residual = tower_pass.mlp_output = None
        return None if residual is None or mlp_output is None else residual + mlp_output

    # -- one reduction ------------------------------------------------------------------------------------------------

    def _reduce(self, tower_pass: TowerPass, number: int, rows: Tensor) -> Tensor | None:
        """Let the method decide; returns the rows that are left, ``None`` if all are."""
        before, patches = tower_pass.latest, rows[:, self.specials :]
        groups = equal_groups(before.lengths)
        decisions = [(images, self._decide(tower_pass, number, patches, images)) for images in groups]
        tower_pass.evidence.clear()
        if self.method.needs.requests("earlier_scores"):
            tower_pass.scores = _scores_that_stay(decisions)
        for images, decision in decisions:
            for image in images:
                (tower_pass.notes_if_whole if decision.whole else tower_pass.notes)[image] += decision.notes
        if all(decision.whole for _, decision in decisions):
            return None
        decision = decisions[0][1]
        if len(decisions) == 1 and decision.valid is None:  # all images are equal, and stay equal: one batched step
            parts = apply_decision(decision, patches, before.anchors, before.sizes)
            lengths = [decision.slots] * len(rows)
        else:
            by_image = {i: decision for images, batch in decisions for i, decision in zip(images, batch, strict=True)}
            lengths = [by_image[image].slots for image in range(len(rows))]
            if lengths == before.lengths:
                return None
            per_image = [
                apply_decision(by_image[image], patches[image, :n], before.anchors[image, :n], before.sizes[image, :n])
                for image, n in enumerate(before.lengths)
            ]
            # rows, slot, weight, anchors, sizes, each padded to the longest image with its own filler
            columns = zip(zip(*per_image, strict=True), (0, -1, 0, tower_pass.total, 0), strict=True)
            parts = [pad_sequence(list(column), batch_first=True, padding_value=filler) for column, filler in columns]
        kept, slot, weight, anchors, sizes = parts
        tower_pass.steps.append(TowerStep(number, slot, weight, anchors, sizes, lengths))
        tower_pass.merged = tower_pass.merged or any(decision.mixing is not None for _, decision in decisions)
        tower_pass.bias = self._bias(tower_pass.latest, rows.dtype)
        return torch.cat([rows[:, : self.specials], kept], 1)

    def _decide(self, tower_pass: TowerPass, number: int, patches: Tensor, images: list[int]) -> Reduction:
        """Return the method's decision about images of equal size."""
        length, all_images = tower_pass.latest.lengths[images[0]], len(images) == len(patches)

        def select(rows: Tensor) -> Tensor:  # without a copy if all images are equal
            return rows if all_images else rows[images, :length]

        stage = self.layers.index(number)
        evidence: dict[str, Any] = {
            name: select(rows[:, self.specials :]) for name, rows in tower_pass.evidence.items()
        }
        if tower_pass.scores is not None:
            evidence["earlier_scores"] = select(tower_pass.scores)
        return self.method(
            EncoderTokens(
                select(patches),
                grid=tower_pass.grid if length == tower_pass.total else None,
                budget=self.method.image_budget(tower_pass.total, self.layers, self.depth, stage),
                sizes=select(tower_pass.latest.sizes),
                specials=self.specials,
                net=self.net and self.net.to(patches.device),
                layers_to_come=len(self.layers) - 1 - stage,
                **evidence,
            )
        )

    def _bias(self, step: TowerStep, dtype: torch.dtype) -> Tensor | None:
        """Return the log of each key's size where attention is proportional, and the lowest number on padding."""
        if not self.method.proportional and not step.ragged:
            return None
        weights = step.sizes if self.method.proportional else (step.sizes > 0).float()
        return mask_bias(nn.functional.pad(weights, (self.specials, 0), value=1.0), dtype)


def _scores_that_stay(decisions: list[tuple[list[int], Reduction]]) -> Tensor:
    """Return the scores of the tokens that stay, `[B, m]`: 0 on padding, and where a decision has none."""
    stay: dict[int, Tensor] = {}
    for images, batch in decisions:
        for image, decision in zip(images, batch, strict=True):
            scores, anchors = decision.scores, decision.anchors
            stay[image] = torch.zeros_like(anchors, dtype=torch.float32) if scores is None else scores[anchors]
    return pad_sequence([stay[image] for image in sorted(stay)], batch_first=True)
