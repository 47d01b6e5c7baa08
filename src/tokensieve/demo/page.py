"""The page: its tabs around one model."""

from __future__ import annotations

from collections.abc import Sequence

import gradio as gr

from tokensieve.demo.ask_tab import AskTab
from tokensieve.demo.compare_tab import CompareTab
from tokensieve.demo.examples import Example
from tokensieve.demo.jobs import Jobs
from tokensieve.demo.run import Workbench
from tokensieve.demo.talk_tab import TalkTab

STALE = 3600  # seconds after which uploaded images are deleted


def build_page(
    bench: Workbench, examples: Sequence[Example], jobs: Jobs, methods: Sequence[str], note: str = ""
) -> gr.Blocks:
    """Return the page, to be served.

    Args:
        bench: the model.
        examples: images to choose from.
        jobs: comparisons and reports.
        methods: specs that are chosen at first.
        note: a remark below answers about images that are not among the examples.
    """
    with gr.Blocks(title=f"Tokensieve · {bench.name}", analytics_enabled=False, delete_cache=(STALE, STALE)) as blocks:
        gr.Markdown(f"## Tokensieve\nThe model **{bench.name}** with its visual tokens reduced, beside the full model.")
        with gr.Tabs():
            with gr.Tab("Ask"):
                AskTab(bench, examples, methods, note)
            if bench.model.can_generate():
                with gr.Tab("Talk"):
                    TalkTab(bench, examples, methods)
            with gr.Tab("Compare"):
                CompareTab(jobs, blocks, methods)
    return blocks
