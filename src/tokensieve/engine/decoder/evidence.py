"""What a decoder method asks to be given, read while the blocks run and handed out at a stage."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tokensieve.engine.decoder.sequence import Member, PrefillState
from tokensieve.engine.probe import Probe, attention_of_queries
from tokensieve.engine.prompt.placeholders import on_device
from tokensieve.errors import Refusal
from tokensieve.methods import DecoderMethod
from tokensieve.tokens import VisualTokens


class DecoderEvidence:
    """Reads from the blocks of one LLM what one method needs, and nothing else.

    Args:
        decoder: the LLM.
        method: whose needs are met.
        stages: the blocks before which it acts.
        kinds: the kind of attention of each block.
        current: the prefill of this thread.

    Raises:
        ValueError: if the method goes by a rotary embedding and blocks have different ones.
    """

    def __init__(
        self,
        decoder: Any,
        method: DecoderMethod,
        stages: list[int],
        kinds: list[str],
        current: Callable[[], PrefillState | None],
    ) -> None:
        if method.needs.rotary and len(set(kinds)) > 1:
            raise Refusal(f"{method} goes by the rotary embedding; in this LLM, blocks differ in it or have none")
        self.decoder, self.needs, self.stages, self.current = decoder, method.needs, stages, current
        self.probes: dict[int, Probe] = {}
        if self.needs.queries is not None or self.needs.keys:
            asked = {stage: decoder.layers[stage - (not self.needs.own)] for stage in stages}
            for stage, block in asked.items():
                softcap = getattr(block.self_attn, "attn_logit_softcapping", None)
                self.probes[stage] = Probe(block.self_attn, partial(self._read, softcap))
        self._handles = []
        if self.needs.residual:
            mlps = [decoder.layers[stage - 1].mlp for stage in stages]
            self._handles = [mlp.register_forward_pre_hook(self._entering_mlp) for mlp in mlps]
        self.first = 0 if self.needs.entry else stages[0] - self.needs.residual
        """The first block that must tell :meth:`watch` what enters it."""

    def remove(self) -> None:
        for probe in self.probes.values():
            probe.remove()
        for handle in self._handles:
            handle.remove()

    def arm(self) -> None:
        for probe in self.probes.values():
            probe.arm()

    def disarm(self) -> None:
        for probe in self.probes.values():
            probe.take()

    # -- reading ------------------------------------------------------------------------------------------------------

    def watch(self, run: PrefillState, number: int, hidden: Tensor) -> None:
        """Take note of what enters block ``number``."""
        if self.needs.entry and number == 0:
            run.seen["embeddings"] = hidden
        if self.needs.residual and number + 1 in self.stages:
            run.seen["before"] = hidden

    def ask(self, run: PrefillState, number: int, hidden: Tensor, kwargs: dict[str, Any]) -> None:
        """Take what the probe of a stage read in the block before, or let the stage's own block read ahead."""
        if number not in self.probes:
            return
        probe = self.probes[number]
        if self.needs.own:
            with probe.only():  # runs the block up to its queries and keys, no further
                self.decoder.layers[number].forward(hidden, **{**kwargs, "past_key_values": None})
        (read,) = probe.take()
        run.seen |= read

    def _read(
        self, softcap: float | None, query: Tensor, key: Tensor, scaling: float, mask: Tensor | None
    ) -> dict[str, Tensor]:
        """Rows of the wanted queries, `[B, H, Q, n]`, and keys with heads side by side, `[B, n, E]`."""
        run, read = self.current(), {}
        assert run is not None  # probes are armed in prefills only
        stream = run.stream
        if self.needs.queries is not None:
            columns = torch.full((len(query), 1), query.shape[-2] - 1, device=query.device)
            if self.needs.queries == "words":
                assert stream.words is not None
                columns = stream.words[0]
            mask = mask if isinstance(mask, Tensor) and mask.ndim == 4 else stream.mask
            read["queries"] = attention_of_queries(query, key, scaling, columns, mask, softcap)
        if self.needs.keys:
            read["keys"] = key.transpose(1, 2).flatten(2)
        return read

    def _entering_mlp(self, mlp: nn.Module, args: Any) -> None:
        run = self.current()
        if run is not None:
            run.seen["middle"] = args[0]

    # -- handing out --------------------------------------------------------------------------------------------------

    def tokens(
        self, run: PrefillState, number: int, hidden: Tensor, positions: Any, members: list[Member], columns: Tensor
    ) -> VisualTokens:
        """What the method sees of equal images: `[G, N]` of G ``members``.

        Args:
            hidden: what enters block ``number``, before anything leaves.
            positions: (cos, sin) of that sequence.
            columns: `[G, N]`, where the patches of each member stand in it.
        """
        needs, stream, seen = self.needs, run.stream, run.seen
        of = on_device([row for row, _ in members], hidden.device)
        words = mask = None
        if stream.words is not None:
            words, mask = stream.words[0][of], stream.words[1][of]

        def at(rows: Tensor | None, columns: Tensor | None) -> Tensor | None:
            return None if rows is None or columns is None else rows.expand(len(hidden), -1, -1)[of[:, None], columns]

        states = self.decoder.norm(hidden) if needs.normed else hidden
        turned = _turned(*positions) if needs.rotary else None
        queries, embeddings, first = seen.get("queries"), seen.get("embeddings"), None
        if embeddings is not None:
            first = torch.stack([_entered(run, row, image) for row, image in members])
        features = at(states, columns)
        assert features is not None
        return VisualTokens(
            features,
            text=at(states, words),
            text_mask=mask,
            queries=None if queries is None else queries[of].take_along_dim(columns[:, None, None], -1),
            keys=at(seen.get("keys"), columns),
            text_keys=at(seen.get("keys"), words),
            entry=at(embeddings, first),
            text_entry=at(embeddings, None if run.entry.words is None else run.entry.words[0][of]),
            before=at(seen.get("before"), columns),
            middle=at(seen.get("middle"), columns),
            rotary=at(turned, columns),
            text_rotary=at(turned, words),
            ranked=_ranked(run, members) if needs.ranked else None,
            stage=self.stages.index(number),
            depth=len(self.decoder.layers),
            **_whereabouts(run, members, needs.grid),
        )


