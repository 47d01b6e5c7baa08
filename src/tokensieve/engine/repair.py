"""Attention repaired after a reduction: a bias for each key that stands for several tokens.

The hooks here are the last ones before each layer of the LLM, so they receive the mask and positions that the layer
would run on. SDPA and eager attention take the bias in a float mask, which is made once per forward and shared by the
layers. Flash kernels take no such mask: there the bias is one more channel of queries and keys (:func:`augmented`).
The biases of the columns in a cache travel with its bookkeeping (``PrefixInfo.bias``).
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tokensieve.engine.cache import CacheInfo, PrefixInfo
from tokensieve.engine.decoder.masks import CREATE_MASK, EXPLICIT_MASK_KERNELS, attention_kinds
from tokensieve.engine.decoder.sequence import PrefillState
from tokensieve.engine.inflight import InFlight
from tokensieve.engine.wrapped import uncompiled
from tokensieve.errors import Refusal
from tokensieve.methods import Repair
from tokensieve.models import Family
from tokensieve.models.versions import before_5_23, checkpoints_activations

NAME = "tokensieve_repair"
CHANNELS = 8  # flash kernels want a multiple of 8


@dataclass
class RepairPass:
    """The repair of one forward of the LLM.

    Attributes:
        hooks: those that add the biases.
        entry: the prefix as it entered the LLM.
        layers: {layer: prefix} for the layers that received fewer tokens; it grows while a prefill runs.
        by_distance: add the bias of distance, too.
        added: the mask and the bias of size of the layers so far, by the objects that they were made from.
        keys: `[B, keys]`, the bias of size in the latest layer, for flash kernels and readers of attention.
    """

    hooks: RepairHooks
    entry: PrefixInfo
    layers: Mapping[int, PrefixInfo]
    by_distance: bool = False
    added: dict[tuple[Any, ...], tuple[Tensor | None, Tensor, Any]] = field(default_factory=dict)
    keys: Tensor | None = None

    def of_reading(self, number: int, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of a layer that runs for a reading, on the tokens that the layer before it received."""
        return self.hooks.repaired(self, self.layers.get(number - 1, self.entry), number, hidden, kwargs)


