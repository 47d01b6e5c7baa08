"""The layout of the page, and the calls behind its buttons."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from tokensieve.budget import Budget, parse_budget
from tokensieve.demo import cards
from tokensieve.demo.examples import Example
from tokensieve.demo.jobs import Jobs
from tokensieve.demo.run import LONGEST_ANSWER, MOST_ROUNDS, Request, Row, Workbench
from tokensieve.demo.talk import Conversation
from tokensieve.errors import Refusal
from tokensieve.evaluate.pictures import Picture
from tokensieve.images import decode_image
from tokensieve.methods import list_methods, parse

THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
KEEPS = ["50%", "33%", "25%", "11%", "5%"]
COUNT, SHARE = "a number of tokens", "a share"
REUSE = [("the tokens of the first question (its KV cache)", "cache"), ("image and history encoded anew", "history")]
QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
MODEL: dict[str, Any] = {**QUIET, "concurrency_id": "model", "concurrency_limit": 2}
"""Two visitors take turns by the workbench's lock; more wait in Gradio's queue."""


@dataclass(frozen=True)
class Defaults:
    """Values that the page starts with."""

    methods: tuple[str, ...]
    share: int = 25  # per cent
    count: int = 36
    note: str = ""  # a remark below every answer


class Page:
    """The page of one workbench.

    Attributes:
        blocks: Gradio's object, to be served.
    """

    def __init__(self, bench: Workbench, examples: Sequence[Example], jobs: Jobs, defaults: Defaults) -> None:
        self.bench, self.examples, self.jobs, self.defaults = bench, examples, jobs, defaults
        names = [info.name for info in list_methods() if info.name != "full"]
        self.methods = list(dict.fromkeys([*defaults.methods, *names]))
        title = f"Tokensieve · {bench.name}"
        with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(3600, 3600)) as self.blocks:
            gr.Markdown(
                f"## Tokensieve\nThe model **{bench.name}** with its visual tokens reduced, beside the full model."
            )
            with gr.Tabs():
                with gr.Tab("Ask"):
                    self._question_tab()
                if bench.model.can_generate():
                    with gr.Tab("Talk"):
                        self._conversation_tab()
                with gr.Tab("Compare"):
                    self._comparison_tab()

    # -- one question -------------------------------------------------------------------------------------------------

    def _question_tab(self) -> None:
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                picture, question, example = self._image_and_question()
                with gr.Row():
                    run = gr.Button("Ask", variant="primary", elem_id="ask")
                    stop = gr.Button("Stop", elem_id="stop")
                methods = gr.Dropdown(
                    self.methods,
                    value=list(self.defaults.methods),
                    multiselect=True,
                    allow_custom_value=True,
                    label="Methods",
                    info="Choose some, or type a spec such as vtc-cls(first_layer=-2)",
                )
                budget = self._budget()
                positions = positions_choice()
                with gr.Accordion("More", open=False):
                    rounds = gr.Slider(0, MOST_ROUNDS, 10, step=1, label="Timed rounds", info="0 measures no cost")
                    longest = gr.Slider(1, LONGEST_ANSWER, 32, step=1, label="Longest answer in tokens")
            with gr.Column(scale=5, min_width=300):
                result = gr.HTML(f"<p>{cards.HINT}</p>", elem_id="result", padding=False)
        inputs = [picture, question, example, methods, *budget, positions, rounds, longest]
        asked = run.click(self._ask, inputs, result, **MODEL)
        submitted = question.submit(self._ask, inputs, result, **MODEL)
        stop.click(None, cancels=[asked, submitted], api_visibility="private")

    def _ask(
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
            picture, right = self._picture(file, question, example)
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
            total, rows = len(request.entries), list[Row]()
            yield cards.cards(rows, total)
            for row in self.bench.rows(request):
                rows.append(row)
                yield cards.cards(rows, total, measuring=request.rounds > 0)
            if request.rounds:
                rows = self.bench.costs(request, rows)
            yield cards.cards(rows, total, note=self.defaults.note if example is None else "")
        except (Refusal, OSError) as error:
            yield cards.message(one_line(error))

    def _image_and_question(self) -> tuple[Any, Any, Any]:
        """Lay out the image, the examples and the question; return (image, question, example's number)."""
        first = self.examples[0] if self.examples else None
        start = first.samples[0] if first else None
        example = gr.State(0 if first else None)
        picture = gr.Image(
            start.open() if start else None,
            type="filepath",
            sources=["upload", "clipboard"],
            label="Image",
            height=250,
            buttons=[],
            format="png",
        )
        # Gradio's own would decode the file, and answer a damaged one with a traceback
        picture.preprocess = lambda payload: None if payload is None else payload.path
        if self.examples:
            gallery = gr.Gallery(
                [enlarged(entry.samples[0].open()) for entry in self.examples],
                label="Examples",
                show_label=False,
                columns=4,
                height="auto",
                allow_preview=False,
                object_fit="cover",
                format="png",
                buttons=[],
                interactive=False,
                elem_classes="examples",
            )
        question = gr.Textbox(start.question if start else "", label="Question", lines=1, max_lines=4)
        if first is not None:
            asked = gr.Dropdown([sample.question for sample in first.samples], label="Questions on this example")
            gallery.select(self._choose, None, [example, picture, question, asked], **QUIET)
            asked.input(lambda text: text, asked, question, **QUIET)
            picture.input(lambda: (None, gr.update(choices=[], value=None)), None, [example, asked], **QUIET)
        return picture, question, example

    def _choose(self, event: gr.SelectData) -> tuple[int, Image.Image, str, Any]:
        chosen = self.examples[int(event.index)]
        questions = [sample.question for sample in chosen.samples]
        return (
            int(event.index),
            chosen.samples[0].open(),
            questions[0],
            gr.update(choices=questions, value=questions[0]),
        )

    def _picture(self, file: str | None, question: str, example: int | None) -> tuple[Picture | None, tuple[str, ...]]:
        """Return the image, and the right answers if the question is one of the example's.

        The example's pixels are taken from the data: the browser's copy may be compressed.
        """
        if example is not None and 0 <= example < len(self.examples):
            chosen = self.examples[example]
            right = [sample.answers for sample in chosen.samples if sample.question == (question or "").strip()]
            return chosen.picture, next(iter(right), ())
        if file is None:
            return None, ()
        return partial(open_upload, file), ()

    def _budget(self) -> tuple[Any, Any, Any]:
        """Lay out the budget; return (share or count, per cent, tokens)."""
        kind = gr.Radio([SHARE, COUNT], value=SHARE, label="Budget of each image")
        share = gr.Slider(1, 100, self.defaults.share, step=1, label="Share in %", elem_id="share")
        count = gr.Number(self.defaults.count, label="Tokens", visible=False, elem_id="count")

        def show(choice: str) -> tuple[Any, Any]:
            return gr.update(visible=choice == SHARE), gr.update(visible=choice == COUNT)

        kind.change(show, kind, [share, count], **QUIET)
        return kind, share, count

    # -- a conversation -----------------------------------------------------------------------------------------------

    def _conversation_tab(self) -> None:
        talk = gr.State(None, time_to_live=1800)  # holds two KV caches
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                picture, question, example = self._image_and_question()
                with gr.Row():
                    run = gr.Button("Ask", variant="primary", elem_id="talk")
                    new = gr.Button("New conversation", elem_id="new")
                method = gr.Dropdown(
                    self.methods, value=first_reader(self.defaults.methods), allow_custom_value=True, label="Method"
                )
                budget = self._budget()
                positions = positions_choice()
                reuse = gr.Radio(REUSE, value="cache", label="Later questions are answered from")
            with gr.Column(scale=5, min_width=300):
                result = gr.HTML(
                    "<p>Ask a question, then another one about the same image.</p>",
                    elem_id="conversation",
                    padding=False,
                )
        begin = [picture, example, method, *budget, positions, reuse]
        for trigger in (run.click, question.submit):
            trigger(self._talk, [talk, question, *begin], [talk, result], **MODEL)
        new.click(lambda: (None, ""), None, [talk, result], **QUIET)
        # another image or method begins another conversation
        for component in (example, picture, method, *budget, positions, reuse):
            component.change(lambda: (None, ""), None, [talk, result], **QUIET)

    def _talk(
        self,
        talk: Conversation | None,
        question: str,
        file: str | None,
        example: int | None,
        method: str,
        kind: str,
        share: float,
        count: float,
        positions: Any,
        reuse: Any,
    ) -> tuple[Conversation | None, str]:
        try:
            if talk is None:
                picture, _ = self._picture(file, question, example)
                keep = budget_of(kind, share, count)
                talk = Conversation(self.bench, picture, method or "", keep, positions, reuse)
            talk.ask(question or "")
            return talk, cards.conversation(talk)
        except (Refusal, OSError) as error:
            shown = cards.conversation(talk) if talk is not None and talk.full.turns else ""
            return talk, cards.message(one_line(error)) + shown

    # -- comparisons --------------------------------------------------------------------------------------------------

    def _comparison_tab(self) -> None:
        with gr.Row():
            name = gr.Textbox(
                "demo", label="Name", info="folder of the results; the same name continues", min_width=150
            )
            methods = gr.Dropdown(
                self.methods,
                value=list(self.defaults.methods),
                multiselect=True,
                allow_custom_value=True,
                label="Methods",
                scale=3,
                min_width=220,
            )
            keeps = gr.Dropdown(
                KEEPS, value=["25%", "11%"], multiselect=True, allow_custom_value=True, label="Budgets", min_width=160
            )
            questions = gr.Number(100, label="Questions", min_width=120)
        with gr.Row():
            start = gr.Button("Compare", variant="primary", elem_id="compare")
            cancel = gr.Button("Cancel", elem_id="cancel")
        state = gr.HTML(elem_id="state", padding=False)
        timer = gr.Timer(1.0, active=False)
        with gr.Row():
            reports = gr.Dropdown(self.jobs.reports(), value=None, label="Open a report", scale=4)
            refresh = gr.Button("Refresh", scale=1, min_width=100)
        report = gr.HTML(elem_id="report", padding=False)
        start.click(self._start, [name, methods, keeps, questions], [state, timer], **QUIET)
        cancel.click(self.jobs.cancel, None, None, **QUIET)
        timer.tick(self._tick, None, [state, timer, reports], **QUIET)
        refresh.click(lambda: gr.update(choices=self.jobs.reports()), None, reports, **QUIET)
        reports.change(self._open, reports, report, **QUIET)
        self.blocks.load(self._load, None, [state, timer, reports], **QUIET)

    def _start(self, name: str, methods: Sequence[str], keeps: Sequence[str], questions: float) -> tuple[str, Any]:
        try:
            if not methods or not keeps:
                raise Refusal("choose at least one method and one budget")
            budgets = [parse_budget(str(keep).strip()) for keep in keeps]
            self.jobs.start((name or "").strip(), methods, budgets, whole(questions, "the number of questions"))
        except (Refusal, OSError) as error:
            return cards.message(one_line(error)), gr.update()
        return cards.progress(self.jobs.status), gr.Timer(active=True)

    def _tick(self) -> tuple[str, Any, Any]:
        status = self.jobs.status
        finished = gr.update(choices=self.jobs.reports(), value=status.name) if status.state == "done" else gr.update()
        return cards.progress(status), gr.Timer(active=status.state == "running"), finished

    def _load(self) -> tuple[str, Any, Any]:
        status = self.jobs.status
        return (
            cards.progress(status),
            gr.Timer(active=status.state == "running"),
            gr.update(choices=self.jobs.reports()),
        )

    def _open(self, name: str | None) -> str:
        try:
            return cards.frame(self.jobs.report(name)) if name else ""
        except Refusal as error:
            return cards.message(one_line(error))


def first_reader(specs: Sequence[str]) -> str:
    """Return the first spec that reads the user's words, which shows most in a conversation; else the first one."""
    readers = (spec for spec in specs if any(stage.needs.requests("user_text") for stage in parse(spec)))
    return next(readers, specs[0])


def positions_choice() -> Any:
    """Lay out the choice of positions."""
    return gr.Radio(
        ["original", "contiguous"],
        value="original",
        label="Positions",
        info="whether kept tokens keep their position ids, or are renumbered",
    )


def budget_of(kind: str, share: float, count: float) -> Budget:
    """Return the budget that is filled in; refuse one that is none."""
    if kind == COUNT:
        return whole(count, "the number of tokens to keep")
    return parse_budget(f"{share}%")


def whole(value: float | None, name: str) -> int:
    """Return a number of the page as an int; refuse an empty field and a fraction."""
    if value is None or value != int(value):
        raise Refusal(f"{name} must be a whole number; got {'nothing' if value is None else value}")
    return int(value)


def open_upload(file: str) -> Image.Image:
    """Return an uploaded image; its errors name no folder of the machine."""
    path = Path(file)
    return decode_image(path.read_bytes(), path.name)


def enlarged(image: Image.Image) -> Image.Image:
    """Return a thumbnail; small scenes are enlarged, so that the browser does not blur them."""
    side = 240
    if max(image.size) >= side:
        small = image.copy()
        small.thumbnail((side, side))
        return small
    factor = side // max(image.size)
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def one_line(error: Exception) -> str:
    """Return an error in one line."""
    return " ".join(str(error).split())
