"""Find the user's own words in a prompt: not template, not special tokens, not image placeholders."""

from __future__ import annotations

import logging
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor

from tokensieve.errors import Refusal
from tokensieve.models.layout import to_device

log = logging.getLogger(__name__)
SAMPLE_TEXTS = (("one", "7 two"), ("yes", "7 red"))
"""Two texts have nothing in common: the tokens that their renderings share are template. A second choice is for small
vocabularies, in which both of the first two end with the unknown word."""


class UserTextFinder:
    """Finds the user's words in a batch of prompts.

    With a chat template, renderings of sample texts show the pieces of the template: before the user's first turn,
    between image and words, after the words, and whole assistant turns. Without one, the user's words are all text
    tokens after the first image or video that are not special.

    Args:
        model: the top-level model; gives embeddings and special ids.
        processor: the model's processor or tokenizer, or ``None``.
        with_template: every token after the last image counts as a word of the user.
    """

    def __init__(self, model: Any, processor: Any = None, with_template: bool = False) -> None:
        self.model, self.with_template = model, with_template
        tokenizer = getattr(processor, "tokenizer", processor)
        self.placeholders = {model.config.image_token_id, getattr(model.config, "video_token_id", None)} - {None}
        self.special = _special_ids(model) | set(getattr(tokenizer, "all_special_ids", []))
        self.opening: list[int] = []  # the last template tokens before the user's first turn
        self.before_image: list[int] = []
        self.after_image: list[int] = []
        self.after_text: list[int] = []
        self.next_turn: list[int] = []
        if processor is not None and getattr(processor, "chat_template", None) and not with_template:
            self._learn_template(processor, tokenizer)

    def _learn_template(self, processor: Any, tokenizer: Any) -> None:
        unknown = getattr(tokenizer, "unk_token_id", None)
        encode = partial(tokenizer, add_special_tokens=False)
        pairs = [texts for texts in SAMPLE_TEXTS if unknown not in encode(" ".join(texts))["input_ids"]]
        texts = pairs[0] if pairs else SAMPLE_TEXTS[0]

        def render(*turns: str, image_last: bool = False, system: str = "") -> list[int]:
            """Return the token ids of a conversation; the first turn shows an image."""
            messages = [{"role": "system", "content": [{"type": "text", "text": system}]}] if system else []
            for i, text in enumerate(turns):
                content: list[dict[str, str]] = [{"type": "text", "text": text}]
                if i == 0:
                    content.insert(int(image_last), {"type": "image"})
                messages.append({"role": ("user", "assistant")[i % 2], "content": content})
            ends_with_user = len(turns) % 2 == 1
            rendered = processor.apply_chat_template(messages, add_generation_prompt=ends_with_user, tokenize=False)
            ids: list[int] = tokenizer(rendered, add_special_tokens=False)["input_ids"]
            return ids

        first, second = map(render, texts)
        head = _common_start(first, second)
        image = self.model.config.image_token_id
        self.after_image = head[len(head) - head[::-1].index(image) :] if image in head else []
        self.after_text = _common_end(first, second)
        self.next_turn = self._between_turns(render, texts)
        self._learn_opening(render, texts)

    def _learn_opening(self, render: Any, texts: tuple[str, str]) -> None:
        """Learn the template tokens before the user's first turn, whatever the system prompt; none if they vary."""
        heads, image = [], self.model.config.image_token_id
        for system in ("", *texts):
            try:
                first, second = (render(text, image_last=True, system=system) for text in texts)
            except Exception as error:  # templates refuse in any type; the plain prompt did render
                log.info("the chat template takes no %s: %s", "system prompt" if system else "text first", error)
                continue
            head, tail = _common_start(first, second), _common_end(first, second)
            heads.append(head[: head.index(image)] if image in head else head)
            self.before_image = tail[: tail.index(image)] if image in tail else []
        if not heads:
            return
        opening = reduce(_common_end, heads)
        recognisable = opening == heads[0] or bool(self.special.intersection(opening))
        if recognisable and all(_end_of(head, opening) == len(head) for head in heads):
            self.opening = opening

    def _between_turns(self, render: Any, texts: tuple[str, str]) -> list[int]:
        """Return the template tokens from the end of an assistant turn to the start of the next user turn."""
        answers = [render("x", answer, "x") for answer in texts]
        tail = _common_end(*answers)
        other_text = render("x", *texts)
        return _common_start(tail, other_text[len(answers[0]) - len(tail) :])

    def embedded(self, ids: Tensor, excluded: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the embeddings `[B, M, D]` of each row's words, and `[B, M]` bool, False on padding.

        Words before the first image are included.

        Args:
            ids: `[B, L]`.
            excluded: `[B, L]` bool, True on columns without user text, such as timestamps between a video's frames.

        Raises:
            Refusal: if a row with an image or a video has no word.
        """
        index, valid = self.find(ids, excluded, before_image=True)
        return self.model.get_input_embeddings()(ids.gather(1, index)), valid

    def find(self, ids: Tensor, excluded: Tensor | None = None, before_image: bool = False) -> tuple[Tensor, Tensor]:
        """Return the columns of each row's words, `[B, M]`, and `[B, M]` bool, False on padding; raises as above.

        Args:
            ids, excluded: `[B, L]`, as in :meth:`embedded`.
            before_image: include words before the first image, which cannot attend to it.
        """
        prompts = ids.tolist()
        rows = [self.columns(row, before_image) for row in prompts]
        if excluded is not None:
            rows = [[c for c in row if not skip[c]] for row, skip in zip(rows, excluded.tolist(), strict=True)]
        for sample, (columns, row) in enumerate(zip(rows, prompts, strict=True)):
            if not columns and self.placeholders.intersection(row):
                qualifier = "" if before_image else " after its image (those before it cannot attend to it)"
                raise Refusal(
                    f"the prompt of sample {sample} has no words to go by{qualifier}; this method needs the user's text"
                )
        width = max(map(len, rows), default=0)
        index = torch.tensor([row + [0] * (width - len(row)) for row in rows], dtype=torch.int64)
        valid = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows])
        return to_device(index, ids.device), to_device(valid, ids.device)

    def columns(self, row: list[int], before_image: bool = False) -> list[int]:
        """Return the columns of one prompt's words, ascending."""
        first = next((column for column, token in enumerate(row) if token in self.placeholders), None)
        if first is None:
            return []
        if self.with_template:
            last = max(column for column, token in enumerate(row) if token in self.placeholders)
            return list(range(last + 1, len(row)))
        if before_image:
            first = _end_of(row[:first], self.opening) or first
        template = [False] * len(row)
        for start in range(first, len(row)):
            image_here, image_before = row[start] in self.placeholders, row[start - 1] in self.placeholders
            if image_here and not image_before:
                before = start - len(self.before_image)
                if _stands_at(row, before, self.before_image):
                    _mark(template, before, start)
            if image_before and not image_here and _stands_at(row, start, self.after_image):
                _mark(template, start, start + len(self.after_image))
            if _stands_at(row, start, self.after_text):  # an assistant turn begins, and lasts until the next user turn
                end = start + len(self.after_text)
                while end < len(row) and not _stands_at(row, end, self.next_turn):
                    end += 1
                _mark(template, start, end + len(self.next_turn))
        return [i for i in range(first, len(row)) if not template[i] and row[i] not in self.special]


def _stands_at(row: list[int], start: int, piece: list[int]) -> bool:
    return bool(piece) and row[start : start + len(piece)] == piece


def _mark(flags: list[bool], start: int, end: int) -> None:
    flags[start:end] = [True] * (min(end, len(flags)) - start)


def _end_of(row: list[int], piece: list[int]) -> int | None:
    """Return the end of the first occurrence of a piece."""
    ends = (start + len(piece) for start in range(len(row)) if _stands_at(row, start, piece))
    return next(ends, None)


def _common_end(a: list[int], b: list[int]) -> list[int]:
    return _common_start(a[::-1], b[::-1])[::-1]


def _common_start(a: list[int], b: list[int]) -> list[int]:
    length = 0
    while length < min(len(a), len(b)) and a[length] == b[length]:
        length += 1
    return a[:length]


def _special_ids(model: Any) -> set[int]:
    """Return the ids that the model's configs declare special: placeholders, vision marks, begin, end and padding."""
    names = ("bos", "eos", "pad", "image", "video", "vision_start", "vision_end", "image_start", "image_end")
    ids: set[int] = set()
    text = getattr(model.config, "text_config", None)
    for config in (model.config, text, getattr(model, "generation_config", None)):
        for name in names:
            value = getattr(config, f"{name}_token_id", None)
            ids |= set(value) if isinstance(value, list) else {value} if isinstance(value, int) else set()
    return ids
