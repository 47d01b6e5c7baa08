"""The base of the families: what a declaration may say, with the defaults of a plain ViT."""

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
        writes_text: the processor writes text tokens around or between an image's placeholders.
        tiles_are_images: an attached method takes each tile as an image, so that each gets the whole budget.
    """

    title: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]
    module: ClassVar[str]
    architecture: ClassVar[str]
    mrope: ClassVar[bool] = False
    writes_text: ClassVar[bool] = False
    tiles_are_images: ClassVar[bool] = False

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

    def parts(self, layout: TokenLayout) -> list[TokenLayout]:
        """Return the layouts that a method decides about: the image's, or one per tile."""
        return [layout.grid_of(*view) for view in layout.views] if self.tiles_are_images else [layout]

    # -- in the worker ------------------------------------------------------------------------------------------------

    def layouts(self, config: Any, sizes: Sequence[Sequence[int]], kwargs: Mapping[str, Any]) -> list[TokenLayout]:
        """Return the layouts of the images of one encode call; units are numbered over the call.

        Args:
            kwargs: the fields of the images, as the model receives them.
        """
        return [self.layout(config, size) for size in sizes]

    def has_cls(self, config: Any) -> bool:
        """Return whether row 0 of the encoder is a [CLS] token."""
        return bool(config.vision_config.model_type == "clip_vision_model")

    def attentions(self, model: Any) -> list[nn.Module]:
        """Return vLLM's attention modules of the encoder layers with full attention, first to last."""
        return [layer.self_attn.attn for layer in model.vision_tower.vision_model.encoder.layers]

    def segments(self, model: Any, layouts: Sequence[TokenLayout]) -> list[int] | None:
        """Return the number of rows of each image, where the rows of all images are packed into one; else ``None``."""
        return None

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

    def pixel_hashes(self, kwargs: Mapping[str, Any], layouts: Sequence[TokenLayout]) -> list[Tensor]:
        """Return the hashes of each image as an attached method receives them: `[1]`, or one per joined tile."""
        from tokensieve.ops import pixel_hash

        return [pixel_hash(pixels)[None] for pixels in self.pixels(kwargs, layouts)]

    def weights_mapper(self) -> Any | None:
        """Return a mapper of weight names that vLLM's class lacks for checkpoints of newer transformers."""
        return None


def torch_split(rows: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
    """Split rows; torch is imported when a worker calls it."""
    import torch

    return torch.split(rows, list(sizes))
