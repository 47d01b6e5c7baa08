"""The model of VLMEvalKit: any supported model with a method attached, asked through its own chat template."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from vlmeval.vlm.base import BaseModel

from tokensieve.harness.attached import Attachment, loud
from tokensieve.loading import LoadOptions, load_model, to_model

attachments: list[Attachment] = []  # of this process, for the record when VLMEvalKit has ended


class Tokensieve(BaseModel):  # type: ignore[misc]
    """A vision-language model with a method attached; one question per call, as VLMEvalKit asks.

    Args:
        model: folder or hub name; "reference" is the bundled model.
        loading: how it is loaded.
        max_new_tokens: longest answer.
        options: as for :class:`~tokensieve.harness.attached.Attachment`.
        use_vllm: set by VLMEvalKit for some names of models; ignored.
    """

    INTERLEAVE = True
    allowed_types = ("text", "image")

    def __init__(
        self,
        model: str,
        loading: LoadOptions,
        max_new_tokens: int,
        options: dict[str, Any],
        use_vllm: bool = False,
    ) -> None:
        super().__init__()
        with loud():
            self.max_new_tokens = max_new_tokens
            self.model, self.processor = load_model(model, loading)
            self.attachment = Attachment(self.model, self.processor, **options)
        attachments.append(self.attachment)

    def generate(self, message: Any, dataset: str | None = None) -> str:
        """Return the answer to a message of VLMEvalKit; an error ends the run."""
        with loud():
            return str(super().generate(message, dataset))

    def generate_inner(self, message: list[dict[str, str]], dataset: str | None = None) -> str:
        """Return the answer to a list of parts, images and texts in their order."""
        content: list[dict[str, Any]] = []
        for part in message:
            if part["type"] == "image":
                with Image.open(part["value"]) as image:
                    content.append({"type": "image", "image": image.convert("RGB")})
            else:
                content.append({"type": "text", "text": part["value"]})
        turns = [{"role": "user", "content": content}]
        template = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        inputs = dict(self.processor.apply_chat_template(turns, **template))
        with torch.inference_mode():
            output = self.model.generate(
                **to_model(self.model, inputs), do_sample=False, num_beams=1, max_new_tokens=self.max_new_tokens
            )
        text = self.processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return str(text).strip()
