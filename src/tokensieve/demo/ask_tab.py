"""The tab of one question: several methods side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr

from tokensieve.demo import cards
from tokensieve.demo.examples import Example
from tokensieve.demo.fields import (
    MODEL,
    SHOW,
    QuestionFields,
    budget_fields,
    budget_of,
    methods_choice,
    one_line,
    positions_choice,
    whole,
)
from tokensieve.demo.run import LONGEST_ANSWER, MOST_ROUNDS, Request, Row, Workbench
from tokensieve.errors import Refusal


class AskTab:
    """Lays out the tab inside of the open ``gr.Blocks``.

    Args:
        bench: the model.
        examples: images to choose from.
        methods: specs that are chosen at first.
        note: a remark below answers about images that are not among the examples.
    """

    def __init__(self, bench: Workbench, examples: Sequence[Example], methods: Sequence[str], note: str = "") -> None:
        self.bench, self.note = bench, note
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                self.fields = QuestionFields(examples)
                with gr.Row():
                    run = gr.Button("Ask", variant="primary", elem_id="ask")
                    stop = gr.Button("Stop", elem_id="stop")
                chosen = methods_choice(methods)
                budget = budget_fields()
                positions = positions_choice()
                with gr.Accordion("More", open=False):
                    rounds = gr.Slider(0, MOST_ROUNDS, 10, step=1, label="Timed rounds", info="0 measures no cost")
                    longest = gr.Slider(1, LONGEST_ANSWER, 32, step=1, label="Longest answer in tokens")
            with gr.Column(scale=5, min_width=300):
                result = gr.HTML(f"<p>{cards.HINT}</p>", elem_id="result", padding=False)
        inputs = [*self.fields.inputs, chosen, *budget, positions, rounds, longest]
        clicked = run.click(self.answer, inputs, result, **MODEL)
        submitted = self.fields.question.submit(self.answer, inputs, result, **MODEL)
        run.click(None, js=SHOW.format("result"), api_visibility="private")
        stop.click(None, cancels=[clicked, submitted], api_visibility="private")

    def answer(
        self,
        file: str | None,
        question: str,
        example: int | None,
        methods: Sequence[str],
        kind: str,
        share: float,
        count: float,
        positions: Any,
        rounds: float,
        longest: float,
    ) -> Iterator[str]:
        """Yield the cards as the answers arrive, and then with their costs."""
        try:
            picture, right = self.fields.read(file, question, example)
            request = Request(
                picture,
                question or "",
                methods,
                budget_of(kind, share, count),
                positions,
                right,
                whole(rounds, "timed rounds"),
                whole(longest, "the longest answer"),
            )
            total, rows = len(self.bench.plan(methods, [request.keep])), list[Row]()
            note = self.note if example is None else ""
            yield cards.cards(rows, total)
            for row in self.bench.rows(request):
                rows.append(row)
                yield cards.cards(rows, total, measuring=request.rounds > 0, note=note)
            if request.rounds:
                yield cards.cards(self.bench.costs(request, rows), total, note=note)
        except (Refusal, OSError) as error:
            yield cards.message(one_line(error))
