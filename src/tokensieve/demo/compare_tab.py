"""The tab of comparisons: one runs in the background, and reports open inside the page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

from tokensieve.budget import parse_budget
from tokensieve.demo import cards
from tokensieve.demo.fields import QUIET, methods_choice, one_line, whole
from tokensieve.demo.jobs import Jobs
from tokensieve.errors import Refusal

KEEPS = ["50%", "33%", "25%", "11%", "5%"]
SECONDS = 1.0  # between two looks at the progress


class CompareTab:
    """Lays out the tab inside of the open ``gr.Blocks``.

    Args:
        jobs: comparisons and reports.
        blocks: the page; on loading it shows a comparison that runs already.
        methods: specs that are chosen at first.
    """

    def __init__(self, jobs: Jobs, blocks: gr.Blocks, methods: Sequence[str]) -> None:
        self.jobs = jobs
        with gr.Row():
            name = gr.Textbox("demo", label="Folder of results", min_width=150)
            chosen = methods_choice(methods, scale=3, min_width=220)
            keeps = gr.Dropdown(
                KEEPS, value=["25%", "11%"], multiselect=True, allow_custom_value=True, label="Budgets", min_width=160
            )
            questions = gr.Number(100, label="Questions", min_width=120)
        with gr.Row():
            start = gr.Button("Compare", variant="primary", elem_id="compare")
            cancel = gr.Button("Cancel", elem_id="cancel")
        state = gr.HTML(elem_id="state", padding=False)
        timer = gr.Timer(SECONDS, active=False)
        with gr.Row():
            reports = gr.Dropdown(self.jobs.reports(), value=None, label="Open a report", scale=4)
            refresh = gr.Button("Refresh", scale=1, min_width=100)
        report = gr.HTML(elem_id="report", padding=False)
        start.click(self.start, [name, chosen, keeps, questions], [state, timer], **QUIET)
        cancel.click(self.jobs.cancel, None, None, **QUIET)
        timer.tick(self.look, None, [state, timer, reports], **QUIET)
        refresh.click(lambda: gr.update(choices=self.jobs.reports()), None, reports, **QUIET)
        reports.change(self.open, reports, report, **QUIET)
        blocks.load(self.look_first, None, [state, timer, reports], **QUIET)

    def start(self, name: str, methods: Sequence[str], keeps: Sequence[str], questions: float) -> tuple[str, Any]:
        try:
            if not methods or not keeps:
                raise Refusal("choose at least one method and one budget")
            budgets = [parse_budget(str(keep).strip()) for keep in keeps]
            self.jobs.start((name or "").strip(), methods, budgets, whole(questions, "the number of questions"))
        except (Refusal, OSError) as error:
            return cards.message(one_line(error)), gr.update()
        return cards.progress(self.jobs.status), gr.Timer(active=True)

    def look(self) -> tuple[str, Any, Any]:
        status = self.jobs.status
        finished = gr.update(choices=self.jobs.reports(), value=status.name) if status.state == "done" else gr.update()
        return cards.progress(status), gr.Timer(active=status.state == "running"), finished

    def look_first(self) -> tuple[str, Any, Any]:
        status = self.jobs.status
        return (
            cards.progress(status),
            gr.Timer(active=status.state == "running"),
            gr.update(choices=self.jobs.reports()),
        )

    def open(self, name: str | None) -> str:
        try:
            return cards.frame(self.jobs.report(name)) if name else ""
        except Refusal as error:
            return cards.message(one_line(error))
