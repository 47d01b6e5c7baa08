"""Pre-fusion: blocks of a net change the rows of the text, and of the slots, as they enter the LLM.

The blocks receive one sequence per image: all its projected tokens, its slots, and the text of its prompt. They run
beside the LLM, on positions without gaps and without a cache. No token enters or leaves.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tokensieve.engine.decoder.masks import EXPLICIT_MASK_KERNELS, FULL, attention_kinds
from tokensieve.engine.decoder.side import run_beside
from tokensieve.engine.handoff import Decisions, Prefill
from tokensieve.engine.inflight import InFlight
from tokensieve.errors import Refusal
from tokensieve.methods import Method
from tokensieve.methods.registers import RegisterMethod


class Prefusion:
    """A hook on the LLM that runs the blocks in prefills with images.

    Args:
        model: the top-level model.
        method: the connector method, whose net has the blocks in ``prefusion_layers``.
        decoder_method: the method inside the LLM, if any.

    Raises:
        Refusal: if the blocks cannot run as the LLM's layers do, or rows enter that have no projected tokens.
    """

    def __init__(self, model: Any, method: Method, decoder_method: Method | None, net: Any, flight: InFlight) -> None:
        self.decoder, self.method, self.net, self.flight = model.get_decoder(), method, net, flight
        name = method.info.name
        kernel, kinds = self.decoder.config._attn_implementation, set(attention_kinds(self.decoder.config))
        if kinds != {FULL} or not hasattr(self.decoder, "rotary_emb"):
            got = ", ".join(sorted(kinds)) if hasattr(self.decoder, "rotary_emb") else "other positions"
            raise Refusal(f"{name} runs blocks with rotary embeddings and {FULL} in every layer; this LLM has {got}")
        if kernel not in EXPLICIT_MASK_KERNELS:
            raise Refusal(
                f"{name} runs blocks with {' or '.join(EXPLICIT_MASK_KERNELS)} attention; this LLM runs {kernel}"
            )
        if isinstance(decoder_method, RegisterMethod):
            raise Refusal(
                f"{name} changes the rows that enter the LLM, and registers of {decoder_method} are not its own"
            )
        self.axes = 3 if hasattr(model.base_model, "get_rope_index") else None
        self._handle = self.decoder.register_forward_pre_hook(self._before_llm, with_kwargs=True)

    def remove(self) -> None:
        self._handle.remove()

    def check(self, kwargs: dict[str, Any]) -> None:
        """Refuse a prefill whose text cannot be told from an answer or an earlier turn, before anything runs."""
        cache, logits, name = kwargs.get("past_key_values"), kwargs.get("logits_to_keep"), self.method.info.name
        if cache is not None and cache.get_seq_length():
            raise Refusal(f"{name} takes images in the first turn only: begin a new conversation, or use reselect=True")
        if isinstance(logits, int) and logits > 1 and kwargs.get("labels") is None:
            raise Refusal(
                f"{name} takes the candidates of assisted decoding for the prompt: generate without an assistant"
            )

    def without_rows(self, decisions: Decisions) -> Decisions:
        """Return the decisions without the rows that the net made, which no LLM has received: a replay is refused."""
        return [[r if r.rows is None else replace(r, rows=r.rows[:, :0]) for r in of_row] for of_row in decisions]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _before_llm(self, decoder: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        prefill = self.flight.prefill
        if prefill is None or self.flight.paused:
            return None
        return args, {**kwargs, "inputs_embeds": self.fused(prefill, kwargs["inputs_embeds"])}

    def fused(self, prefill: Prefill, entering: Tensor) -> Tensor:
        """Return the rows `[B, n, D]` that enter the LLM, with those of the text and the slots changed.

        The rows of an image that stays whole do not pass. Where several images of a prompt pass, each passes with the
        same text, and the text rows are the means.
        """
        text, places, sequences = self._text(prefill), list[tuple[int, Tensor]](), list[Tensor]()
        projected = iter(prefill.projected)
        for row, images in enumerate(prefill.images):
            slots = torch.split(prefill.visual[row].nonzero()[:, 0], [image.decision.slots for image in images])
            for image, columns, tokens in zip(images, slots, projected, strict=False):
                if image.layout.video or len(image.layout.views) > 1:
                    raise Refusal(f"{self.method.info.name} takes images of one view; no videos, and no tiles")
                if not image.decision.whole:
                    places.append((row, torch.cat([columns, text[row].nonzero()[:, 0]])))
                    sequences.append(torch.cat([tokens.to(entering), entering[row, places[-1][1]]]))
        if not sequences:
            return entering
        # padding stands last, where no row sees it under a causal mask
        passed = self._run(pad_sequence(sequences, batch_first=True)).to(entering.dtype)
        behind = zip(places, sequences, passed, strict=True)
        changed = torch.cat([rows[len(sequence) - len(at) : len(sequence)] for (_, at), sequence, rows in behind])
        at = (
            torch.cat([columns.new_full(columns.shape, row) for row, columns in places]),
            torch.cat([c for _, c in places]),
        )
        passes = entering.new_zeros(entering.shape[:2]).index_put(at, entering.new_ones(len(changed)), accumulate=True)
        changed = torch.zeros_like(entering).index_put(at, changed, accumulate=True)
        return torch.where((passes > 0)[..., None], changed / passes.clamp(min=1)[..., None], entering)

    def _text(self, prefill: Prefill) -> Tensor:
        """Return `[B, n]` bool, True on text: neither visual, nor padding, nor an answer with labels."""
        mask, labels = prefill.kwargs.get("attention_mask"), prefill.kwargs.get("labels")
        text = ~prefill.visual if mask is None else ~prefill.visual & mask.bool()
        return text if labels is None else text & (labels < 0)

    def _run(self, rows: Tensor) -> Tensor:
        """Run the blocks on rows `[M, L, D]`, each under its causal mask."""
        blocks, length = self.net.prefusion_layers, rows.shape[1]
        # in the LLM's precision, as its own layers; weights in training keep theirs
        blocks.to(rows.device, None if self.net.training else rows.dtype)
        positions = torch.arange(length, device=rows.device)[None]
        axes = positions if self.axes is None else positions.expand(self.axes, 1, -1)
        mask = None  # sdpa is causal without one
        if self.decoder.config._attn_implementation == "eager":
            above = torch.ones(length, length, dtype=torch.bool, device=rows.device).triu(1)
            mask = rows.new_zeros(1, 1, length, length).masked_fill(above, torch.finfo(rows.dtype).min)
        rope = self.decoder.rotary_emb(rows, axes)
        return run_beside(
            blocks, rows, {"attention_mask": mask, "position_ids": positions, "position_embeddings": rope}
        )
