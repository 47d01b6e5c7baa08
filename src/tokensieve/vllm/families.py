"""The model families that the plug-in serves, as declarations. Each says what vLLM's class of the family does not.

A declaration is read in two places. The frontend asks for the layout of an image's tokens before anything is encoded,
and the worker maps what it reads in the vision encoder to these tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tokensieve.methods import Method
    from tokensieve.models import TokenLayout


class ServedFamily:
    """One family. The defaults describe a plain ViT whose tiles `[b, 3, H, W]` become one token per patch.

    Attributes:
        title: the name that users see.
        model_types: model types of transformers.
        module, architecture: of vLLM's model class.
        mrope: the model has M-RoPE; a kept token moves by its row and column.
    """

    title: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]
    module: ClassVar[str]
    architecture: ClassVar[str]
    mrope: ClassVar[bool] = False

    @property
    def reduced_architecture(self) -> str:
        """The name under which the reduced class is registered."""
        return f"Tokensieve{self.architecture}"

    def describes(self, config: Mapping[str, Any]) -> bool:
        """Return whether a checkpoint's ``config.json`` belongs to this family."""
        return config.get("model_type") in self.model_types

    # -- before an engine is started ----------------------------------------------------------------------------------

    def unserved(self, config: Mapping[str, Any], method: Method) -> str | None:
        """Return why the family cannot run a connector method; ``None`` if it can."""
        from tokensieve.methods import Needs
        from tokensieve.tokens import resolve_layers

        needs, depth = method.needs, self.depth(config)
        if not isinstance(needs, Needs):
            return None
        if needs.cls_similarity:
            return "it compares patches with the [CLS] row of the encoder's output, which vLLM's encoders do not return"
        for name, evidence in needs.requested().items():
            layers = [] if evidence.read is None else resolve_layers(getattr(needs, name), depth)
            if layers and max(layers) >= self.built(config):
                return f"it reads layer {max(layers)} of {depth}, and vLLM builds the first {self.built(config)} only"
        if (needs.cls_attention is not None or needs.cls_attention_single_head is not None) and self.pooled(config):
            return "it reads the encoder's pooling head in place of [CLS] attention, and vLLM does not build that head"
        return None

    def depth(self, config: Mapping[str, Any]) -> int:
        """Return the number of layers of the vision encoder whose attention can be read."""
        return int(config["vision_config"]["num_hidden_layers"])

    def built(self, config: Mapping[str, Any]) -> int:
        """Return the number of these layers that vLLM builds: those that the features depend on."""
        return self.depth(config)

    def pooled(self, config: Mapping[str, Any]) -> bool:
        """Return whether a SigLIP encoder has a pooling head, which transformers reads in place of [CLS] attention."""
        vision = config["vision_config"]
        return vision.get("model_type") == "siglip_vision_model" and bool(vision.get("vision_use_head", True))

    def rope_with_sections(self, config: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the LLM's rotary parameters with M-RoPE sections, ``None`` if it has several rotary embeddings.

        vLLM asks a model for position ids only where its config has M-RoPE. One section that covers the whole head
        makes M-RoPE equal to plain RoPE.
        """
        text = config["text_config"]
        rope = dict(text.get("rope_parameters") or {"rope_theta": text.get("rope_theta", 1e4), "rope_type": "default"})
        if any(isinstance(value, Mapping) for value in rope.values()):
            return None
        head = text.get("head_dim") or text.get("hidden_size", 4096) // text.get("num_attention_heads", 32)
        return rope | {"mrope_section": [head // 2, 0, 0]}

    # -- in the frontend ----------------------------------------------------------------------------------------------

    def image_token(self, config: Any) -> int:
        """Return the id of the placeholder of one visual token."""
        return int(getattr(config, "image_token_id", None) or config.image_token_index)

    def prompt_token(self, config: Any, tokenizer: Any) -> int:
        """Return the id that stands for a whole image in a prompt that vLLM has not expanded yet."""
        return self.image_token(config)

    def size(self, config: Any, item: Mapping[str, Any]) -> tuple[int, ...]:
        """Return the numbers that an image's layout follows from.

        Args:
            item: the image's fields after the image processor, without a batch dimension.
        """
        return tuple(item["pixel_values"].shape[-2:])

    def layout(self, config: Any, size: Sequence[int]) -> TokenLayout:
        """Return the layout of an image's tokens."""
        from tokensieve.models import TokenLayout

        patch, (height, width) = config.vision_config.patch_size, size
        return TokenLayout.grid_of(height // patch, width // patch)

    # -- in the worker ------------------------------------------------------------------------------------------------

    def has_cls(self, config: Any) -> bool:
        """Return whether row 0 of the encoder is a [CLS] token."""
        return bool(config.vision_config.model_type == "clip_vision_model")

    def attentions(self, model: Any) -> list[nn.Module]:
        """Return vLLM's attention modules of the encoder layers with full attention, first to last."""
        return [layer.self_attn.attn for layer in model.vision_tower.vision_model.encoder.layers]

    def units(self, model: Any, rows: Tensor, layouts: Sequence[TokenLayout]) -> list[Tensor]:
        """Map a reading of one layer to the patches of each image.

        Args:
            rows: `[b, n, ...]`, the rows of all tiles of the images, or `[1, n, ...]`, the packed rows of all images.

        Returns:
            `[M, ...]` per image.
        """
        return list(rows[:, int(self.has_cls(model.config)) :])

    def projector(self, model: Any) -> nn.Module:
        """Return the module that makes the visual tokens; a method may merge the rows that enter it."""
        projector: nn.Module = model.multi_modal_projector
        return projector

    def patches(self, model: Any, rows: Tensor, layouts: Sequence[TokenLayout]) -> list[Tensor]:
        """Map the input of :meth:`projector` to the patches of each image, `[M, C]` each."""
        return list(torch_split(rows.flatten(0, -2), [layout.patches for layout in layouts]))

    def project(self, model: Any, rows: Tensor) -> Tensor:
        """Run the projector on rows from :meth:`patches`, `[n, C]` to `[n, D]`."""
        projected: Tensor = self.projector(model)(rows)
        return projected

    def pixels(self, kwargs: Mapping[str, Any], layouts: Sequence[TokenLayout]) -> list[Tensor]:
        """Return the pixels of each image, for methods that draw at random by them."""
        return list(kwargs["pixel_values"])

    def weights_mapper(self) -> Any | None:
        """Return a mapper of weight names that vLLM's class lacks for checkpoints of newer transformers."""
        return None


class Llava(ServedFamily):
    title = "LLaVA-1.5"
    model_types = ("llava",)
    module, architecture = "llava", "LlavaForConditionalGeneration"

    def describes(self, config: Mapping[str, Any]) -> bool:
        return super().describes(config) and config["vision_config"].get("model_type") in (
            "clip_vision_model",
            "siglip_vision_model",
        )

    def built(self, config: Mapping[str, Any]) -> int:
        layers, states = config.get("vision_feature_layer", -2), self.depth(config) + 1
        indices = [layers] if isinstance(layers, int) else layers  # of hidden states: 0 enters the first layer
        return max(index % states for index in indices)

    def weights_mapper(self) -> Any | None:
        from vllm.model_executor.models.utils import WeightsMapper

        # transformers 5.2x saves CLIP without "vision_model."
        parts = ("embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm.")
        return WeightsMapper(
            orig_to_new_prefix={
                f"{prefix}vision_tower.{part}": f"vision_tower.vision_model.{part}"
                for part in parts
                for prefix in ("", "model.")
            }
        )


class QwenVL(ServedFamily):
    mrope = True

    def pooled(self, config: Mapping[str, Any]) -> bool:
        return False

    def depth(self, config: Mapping[str, Any]) -> int:
        return int(config["vision_config"]["depth"])

    def size(self, config: Any, item: Mapping[str, Any]) -> tuple[int, ...]:
        _, height, width = item["image_grid_thw"].tolist()
        return height, width

    def layout(self, config: Any, size: Sequence[int]) -> TokenLayout:
        from tokensieve.models import TokenLayout

        side = config.vision_config.spatial_merge_size
        return TokenLayout.grid_of(size[0] // side, size[1] // side)

    def has_cls(self, config: Any) -> bool:
        return False

    def attentions(self, model: Any) -> list[nn.Module]:
        return [block.attn.attn for block in model.visual.blocks]

    def units(self, model: Any, rows: Tensor, layouts: Sequence[TokenLayout]) -> list[Tensor]:
        # the processor packs the patches of a token next to each other
        units = rows.flatten(0, 1).unflatten(0, (-1, self.patches_per_token(model))).mean(1)
        return self.in_order(model, units, layouts)

    def projector(self, model: Any) -> nn.Module:
        # vLLM can call a compiled merger past its hooks; the merger's first step receives the same rows
        merger = model.visual.merger
        first: nn.Module = merger.norm if hasattr(merger, "norm") else merger.ln_q
        return first

    def patches(self, model: Any, rows: Tensor, layouts: Sequence[TokenLayout]) -> list[Tensor]:
        units = rows.reshape(-1, self.patches_per_token(model) * rows.shape[-1])
        return self.in_order(model, units, layouts)

    def project(self, model: Any, rows: Tensor) -> Tensor:
        merged: Tensor = model.visual.merger(rows.reshape(len(rows) * self.patches_per_token(model), -1))
        return merged

    def patches_per_token(self, model: Any) -> int:
        """Return how many patches the merger makes one token of."""
        return int(model.config.vision_config.spatial_merge_size**2)

    def in_order(self, model: Any, units: Tensor, layouts: Sequence[TokenLayout]) -> list[Tensor]:
        """Split the encoder's rows, one per token, into the tokens of each image."""
        return list(torch_split(units, [layout.patches for layout in layouts]))

    def pixels(self, kwargs: Mapping[str, Any], layouts: Sequence[TokenLayout]) -> list[Tensor]:
        pixels = kwargs["pixel_values"]
        patches_per_token = len(pixels) // sum(layout.patches for layout in layouts)
        return list(torch_split(pixels, [patches_per_token * layout.patches for layout in layouts]))


class Qwen2VL(QwenVL):
    title = "Qwen2-VL"
    model_types = ("qwen2_vl",)
    module, architecture = "qwen2_vl", "Qwen2VLForConditionalGeneration"


class Qwen25VL(QwenVL):
    title = "Qwen2.5-VL"
    model_types = ("qwen2_5_vl",)
    module, architecture = "qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration"

    def depth(self, config: Mapping[str, Any]) -> int:
        return len(config["vision_config"]["fullatt_block_indexes"])  # the other layers attend within windows

    def attentions(self, model: Any) -> list[nn.Module]:
        blocks = model.visual.blocks
        return [blocks[layer].attn.attn for layer in model.config.vision_config.fullatt_block_indexes]

    def in_order(self, model: Any, units: Tensor, layouts: Sequence[TokenLayout]) -> list[Tensor]:
        side = model.config.vision_config.spatial_merge_size
        in_order = []
        for image, layout in zip(super().in_order(model, units, layouts), layouts, strict=True):
            height, width = layout.views[0]
            # vLLM permutes the tokens of an image so that each window is contiguous; argsort inverts a permutation
            window = model.visual.get_window_index_thw(1, height * side, width * side)[0]
            in_order.append(image[window.argsort().to(image.device)])
        return in_order


class Qwen3VL(QwenVL):
    title = "Qwen3-VL"
    model_types = ("qwen3_vl",)
    module, architecture = "qwen3_vl", "Qwen3VLForConditionalGeneration"


class Qwen3VLMoe(Qwen3VL):
    title = "Qwen3-VL with experts"
    model_types = ("qwen3_vl_moe",)
    module, architecture = "qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration"


FAMILIES: tuple[ServedFamily, ...] = (Llava(), Qwen2VL(), Qwen25VL(), Qwen3VL(), Qwen3VLMoe())

REFUSED: dict[str, str] = {}
"""Model types that cannot be served, and why."""


def torch_split(rows: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
    """Split rows; torch is imported when a worker calls it."""
    import torch

    return torch.split(rows, list(sizes))
