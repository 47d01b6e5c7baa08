"""Less work for visual rows inside the layers of the LLM: hooks that act in prefills, on the rows of visual tokens.

Zero weights on visual keys after the softmax, without renormalisation, are zero values of these keys under any kernel.
The cache then holds the zeros, so decode steps need no hook. Every row stays in the sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from tokensieve.engine.decoder.masks import EXPLICIT_MASK_KERNELS, hidden_value
from tokensieve.engine.decoder.sequence import PrefillState
from tokensieve.engine.handoff import ImageReduction
from tokensieve.engine.inflight import InFlight
from tokensieve.errors import Refusal
from tokensieve.methods.compute import ComputeMethod
from tokensieve.models.versions import checkpoints_activations

CreateMask = Callable[..., Tensor | None]


@dataclass(eq=False)
class VisualRows:
    """The visual rows of one prefill, for all layers.

    Attributes:
        index: `[V]`, the visual rows of all samples, numbered over the batch.
        text: `[T]`, all rows that are not visual, padding too.
        order: `[B · n]`, the place of each row behind the MLP, where visual rows follow text.
        masks: {kind of attention: mask with windows}.
        narrow: `[V, D]`, the MLP's output of the visual rows, while a layer runs.
    """

    index: Tensor
    text: Tensor
    order: Tensor
    masks: dict[str, Tensor] = field(default_factory=dict)
    narrow: Tensor | None = None

    @classmethod
    def of(cls, visual: Tensor) -> VisualRows:
        """Return the rows of a batch; ``visual`` `[B, n]` is True on them."""
        flat = visual.flatten()
        index, text = flat.nonzero()[:, 0], (~flat).nonzero()[:, 0]
        return cls(index, text, torch.cat([text, index]).argsort())

    def split(self, mlp: Any, rows: Tensor, neurons: int) -> Tensor:
        """Run the visual rows of `[B, n, D]` through the first neurons of an MLP, and return the text, `[T, D]`."""
        flat = rows.flatten(0, 1)
        self.narrow = narrow_mlp(mlp, flat[self.index], neurons)
        return flat[self.text]

    def join(self, output: Tensor, shape: torch.Size) -> Tensor:
        """Return the MLP's output of all rows, `[B, n, D]`; ``output`` `[T, D]` is that of the text."""
        assert self.narrow is not None
        narrow, self.narrow = self.narrow, None
        return torch.cat([output, narrow])[self.order].view(shape)