class RepairHooks:
    """Adds the biases in every layer of one LLM.

    Args:
        repair: "size" or "restore".

    Raises:
        Refusal: if the LLM's attention cannot take a bias.
    """

    def __init__(self, family: Family, model: Any, repair: Repair, flight: InFlight) -> None:
        if "decoder" not in family.stages:
            raise Refusal(f"repair={repair!r} is not supported in {family.title}: {family.decoder_unsupported}")
        self.decoder, self.repair, self.flight = uncompiled(model.get_decoder()), repair, flight
        kinds = set(attention_kinds(self.decoder.config))
        if not kinds <= CREATE_MASK.keys():
            raise Refusal(f"repair={repair!r} needs softmax attention in every layer; this LLM has {', '.join(kinds)}")
        if repair == "restore" and len(kinds) > 1:
            raise Refusal("repair='restore' needs one rotary embedding in all layers; here they differ: use 'size'")
        self.kernel = str(self.decoder.config._attn_implementation)
        self.modules = [layer.self_attn for layer in self.decoder.layers]
        self._configs: list[Any] = []
        self._handles: list[Any] = []
        if self.kernel not in EXPLICIT_MASK_KERNELS:
            self._check_augmented()
            self._configs = [self._replace_kernel(module) for module in self.modules]

    def _check_augmented(self) -> None:
        softcap = any(getattr(module, "attn_logit_softcapping", None) for module in self.modules)
        if "flash" not in self.kernel or self.repair != "size" or softcap:
            raise Refusal(
                f"repair={self.repair!r} adds to attention scores, which {self.kernel} cannot: load the model with "
                f"{' or '.join(EXPLICIT_MASK_KERNELS)} attention"
            )

    def _replace_kernel(self, module: Any) -> Any:
        """Give an attention module the kernel of this file, in a copy of its config; returns the config it had."""
        config = module.config
        module.config = copy.copy(config)
        module.config._attn_implementation_internal = NAME  # the public setter would reach into sub-configs
        module._tokensieve_repair = self, config
        return config

    def install(self) -> None:
        """Install the hooks, behind those that shorten the layers' inputs."""
        self._handles = [
            layer.register_forward_pre_hook(partial(self._before_layer, number), with_kwargs=True)
            for number, layer in enumerate(self.decoder.layers)
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        for module, config in zip(self.modules, self._configs, strict=False):
            module.config = config
            del module._tokensieve_repair

    # -- around the forward -------------------------------------------------------------------------------------------

    def start_prefill(self, entry: PrefixInfo, state: PrefillState | None, first_turn: bool) -> None:
        """Start a prefill; ``state`` if tokens leave inside the LLM.

        Raises:
            Refusal: the attention implementation was changed since the method was attached.
        """
        kernel = str(self.decoder.config._attn_implementation)
        if kernel != self.kernel:
            raise Refusal(
                f"repair={self.repair!r} was attached to {self.kernel}; the model now runs {kernel}: attach anew"
            )
        if self.decoder.training and checkpoints_activations(self.decoder) and (self._configs or before_5_23()):
            raise Refusal(f"repair={self.repair!r} does not reach layers that are run again: turn checkpointing off")
        layers = {} if state is None else state.prefixes
        # the distances to a cached turn are not known, so a later turn has the bias of size alone
        self.flight.repair = RepairPass(self, entry, layers, self.repair == "restore" and first_turn)

    def start_decoding(self, info: CacheInfo) -> None:
        """Start a step on a reduced cache. It has the bias of size alone, as in the authors' code."""
        self.flight.repair = RepairPass(self, info.entry, info.layers)

    # -- one layer ----------------------------------------------------------------------------------------------------

    def _before_layer(self, number: int, layer: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Add the bias of one layer to its mask, or leave it for the kernel."""
        running: RepairPass | None = self.flight.repair
        if running is None:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        return args, self.repaired(running, running.layers.get(number, running.entry), number, hidden, kwargs)

    def repaired(
        self, running: RepairPass, prefix: PrefixInfo, number: int, hidden: Tensor, kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Return the arguments of one layer with the bias of a prefix in its mask, or leave it for the kernel.

        Args:
            hidden: `[B, n, D]`, the input of layer ``number``.
        """
        if prefix.bias is None:
            running.keys = None
            return kwargs
        cache = kwargs.get("past_key_values")
        queries = keys = columns = hidden.shape[1]
        if cache is not None:
            keys, _ = cache.get_mask_sizes(queries, number)
            # a reduced cache layer reports more columns than it holds
            holds = cache.layers[number] if number < len(cache.layers) else None
            columns += cache.get_seq_length(number) - getattr(holds, "dropped", 0) * bool(cache.get_seq_length(number))
        mask, first = kwargs.get("attention_mask"), number == 0 and len(prefix.bias) > 1
        rope = kwargs.get("position_embeddings") if running.by_distance else None
        made_from = (prefix, mask, rope and rope[0])
        key = (*map(id, made_from), first, keys, columns)
        if key not in running.added:
            later = columns - prefix.bias.shape[-1]  # text after the last image, in this turn or a later one
            bias = pad(prefix.bias[0 if first else -1], (0, later))[:, columns - keys :]
            if not self._configs:  # flash kernels keep their mask
                causal = bool(getattr(self.modules[number], "is_causal", True))
                mask = _with_bias(mask, bias, self._distance(rope, bias, running), queries, causal, hidden.dtype)
            running.added[key] = mask, bias, made_from  # held, so that no other object gets their ids
        mask, running.keys, _ = running.added[key]
        return {**kwargs, "attention_mask": mask}

    def _distance(self, rope: Any, bias: Tensor, running: RepairPass) -> Tensor | None:
        """Return the bias of distance, `[B, n, n]`: log(2 − c), c the mean cosine of the angles between two positions.

        Rows of the batch that lost no token have zeros.
        """
        if not running.by_distance:
            return None
        if rope is None or rope[0].ndim != 3:
            raise Refusal("repair='restore' needs rotary embeddings of one row per token; use repair='size'")
        angles = torch.cat([part.float() for part in rope], -1)  # [B or 1, n, 2d]: cos a cos b + sin a sin b
        cosine = angles @ angles.transpose(-1, -2) / angles[:1, :1].square().sum()
        reduced = (bias != 0).any(-1)[:, None, None]
        return (2 - cosine.clamp(max=1)).log() * reduced


def _with_bias(
    mask: Tensor | None, bias: Tensor, distance: Tensor | None, queries: int, causal: bool, dtype: torch.dtype
) -> Tensor:
    """Return the float mask of a layer, `[B, 1, queries or 1, keys]`.

    Args:
        mask: `[B or 1, 1, queries, keys]` bool or additive; ``None``: causal, or all keys if ``causal`` is False.
        bias: `[B, keys]`.
        distance: `[B, queries, keys]`.
    """
    added, keys, least = bias[:, None, None], bias.shape[-1], torch.finfo(dtype).min
    if distance is not None:
        added = added + distance[:, None]
    added = added.to(dtype)
    if mask is None and causal and queries > 1:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=bias.device).tril(keys - queries)
    if mask is None:
        return added
    return torch.where(mask, added, least) if mask.dtype == torch.bool else mask + added


# -- kernels without a float mask -------------------------------------------------------------------------------------


def augmented(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scaling: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values whose attention without a mask has ``bias`` added to its scores.

    A query gets channels of 1, and a key its bias divided by the scaling: once rounded, and then what rounding lost.
    Further channels are zero; those of the output belong to no value and must be cut off.

    Args:
        query, key, value: `[B, H, n, d]`; keys may have fewer heads.
        bias: `[B, keys]` float32.
        scaling: the factor of the scores, which must be given to the kernel, as it no longer follows from d.
    """
    exact = bias / scaling
    rounded = exact.to(key.dtype)
    remainder = (exact - rounded.float()).to(key.dtype)
    channels = pad(torch.stack([rounded, remainder], -1), (0, CHANNELS - 2))[:, None].expand(-1, key.shape[1], -1, -1)
    ones = pad(query.new_ones(2), (0, CHANNELS - 2)).expand(*query.shape[:-1], -1)
    return torch.cat([query, ones], -1), torch.cat([key, channels], -1), pad(value, (0, CHANNELS))


class _Module:
    """An attention module as its kernel reads it: with its own config."""

    def __init__(self, module: Any, config: Any) -> None:
        self._module, self.config = module, config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, **kwargs: Any
) -> Any:
    """Run the kernel that the model is configured with on augmented rows, if the running layer has a bias."""
    hooks, config = module._tokensieve_repair  # type: ignore[misc]
    kernel = ALL_ATTENTION_FUNCTIONS.get_interface(
        config._attn_implementation, getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    )
    running, view = hooks.flight.repair, _Module(module, config)
    bias = None if running is None else running.keys
    if bias is None:
        return kernel(view, query, key, value, mask, **kwargs)
    scaling, channels = kwargs.pop("scaling", None) or query.shape[-1] ** -0.5, value.shape[-1]
    output, *further = kernel(view, *augmented(query, key, value, bias, scaling), mask, scaling=scaling, **kwargs)
    return (output[..., :channels], *further)


ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)
