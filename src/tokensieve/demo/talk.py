"""A conversation about one image: later questions on the first one's tokens, on new ones, or encoded anew."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from PIL import Image
from torch import Tensor

from tokensieve.budget import Budget
from tokensieve.demo.run import (
    LONGEST_ANSWER,
    Workbench,
    check_number,
    check_question,
    draw,
    memory_errors,
)
from tokensieve.engine import attach
from tokensieve.errors import Refusal
from tokensieve.evaluate import Sample, decode
from tokensieve.evaluate.answer import average_tokens, together
from tokensieve.evaluate.pictures import Picture
from tokensieve.evaluate.prompt import check_texts, left_padded_batch
from tokensieve.evaluate.rows import label
from tokensieve.loading import to_model
from tokensieve.methods import Method, Positions
from tokensieve.reduction import Reduction

Reuse: TypeAlias = Literal["cache", "reselect", "history"]
LATER_INPUTS = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")  # all but the images
MOST_TURNS = 20


@dataclass(frozen=True)
class Turn:
    """One question and its answer.

    Attributes:
        prefilled: columns that the LLM received for this question, averaged over its layers: those that are not in the
            cache of an earlier one.
        on_cache: whether it was answered from the tokens in the cache of the earlier turns.
        encoded: whether the image was encoded for it.
    """

    question: str
    answer: str
    prefilled: int
    on_cache: bool
    encoded: bool


class Speaker:
    """One side of a conversation: the model with some methods attached, its turns and its cache.

    Attributes:
        name: spec and budget.
        turns: in their order.
        decision: the kept tokens that the latest answer is based on.
        decided_on: questions whose words a text-informed method has read for it.
    """

    def __init__(self, bench: Workbench, name: str, stages: list[Method], positions: Positions) -> None:
        self.name, self.turns = name, list[Turn]()
        self.decision: Reduction | None = None
        self.decided_on: tuple[str, ...] = ()
        self.reads_words = any(stage.needs.requests("user_text") for stage in stages)
        self.inside_llm = any(stage.info.stage == "decoder" for stage in stages)
        self._bench, self._stages, self._positions = bench, stages, positions
        self._cache: Any = None
        self._cached_ids: Tensor | None = None  # [1, L]: the tokens of the cache as the caller counts them
        self._rope_deltas: Any = None

    def ask(self, image: Image.Image, question: str, reuse: Reuse, max_new_tokens: int) -> Turn:
        """Answer a question after the earlier ones, and remember it. The caller holds the lock of the workbench."""
        bench, model = self._bench, self._bench.model
        inputs = to_model(model, conversation_inputs(bench.processor, image, self.turns, question))
        ids = inputs["input_ids"]
        encoded = reuse == "history" or not self._begins_with_cache(ids)
        cache: dict[str, Any] = {}
        if not encoded:
            inputs = {name: inputs[name] for name in LATER_INPUTS if name in inputs}
            cache = {"past_key_values": self._cache}
            self._restore_positions()
        options: dict[str, Any] = {
            "processor": bench.processor,
            "positions": self._positions,
            "reselect": reuse == "reselect",
        }
        generating = {"do_sample": False, "num_beams": 1, "max_new_tokens": max_new_tokens}
        with attach(model, self._stages, **options) as sieve, torch.inference_mode():
            out = model.generate(**inputs, **cache, **generating, return_dict_in_generate=True)
            decides = bool(sieve.last)  # in a prefill, and in a later turn that is decided anew
            if decides:
                self.decision = together(sieve.last[0]).to("cpu")
                self.decided_on = (*(turn.question for turn in self.turns), question)
                dropped = self.decision.total - average_tokens(sieve.tokens[0])
            else:
                dropped = float(self._cache_length)
        (answer,) = decode(bench.processor, out.sequences, ids.shape[1])
        turn = Turn(question, answer.strip(), round(ids.shape[1] - dropped), not encoded and not decides, encoded)
        self.turns.append(turn)
        # the last generated token was never fed to the model
        self._cache, self._cached_ids = out.past_key_values, out.sequences[:, :-1]
        self._rope_deltas = getattr(model.base_model, "rope_deltas", None)
        return turn

    @property
    def _cache_length(self) -> int:
        return 0 if self._cached_ids is None else self._cached_ids.shape[1]

    def _begins_with_cache(self, ids: Tensor) -> bool:
        """Return whether the prompt starts with all tokens of the cache and goes on.

        A chat template may write an answer in other tokens than the model generated; such a cache cannot be used.
        """
        known = self._cached_ids
        length = self._cache_length
        return known is not None and length < ids.shape[1] and torch.equal(ids[:, :length], known)

    def _restore_positions(self) -> None:
        """Give the model the position offset of this conversation.

        Models with M-RoPE remember the one of their latest call, which may have been another visitor's.
        """
        if hasattr(self._bench.model.base_model, "rope_deltas"):
            self._bench.model.base_model.rope_deltas = self._rope_deltas


class Conversation:
    """Questions about one image, answered by the unreduced model and by a method side by side.

    Args:
        bench: the shared model.
        picture: the image.
        method: a spec.
        keep: its budget, if the spec leaves it open.
        positions: as for ``attach``.
        reuse: "cache" answers later questions on the tokens that the first one kept; "reselect" decides anew for each
            question on the features of the image; "history" also encodes the image anew.

    Raises:
        Refusal: no image, a bad spec or budget, or a model that holds no conversation.
    """

    def __init__(
        self, bench: Workbench, picture: Picture | None, method: str, keep: Budget, positions: Positions, reuse: Reuse
    ) -> None:
        if not bench.model.can_generate():
            raise Refusal(f"{bench.name} chooses among answers that it knows; it holds no conversation")
        if not getattr(bench.processor, "chat_template", None):
            raise Refusal(f"{type(bench.processor).__name__} has no chat template, so there is no conversation")
        if picture is None:
            raise Refusal("there is no image; upload one, or choose an example")
        full, *others = bench.plan([method], [keep])
        entry = others[0] if others else full
        self._bench, self.reuse = bench, reuse
        self.image = Sample("", picture, "-", ()).open()
        self.full = Speaker(bench, "full", list(full.runs[0].stages), positions)
        self.reduced = Speaker(bench, label(entry.method, entry.keep), list(entry.runs[0].stages), positions)

    def ask(self, question: str, max_new_tokens: int = 32) -> None:
        """Answer a question with both; a refused question leaves the conversation as it was.

        Raises:
            Refusal: an empty question, one that the method cannot have, or too many turns.
        """
        check_question(question)
        check_number("the longest answer", max_new_tokens, 1, LONGEST_ANSWER)
        question = question.strip()
        check_texts(self._bench.processor, [Sample("demo", lambda: self.image, question, ())])
        if len(self.full.turns) >= MOST_TURNS:
            raise Refusal(f"a conversation has at most {MOST_TURNS} questions; start a new one")
        with self._bench.lock, memory_errors():
            # the method first: where it refuses the question, neither side has answered it
            self.reduced.ask(self.image, question, self.reuse, max_new_tokens)
            self.full.ask(self.image, question, self.reuse, max_new_tokens)

    def picture(self) -> Image.Image | None:
        """Return the tokens that the method's latest answer is based on, drawn over the image."""
        decision = self.reduced.decision
        return None if decision is None else draw(self.image, decision, self._bench.processor)

    def explanation(self) -> list[str]:
        """Return sentences: what was kept, on which words this was decided, and what the latest question cost."""
        decision = self.reduced.decision
        if decision is None:
            return []
        name, turn, full = self.reduced.name, self.reduced.turns[-1], self.full.turns[-1]
        sentences = [f"{name} kept {decision.slots} of {decision.total} visual tokens.", *decision.notes]
        first, quoted = self.reduced.turns[0].question, " · ".join(f"“{text}”" for text in self.reduced.decided_on)
        place = "inside the LLM, " if self.reduced.inside_llm else ""
        if not self.reduced.reads_words and not self.reduced.inside_llm:
            sentences.append("It reads no question, so these tokens would be kept for any.")
        elif len(self.reduced.turns) > 1 and turn.on_cache:
            sentences.append(
                f"It chose them {place}by the words of the first question, “{first}”. Later questions are answered "
                "from the same tokens, whatever they are about."
            )
        else:
            sentences.append(f"It chose them {place}by the words of {quoted}.")
        sentences.append(
            f"The latest question took {turn.prefilled} columns of prefill per layer, the full model {full.prefilled}."
        )
        if not turn.on_cache and not turn.encoded:
            sentences.append("The method decided anew; the vision encoder did not run again.")
        if self.reuse != "history" and len(self.reduced.turns) > 1 and (turn.encoded or full.encoded):
            sentences.append(
                "The cache could not be used, because the chat template writes the earlier answer in other tokens than "
                "the model generated: the history was encoded anew."
            )
        return sentences


def conversation_inputs(processor: Any, image: Image.Image, turns: list[Turn], question: str) -> dict[str, Tensor]:
    """Return the processor's tensors of a conversation, `[1, L]`: the image stands before the first question."""
    return left_padded_batch(processor, [[image]], [question], [[(turn.question, turn.answer) for turn in turns]])