class ComputeHooks:
    """Hooks on attention and MLP of the layers of one LLM.

    Args:
        decoder: the LLM.
        create_mask: returns the causal mask of a layer, where the kernel was left to be causal by itself.
        kinds: the kind of attention of each layer.
        repair: the repair of attention that is attached with the method.

    Raises:
        Refusal: with repaired attention, a kernel without explicit masks, a file of heads that does not fit, or layers
            of another form.
    """

    def __init__(
        self,
        decoder: Any,
        method: ComputeMethod,
        create_mask: CreateMask,
        kinds: list[str],
        flight: InFlight,
        repair: str | None,
    ) -> None:
        self.decoder, self.method, self.flight = decoder, method, flight
        self.create_mask, self.kinds = create_mask, kinds
        config, layers = decoder.config, decoder.layers
        if repair is not None:
            raise Refusal(f"repair={repair!r} changes the attention that {method} prunes: attach one of the two")
        if method.window is not None and config._attn_implementation not in EXPLICIT_MASK_KERNELS:
            raise Refusal(
                f"{method}: a window needs {' or '.join(EXPLICIT_MASK_KERNELS)} attention; this LLM runs "
                f"{config._attn_implementation}; window=None leaves it out"
            )
        groups = config.num_key_value_heads
        counting = torch.ones(len(layers), groups, dtype=torch.bool)
        if method.heads is not None:
            counting = read_heads(method.heads, len(layers), config.num_attention_heads, groups)
        counting[method.first_cut(len(layers)) :] = False
        cut = [number for number, heads in enumerate(counting) if not bool(heads.all())]
        if not all(hasattr(layers[number].self_attn, "v_proj") for number in cut):
            raise Refusal(f"{method} cuts heads by their values; attention of this LLM has no v_proj")
        if method.mlp < 1 and not all(_is_gated(getattr(layer, "mlp", None)) for layer in layers):
            raise Refusal(
                f"{method} needs MLPs of plain linear layers gate_proj, up_proj and down_proj (adapters merged, not "
                "quantized); mlp=1.0 leaves them whole"
            )
        self._handles = [
            layers[number].self_attn.v_proj.register_forward_hook(partial(self._behind_values, counting[number]))
            for number in cut
        ]
        if method.mlp < 1:
            self._handles += [layer.mlp.register_forward_pre_hook(self._before_mlp) for layer in layers]
            self._handles += [layer.mlp.register_forward_hook(self._behind_mlp) for layer in layers]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def check(self) -> None:
        """Refuse a forward in which layers run twice."""
        if self.decoder.training and checkpoints_activations(self.decoder):
            raise Refusal(f"gradient checkpointing runs layers again, without the hooks of {self.method}: turn it off")

    def before_layer(self, state: PrefillState, number: int, hidden: Tensor, kwargs: dict[str, Any]) -> None:
        """Give one layer of a prefill the mask with windows, in place."""
        if not state.members or self.method.window is None:
            return
        masks, kind = self._rows(state).masks, self.kinds[number]
        if kind not in masks:
            mask = kwargs.get("attention_mask")
            if mask is None:
                mask = self.create_mask(number, hidden, kwargs, state.sequence.mask, allow_none=False)
            assert mask is not None
            masks[kind] = mask.expand(len(hidden), -1, -1, -1).clone()
            for row, image in state.members:
                places = places_of(state.images[row][image], self.method)
                set_window(masks[kind][row, 0], state.columns((row, image)), places, self.method.window)
        kwargs["attention_mask"] = masks[kind]

    def _rows(self, state: PrefillState) -> VisualRows:
        if state.compute is None:
            state.compute = VisualRows.of(state.sequence.visual)
        rows: VisualRows = state.compute
        return rows

    @property
    def _prefill(self) -> PrefillState | None:
        """The running prefill, if it has images."""
        state = self.flight.decoding
        return state if isinstance(state, PrefillState) and state.members else None

    def _behind_values(self, counting: Tensor, module: nn.Module, args: Any, values: Tensor) -> Tensor | None:
        state = self._prefill
        return None if state is None else cut_values(values, state.sequence.visual, counting)

    def _before_mlp(self, mlp: Any, args: Any) -> Any:
        state = self._prefill
        if state is None:
            return None
        neurons = int(self.method.mlp * mlp.gate_proj.out_features)
        return (self._rows(state).split(mlp, args[0], neurons), *args[1:])

    def _behind_mlp(self, mlp: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        state = self._prefill
        if state is None:
            return None
        return self._rows(state).join(output, torch.Size([*state.sequence.visual.shape, output.shape[-1]]))


def cut_values(values: Tensor, visual: Tensor, counting: Tensor) -> Tensor:
    """Return the values `[B, n, heads · d]` with zeros on visual rows `[B, n]`, but in heads that count, `[heads]`."""
    cut = visual[..., None] & ~counting.to(visual.device)  # [B, n, heads]
    return values.masked_fill(cut.repeat_interleave(values.shape[-1] // len(counting), -1), 0.0)


def narrow_mlp(mlp: Any, rows: Tensor, neurons: int) -> Tensor:
    """Return the output of rows `[V, D]` that pass the first neurons of a gated MLP alone."""

    def through(projection: nn.Linear) -> Tensor:
        bias = projection.bias
        return linear(rows, projection.weight[:neurons], None if bias is None else bias[:neurons])

    hidden = mlp.act_fn(through(mlp.gate_proj)) * through(mlp.up_proj)
    return linear(hidden, mlp.down_proj.weight[:, :neurons], mlp.down_proj.bias)


def set_window(mask: Tensor, columns: Tensor, places: Tensor, window: int) -> None:
    """Replace, in place, the pairs of one grid in the mask `[L, keys]` of one sample by those of a window.

    Args:
        columns: `[K]`, those of an image's tokens.
        places: `[K, 3]`, grid, row and column of each token; grid −1: in none.
        window: tokens see each other if they are at most ⌊window / 2⌋ rows and columns apart.
    """
    grid, line, place = places.short().unbind(-1)  # short: pairs of many tokens take much memory
    one_grid = (grid[:, None] == grid) & (grid >= 0)
    in_window = ((line[:, None] - line).abs() <= window // 2) & ((place[:, None] - place).abs() <= window // 2)
    block = mask[columns[:, None], columns]
    visible = True if mask.dtype == torch.bool else 0.0
    windowed = torch.full_like(block, hidden_value(mask)).masked_fill(in_window, visible)
    mask[columns[:, None], columns] = windowed.where(one_grid, block)


def places_of(image: ImageReduction, method: ComputeMethod) -> Tensor:
    """Return grid, row and column of each token that entered the LLM, `[K, 3]`; −1 on separators.

    Raises:
        Refusal: if the image's tokens form no grids.
    """
    layout, anchors = image.layout, image.decision.anchors
    if sum(height * width for height, width in layout.views) != layout.patches:
        raise Refusal(f"{method}: a window needs images whose tokens form grids; window=None leaves it out")
    grids = [
        torch.cartesian_prod(torch.tensor([number]), torch.arange(height), torch.arange(width))
        for number, (height, width) in enumerate(layout.views)
    ]
    places = torch.cat(grids).to(anchors.device)
    if layout.patch_index is not None:
        index = layout.patch_index.to(anchors.device)
        places = places.new_full((layout.total, 3), -1).index_copy(0, index, places)
    return places[anchors]


def read_heads(file: str, depth: int, heads: int, groups: int) -> Tensor:
    """Return `[layers, groups]` bool, the groups of heads in which visual values count, of a NumPy file.

    Raises:
        Refusal: if the file is none, fits another LLM, or cuts a part of the heads that share their values.
    """
    try:
        array = np.load(Path(file).expanduser(), allow_pickle=False)
        mask = torch.from_numpy(np.asarray(array, dtype=bool))
    except (OSError, ValueError, EOFError, TypeError) as error:
        raise Refusal(f"{file} is no NumPy file of heads ({type(error).__name__}: {error})") from None
    if mask.shape != (depth, heads):
        raise Refusal(f"{file} has heads of shape {list(mask.shape)}; this LLM has [{depth}, {heads}]")
    grouped = mask.view(depth, groups, -1)
    if bool((grouped.any(-1) != grouped.all(-1)).any()):
        raise Refusal(f"{file} cuts some of the {heads // groups} heads that share their values: cut all or none")
    return grouped.all(-1)


def _is_gated(mlp: Any) -> bool:
    """Whether the MLP is gated and of plain linear layers, whose weights can be sliced."""
    names = ("gate_proj", "up_proj", "down_proj")
    return hasattr(mlp, "act_fn") and all(type(getattr(mlp, name, None)) is nn.Linear for name in names)
