"""The model "tokensieve-multimodal" of lm-eval: its ``hf-multimodal`` with a method attached."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.hf_vlms import HFMultimodalLM

from tokensieve.evaluate.processes import Processes
from tokensieve.harness.attached import Attachment, loud, model_path, take_options


@register_model("tokensieve-multimodal")
class TokensieveMultimodal(HFMultimodalLM):  # type: ignore[misc]
    """``hf-multimodal`` with a method attached.

    Args:
        pretrained: folder or hub name; "reference" is the bundled model.
        arguments: those of ``hf-multimodal``, and the options of :class:`~tokensieve.harness.attached.Attachment`.
            Without a GPU and without ``dtype``, the weights are float32.
    """

    def __init__(self, pretrained: str, **arguments: Any) -> None:
        with loud():
            options = take_options(arguments)
            if not torch.cuda.is_available():
                arguments.setdefault("dtype", "float32")
                # accelerate joins processes on CPUs only if its first object is made for CPUs; lm-eval's is not
                Processes.launched()
            super().__init__(model_path(pretrained), **arguments)
            # lm-eval limits the length by max_length; a checkpoint's own max_new_tokens would win over it
            self.model.generation_config.max_new_tokens = None
            self.attachment = Attachment(self.model, self.processor, **options)
        accelerator = getattr(self, "accelerator", None)
        if accelerator is not None and self.world_size == 1:  # lm-eval shares questions out over GPUs only
            self._rank, self._world_size = accelerator.process_index, accelerator.num_processes

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the answers to the requests, in their order.

        Where processes have unequally many questions, lm-eval repeats the last one of some. No process waits for
        another here, so the repetition is left out, and the record counts each question once.
        """
        if getattr(self.processor, "chat_template", None) and not self.chat_applied and self.rank == 0:
            print("note: the model has a chat template; --apply_chat_template uses it", file=sys.stderr)
        times: Counter[int] = Counter()
        keys = []  # (request, number of its repetition)
        for request in requests:
            keys.append((id(request), times[id(request)] % request.repeats))
            times[id(request)] += 1
        needed = dict(zip(keys, requests, strict=True))
        with loud():
            answers = super().generate_until(list(needed.values()), disable_tqdm=disable_tqdm)
        texts = dict(zip(needed, answers, strict=True))
        return [texts[key] for key in keys]

    def get_model_info(self) -> dict[str, Any]:
        """Return lm-eval's facts about the model, and the record of the method."""
        return {**super().get_model_info(), "tokensieve": self.attachment.record()}
