"""The tab of a conversation about one image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

from tokensieve.demo import cards
from tokensieve.demo.examples import Example
from tokensieve.demo.fields import (
    MODEL,
    QUIET,
    SHOW,
    QuestionFields,
    all_methods,
    budget_fields,
    budget_of,
    one_line,
    positions_choice,
)
from tokensieve.demo.run import Workbench
from tokensieve.demo.talk import Conversation
from tokensieve.errors import Refusal
from tokensieve.methods import parse

REUSE = [
    ("the tokens of the first question (its KV cache)", "cache"),
    ("tokens chosen anew by the new words, without encoding the image again", "reselect"),
    ("image and history encoded anew", "history"),
]
IDLE_SECONDS = 1800  # a conversation, which holds two KV caches, is forgotten then


class TalkTab:
    """Lays out the tab inside of the open ``gr.Blocks``. Arguments as for :class:`~tokensieve.demo.ask_tab.AskTab`."""

    def __init__(self, bench: Workbench, examples: Sequence[Example], methods: Sequence[str]) -> None:
        self.bench = bench
        talk = gr.State(None, time_to_live=IDLE_SECONDS)
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                self.fields = QuestionFields(examples)
                with gr.Row():
                    run = gr.Button("Ask", variant="primary", elem_id="talk")
                    new = gr.Button("New conversation", elem_id="new")
                method = gr.Dropdown(
                    all_methods(methods), value=first_reader(methods), allow_custom_value=True, label="Method"
                )
                budget = budget_fields()
                positions = positions_choice()
                reuse = gr.Radio(REUSE, value="cache", label="Later questions are answered from")
            with gr.Column(scale=5, min_width=300):
                result = gr.HTML(
                    "<p>Ask a question, then another one about the same image.</p>",
                    elem_id="conversation",
                    padding=False,
                )
        picture, question, example = self.fields.inputs
        settings = [method, *budget, positions, reuse]
        for trigger in (run.click, question.submit):
            trigger(self.answer, [talk, picture, question, example, *settings], [talk, result], **MODEL)
        run.click(None, js=SHOW.format("conversation"), api_visibility="private")
        new.click(lambda: (None, ""), None, [talk, result], **QUIET)
        # another image or method begins another conversation
        for component in (example, picture, *settings):
            component.change(lambda: (None, ""), None, [talk, result], **QUIET)

    def answer(
        self,
        talk: Conversation | None,
        file: str | None,
        question: str,
        example: int | None,
        method: str,
        kind: str,
        share: float,
        count: float,
        positions: Any,
        reuse: Any,
    ) -> tuple[Conversation | None, str]:
        """Answer a question; return the conversation and its HTML."""
        try:
            if talk is None:
                picture, _ = self.fields.read(file, question, example)
                keep = budget_of(kind, share, count)
                talk = Conversation(self.bench, picture, method or "", keep, positions, reuse)
            talk.ask(question or "")
            return talk, cards.conversation(talk)
        except (Refusal, OSError) as error:
            shown = cards.conversation(talk) if talk is not None and talk.full.turns else ""
            return talk, cards.message(one_line(error)) + shown


def first_reader(specs: Sequence[str]) -> str:
    """Return the first spec that reads the user's words, which shows most in a conversation; else the first one."""
    readers = (spec for spec in specs if any(stage.needs.requests("user_text") for stage in parse(spec)))
    return next(readers, specs[0])
