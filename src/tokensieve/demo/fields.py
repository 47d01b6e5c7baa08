"""Fields that several tabs of the page have, and the reading of their values."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from tokensieve.budget import Budget, parse_budget
from tokensieve.demo.examples import Example
from tokensieve.errors import Refusal
from tokensieve.evaluate.pictures import Picture
from tokensieve.evaluate.rows import FULL
from tokensieve.images import decode_image
from tokensieve.methods import list_methods

COUNT, SHARE = "a number of tokens", "a share"
DEFAULT_SHARE, DEFAULT_COUNT = 25, 36  # per cent, tokens
# on a phone the answers stand below the settings
SHOW = "() => {{ if (innerWidth < 800) document.getElementById('{}').scrollIntoView({{ behavior: 'smooth' }}) }}"
QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
MODEL: dict[str, Any] = {**QUIET, "concurrency_id": "model", "concurrency_limit": 2}
"""Two visitors take turns by the workbench's lock; more wait in Gradio's queue."""


class QuestionFields:
    """An image, uploaded or chosen among examples, and a question about it.

    Attributes:
        inputs: the components, for the arguments of :meth:`read`.
        question: the text of the question.
    """

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples
        first = self.examples[0] if self.examples else None
        start = first.samples[0] if first else None
        example = gr.State(0 if first else None)
        picture = gr.Image(
            enlarged(start.open()) if start else None,
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
        self.question = question = gr.Textbox(start.question if start else "", label="Question", lines=1, max_lines=4)
        if first is not None:
            known_questions = gr.Dropdown(
                [sample.question for sample in first.samples], label="Questions on this example"
            )
            gallery.select(self._choose, None, [example, picture, question, known_questions], **QUIET)
            known_questions.input(lambda text: text, known_questions, question, **QUIET)
            picture.input(lambda: (None, gr.update(choices=[], value=None)), None, [example, known_questions], **QUIET)
        self.inputs = [picture, question, example]

    def _choose(self, event: gr.SelectData) -> tuple[int, Image.Image, str, Any]:
        chosen = self.examples[int(event.index)]
        questions = [sample.question for sample in chosen.samples]
        picture = enlarged(chosen.samples[0].open())
        return int(event.index), picture, questions[0], gr.update(choices=questions, value=questions[0])

    def read(self, file: str | None, question: str, example: int | None) -> tuple[Picture | None, tuple[str, ...]]:
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


def budget_fields() -> list[Any]:
    """Lay out a budget; return the components for the arguments of :func:`budget_of`."""
    kind = gr.Radio([SHARE, COUNT], value=SHARE, label="Budget of each image")
    share = gr.Slider(1, 100, DEFAULT_SHARE, step=1, label="Share in %", elem_id="share")
    count = gr.Number(DEFAULT_COUNT, label="Tokens", visible=False, elem_id="count")

    def show(choice: str) -> tuple[Any, Any]:
        return gr.update(visible=choice == SHARE), gr.update(visible=choice == COUNT)

    kind.change(show, kind, [share, count], **QUIET)
    return [kind, share, count]


def all_methods(first: Sequence[str]) -> list[str]:
    """Return the given specs, and then the names of all other methods."""
    return list(dict.fromkeys([*first, *(info.name for info in list_methods() if info.name != FULL)]))


def methods_choice(first: Sequence[str], **options: Any) -> Any:
    """Lay out a choice of several methods; a spec can be typed, too."""
    return gr.Dropdown(
        all_methods(first),
        value=list(first),
        multiselect=True,
        allow_custom_value=True,
        label="Methods",
        info="Choose some, or type a spec such as vtc-cls(first_layer=-2)",
        **options,
    )


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
    if value is None or not float(value).is_integer():
        raise Refusal(f"{name} must be a whole number; got {'nothing' if value is None else value}")
    return int(value)


def open_upload(file: str) -> Image.Image:
    """Return an uploaded image; its errors name no folder of the machine."""
    path = Path(file)
    return decode_image(path.read_bytes(), path.name)


def enlarged(image: Image.Image) -> Image.Image:
    """Return an image to look at; a small scene is enlarged, so that the browser does not blur it."""
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