def _whereabouts(run: PrefillState, members: list[Member], grid: bool) -> dict[str, Any]:
    """How many tokens of equal images entered the LLM and, if a grid is asked for, where in them the rest stands."""
    plans = [run.plans[row][image] for row, image in members]
    decision, places = plans[0].decision, None
    if grid and decision.grid is not None:
        anchors, width = torch.stack([plan.anchors for plan in plans]), decision.grid[1]
        places = torch.stack([anchors.div(width, rounding_mode="floor"), anchors % width], -1)
    left = decision.slots if not plans[0].inside else plans[0].inside[-1].slots
    return {"grid": decision.grid if left == decision.total else None, "places": places, "entered": plans[0].entered}


def _ranked(run: PrefillState, members: list[Member]) -> Tensor | None:
    """What the connector method ranked the patches of equal images by; ``None`` if it did not."""
    found = []
    for plan in (run.plans[row][image] for row, image in members):
        if plan.ranked is None:
            return None
        rows, structure = plan.reduce_inside(plan.ranked[:, None])[:, 0], plan.left.structure
        found.append(rows if structure is None else rows[~structure])
    return torch.stack(found)


def _entered(run: PrefillState, row: int, image: int) -> Tensor:
    """Where the patches of an image stood as they entered the LLM."""
    columns, plan = run.entry.images[row][image], run.plans[row][image]
    structure = plan.shape.structure
    return columns if structure is None else columns[~structure[plan.decision.anchors]]


def _turned(cos: Tensor, sin: Tensor) -> Tensor:
    """A vector of ones as the rotary embedding turns it at each position, `[B, n, d]`."""
    half = cos.shape[-1] // 2
    return torch.cat([cos[..., :half] - sin[..., :half], cos[..., half:] + sin[..., half:]], -1).float()
