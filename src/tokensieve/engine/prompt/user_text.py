"""Which columns of a prompt are the user's own words: not template, not special tokens, not image placeholders."""

from __future__ import annotations

import logging
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from tokensieve.errors import Refusal
from tokensieve.models.layout import to_device

log = logging.getLogger(__name__)
MARKS = ("one", "7 two")  # two texts with nothing in common: what their renderings share is template


class UserTextFinder:
    """Finds the user's words in a batch of prompts.

    With a processor that has a chat template, the template's own pieces (between image and words, after the words, and
    whole assistant turns) are told from renderings of it, and so is where the user's first turn begins: words before
    the first image count where nothing need have seen it. Without, every text token after the first image or video
    that is not special counts.

    Args:
        model: the top-level model; for its embeddings and special ids.
        processor: the model's processor or tokenizer, or ``None``.
    """

    def __init__(self, model: Any, processor: Any = None) -> None:
        self.model = model
        tokenizer = getattr(processor, "tokenizer", processor)
        self.shown = {model.config.image_token_id, getattr(model.config, "video_token_id", None)} - {None}
        self.special = _special_ids(model) | set(getattr(tokenizer, "all_special_ids", []))
        self.opening: list[int] = []  # the end of what stands before the user's first turn
        self.before_image: list[int] = []
        self.after_image: list[int] = []
        self.after_words: list[int] = []
        self.next_turn: list[int] = []
        if processor is not None and getattr(processor, "chat_template", None):
            self._learn(processor, tokenizer)

    def _learn(self, processor: Any, tokenizer: Any) -> None:
        def tokens(*turns: str, last: bool = False, system: str = "") -> list[int]:
            messages = [{"role": "system", "content": [{"type": "text", "text": system}]}] if system else []
            for i, text in enumerate(turns):
                content: list[dict[str, str]] = [{"type": "text", "text": text}]
                if i == 0:
                    content.insert(int(last), {"type": "image"})
                messages.append({"role": ("user", "assistant")[i % 2], "content": content})
            asks = len(turns) % 2 == 1
            rendered = processor.apply_chat_template(messages, add_generation_prompt=asks, tokenize=False)
            ids: list[int] = tokenizer(rendered, add_special_tokens=False)["input_ids"]
            return ids

        first, second = tokens(MARKS[0]), tokens(MARKS[1])
        head = _common_start(first, second)
        image = self.model.config.image_token_id
        self.after_image = head[len(head) - head[::-1].index(image) :] if image in head else []
        self.after_words = _common_end(first, second)
        self.next_turn = self._between(tokens)
        self._learn_opening(tokens)

    def _learn_opening(self, tokens: Any) -> None:
        """What stands before the user's words, whatever the system prompt; nothing where that cannot be told."""
        heads, image = [], self.model.config.image_token_id
        for system in ("", *MARKS):
            try:
                both = [tokens(mark, last=True, system=system) for mark in MARKS]
            except Exception as error:  # the plain prompt did render: what fails here is a refusal, in any type
                log.info("the chat template takes no %s: %s", "system prompt" if system else "words first", error)
                continue
            head, tail = _common_start(*both), _common_end(*both)
            heads.append(head[: head.index(image)] if image in head else head)
            self.before_image = tail[: tail.index(image)] if image in tail else []
        if not heads:
            return
        opening = reduce(_common_end, heads)
        telling = opening == heads[0] or bool(self.special.intersection(opening))
        if telling and all(_end_of(head, opening) == len(head) for head in heads):
            self.opening = opening

    def _between(self, tokens: Any) -> list[int]:
        """Template tokens from the end of an assistant turn to the start of the next user turn."""
        renderings = [tokens("x", answer, question) for answer, question in ((MARKS[0], "x"), (MARKS[1], "x"))]
        tail = _common_end(*renderings)
        other = tokens("x", MARKS[0], MARKS[1])
        return _common_start(tail, other[len(renderings[0]) - len(tail) :])

    def embedded(self, ids: Tensor, inside: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Embeddings of each row's words, wherever they stand, `[B, M, D]`, and which of them are real, `[B, M]` bool.

        Args:
            inside: `[B, L]` bool, True where there can be none: at the timestamps between the frames of a video.

        Raises:
            ValueError: if a row with an image or a video has no word.
        """
        index, real = self.find(ids, inside, anywhere=True)
        return self.model.get_input_embeddings()(ids.gather(1, index)), real

    def find(self, ids: Tensor, inside: Tensor | None = None, anywhere: bool = False) -> tuple[Tensor, Tensor]:
        """Columns of each row's words, `[B, M]`, and which of them are real, `[B, M]` bool; raises as above.

        Args:
            anywhere: those before the first image, too, which have not seen it.
        """
        prompts = ids.tolist()
        rows = [self.columns(row, anywhere) for row in prompts]
        if inside is not None:
            rows = [[c for c in row if not within[c]] for row, within in zip(rows, inside.tolist(), strict=True)]
        for i, (found, row) in enumerate(zip(rows, prompts, strict=True)):
            if not found and self.shown.intersection(row):
                where = "" if anywhere else " after its image (those before it have not seen it)"
                raise Refusal(
                    f"the prompt of sample {i} has no words to go by{where}; this method needs the user's text"
                )
        width = max(map(len, rows), default=0)
        index = torch.tensor([r + [0] * (width - len(r)) for r in rows], dtype=torch.int64)
        real = torch.tensor([[True] * len(r) + [False] * (width - len(r)) for r in rows])
        return to_device(index, ids.device), to_device(real, ids.device)

    def columns(self, row: list[int], anywhere: bool = False) -> list[int]:
        """Columns of one prompt's words, ascending."""
        first = next((column for column, token in enumerate(row) if token in self.shown), None)
        if first is None:
            return []
        first = (_end_of(row[:first], self.opening) if anywhere else None) or first
        template = [False] * len(row)
        for start in range(first, len(row)):
            if row[start] in self.shown and row[start - 1] not in self.shown:
                before = start - len(self.before_image)
                if _at(row, before, self.before_image):
                    _mark(template, before, start)
            if row[start - 1] in self.shown and row[start] not in self.shown and _at(row, start, self.after_image):
                _mark(template, start, start + len(self.after_image))
            if _at(row, start, self.after_words):  # from here the assistant speaks, until the next turn
                end = start + len(self.after_words)
                while end < len(row) and not _at(row, end, self.next_turn):
                    end += 1
                _mark(template, start, end + len(self.next_turn))
        return [i for i in range(first, len(row)) if not template[i] and row[i] not in self.special]


def _at(row: list[int], start: int, piece: list[int]) -> bool:
    return bool(piece) and row[start : start + len(piece)] == piece


def _mark(flags: list[bool], start: int, end: int) -> None:
    flags[start:end] = [True] * (min(end, len(flags)) - start)


def _end_of(row: list[int], piece: list[int]) -> int | None:
    """Where the first occurrence of a piece ends."""
    found = (start + len(piece) for start in range(len(row)) if _at(row, start, piece))
    return next(found, None)


def _common_end(a: list[int], b: list[int]) -> list[int]:
    return _common_start(a[::-1], b[::-1])[::-1]


def _common_start(a: list[int], b: list[int]) -> list[int]:
    same = 0
    while same < min(len(a), len(b)) and a[same] == b[same]:
        same += 1
    return a[:same]


def _special_ids(model: Any) -> set[int]:
    """Ids that the model's configs declare special: placeholders, vision marks, begin, end and padding."""
    names = ("bos", "eos", "pad", "image", "video", "vision_start", "vision_end", "image_start", "image_end")
    found: set[int] = set()
    text = getattr(model.config, "text_config", None)
    for config in (model.config, text, getattr(model, "generation_config", None)):
        for name in names:
            value = getattr(config, f"{name}_token_id", None)
            found |= set(value) if isinstance(value, list) else {value} if isinstance(value, int) else set()
    return found
