"""Compute what the page shows about one question: answers, kept tokens and costs of several methods."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from PIL import Image

from tokensieve.budget import Budget
from tokensieve.engine import attach
from tokensieve.errors import DataError, Refusal, first_line
from tokensieve.evaluate import METRICS, Sample
from tokensieve.evaluate.answer import Answerer, answerer_class, average_tokens, is_out_of_memory, together
from tokensieve.evaluate.data import check_text
from tokensieve.evaluate.pictures import Picture
from tokensieve.evaluate.plan import Entry, Settings
from tokensieve.evaluate.prompt import Inputs
from tokensieve.evaluate.rows import FULL, label
from tokensieve.measure import Cost, measure_costs
from tokensieve.methods import Positions
from tokensieve.methods.spec_file import is_spec_file
from tokensieve.reduction import Reduction
from tokensieve.report.overlay import as_seen, overlay

SIDE = 384  # px of a picture
MOST_METHODS = 12
LONGEST_QUESTION = 2000  # characters
LONGEST_ANSWER = 512  # tokens
MOST_ROUNDS = 50


@dataclass(frozen=True)
class Request:
    """A question and the methods that answer it, as filled in on the page.

    Attributes:
        picture: the image; a file or a function that returns it.
        methods: specs. A spec that gives its own ``keep`` ignores the budget.
        keep: budget of the other specs.
        right_answers: where they are known.
        rounds: timed rounds; 0 measures nothing.

    Raises:
        Refusal: an empty or too long question, no method or too many, or a number out of its range.
    """

    picture: Picture | None
    question: str
    methods: Sequence[str]
    keep: Budget
    positions: Positions = "original"
    right_answers: tuple[str, ...] = ()
    rounds: int = 10
    max_new_tokens: int = 32

    def __post_init__(self) -> None:
        if self.picture is None:
            raise Refusal("there is no image; upload one, or choose an example")
        check_question(self.question)
        if not 1 <= len(self.methods) <= MOST_METHODS:
            raise Refusal(f"choose from 1 to {MOST_METHODS} methods; got {len(self.methods)}")
        check_number("timed rounds", self.rounds, 0, MOST_ROUNDS)
        check_number("the longest answer", self.max_new_tokens, 1, LONGEST_ANSWER)

    @cached_property
    def sample(self) -> Sample:
        """The question, with its image decoded."""
        assert self.picture is not None
        image = Sample("", self.picture, self.question, ()).open()
        return Sample("demo", lambda: image, self.question.strip(), self.right_answers)


@dataclass(frozen=True)
class Row:
    """One method's answer to the question.

    Attributes:
        name: spec and budget, or "full" for the unreduced model.
        answer: the model's text; "" where the method was refused.
        right: whether the answer is right, where the right one is known.
        decision: the tokens that were kept, dropped and merged, over all stages.
        tokens_average: visual tokens, averaged over the LLM's layers.
        picture: the decision drawn on the model's view of the image; the plain image where tokens form no grid.
        refusal: why this method could not answer.
        cost: measurements; ``None`` until they are taken.
    """

    name: str
    answer: str = ""
    right: bool | None = None
    decision: Reduction | None = None
    tokens_average: float | None = None
    picture: Image.Image | None = None
    refusal: str = ""
    cost: Cost | None = field(default=None, repr=False)

    @property
    def groups(self) -> tuple[int, int]:
        """Return (groups, tokens in them): the slots that more than one token was merged into."""
        if self.decision is None or self.decision.mixing is None:
            return 0, 0
        counts = self.decision.counts
        return int((counts > 1).sum()), int(counts[counts > 1].sum())


class Workbench:
    """One model that several visitors of the page share.

    Args:
        name: the value of MODEL on the command line.
        model: it has nothing attached, and is in eval mode on its device.
        processor: its processor.
        methods: specs that were named when the page was started; no other method may come from a file.

    Attributes:
        lock: held while the model runs or has a method attached, so that visitors do not mix.
    """

    def __init__(self, name: str, model: Any, processor: Any, methods: Sequence[str] = ()) -> None:
        self.name, self.model, self.processor = name, model, processor
        self.lock = threading.Lock()
        self._files = {file_of(spec) for spec in methods}

    def plan(self, methods: Sequence[str], keeps: Sequence[Budget]) -> list[Entry]:
        """Return the rows of some methods, the unreduced model first.

        Raises:
            Refusal: a bad spec or budget, or a method of a file that was not named when the page was started: a visitor
                must not run code of this machine.
        """
        for spec in methods:
            if file_of(spec) not in self._files | {None}:
                raise Refusal(
                    f"the page takes no method from a file unless `tokensieve demo --methods` names it: {spec}"
                )
        return Settings(seeds=1).plan(list(methods), list(keeps))

    def rows(self, request: Request) -> Iterator[Row]:
        """Answer with each method in turn, the unreduced model first.

        A method that this model or this question cannot have becomes a row with its ``refusal``.

        Raises:
            Refusal: a spec or budget, an image that cannot be read, or memory that ran out.
        """
        entries, sample = self.plan(request.methods, [request.keep]), request.sample
        answerer = self._answerer(request)
        inputs = self._inputs(answerer, sample)
        for entry in entries:
            name = label(entry.method, entry.keep)
            try:
                yield self._row(name, entry, request, answerer, inputs)
            except Refusal as error:
                if entry.method == FULL:
                    raise
                yield Row(name, refusal=str(error))

    def costs(self, request: Request, rows: Sequence[Row]) -> list[Row]:
        """Measure all rows that have an answer in the same rounds; return the rows with their costs."""
        entries = self.plan(request.methods, [request.keep])
        answered = [entry for entry, row in zip(entries, rows, strict=True) if not row.refusal]
        inputs = self._inputs(self._answerer(request), request.sample)
        with self.lock, memory_errors():
            costs = measure_costs(
                self.model,
                inputs,
                [entry.runs[0].stages for entry in answered if entry.method != FULL],
                processor=self.processor,
                positions=request.positions,
                repeats=request.rounds,
                warmup=min(2, request.rounds),
            )
        left_over = iter(costs)
        return [row if row.refusal else replace(row, cost=next(left_over)) for row in rows]

    def _answerer(self, request: Request) -> Answerer:
        settings = Settings(max_new_tokens=request.max_new_tokens)
        return answerer_class(self.model)(self.model, self.processor, [request.sample], settings, {})

    def _inputs(self, answerer: Answerer, sample: Sample) -> dict[str, torch.Tensor]:
        try:
            return answerer.inputs([sample])
        except Refusal:
            raise
        except Exception as error:  # processors raise many types at images of a shape that they do not expect
            raise DataError(f"the processor refuses the image ({first_line(error)})") from error

    def _row(
        self, name: str, entry: Entry, request: Request, answerer: Answerer, inputs: dict[str, torch.Tensor]
    ) -> Row:
        stages = list(entry.runs[0].stages)
        options: dict[str, Any] = {"processor": self.processor, "positions": request.positions}
        with self.lock, memory_errors(), attach(self.model, stages, **options) as sieve:
            with torch.inference_mode():
                (answer,) = answerer.texts(Inputs(inputs, None))
            decision, per_layer = together(sieve.last[0]).to("cpu"), sieve.tokens[0]
        right = METRICS["exact"](answer, request.right_answers) > 0 if request.right_answers else None
        picture = draw(request.sample.open(), decision, self.processor)
        return Row(name, answer.strip(), right, decision, average_tokens(per_layer), picture)


def file_of(spec: str) -> str | None:
    """Return the file that a spec takes its method from, with what stands before it; ``None`` for a known method."""
    # a spec file may name a method of a file
    return spec.strip() if is_spec_file(spec) else spec.rpartition(".py:")[0] or None


def draw(image: Image.Image, decision: Reduction, processor: Any) -> Image.Image:
    """Return the decision on the model's view of an image; the plain view where the tokens form no grid."""
    view = as_seen(image, processor)
    if decision.grid is None and not decision.whole:
        plain = view.copy()
        plain.thumbnail((SIDE, SIDE))
        return plain
    return overlay(view, decision, SIDE)


def check_question(text: str) -> None:
    """Refuse an empty or too long question, and text that no tokenizer accepts."""
    if not text.strip():
        raise Refusal("the question is empty; ask something about the image")
    if len(text) > LONGEST_QUESTION:
        raise Refusal(f"the question has {len(text):,} characters; the limit is {LONGEST_QUESTION:,}")
    check_text(text, "the question")


def check_number(name: str, value: int, least: int, most: int) -> None:
    """Refuse a number outside of its range."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise Refusal(f"{name} must be a whole number from {least} to {most}; got {value!r}")


@contextmanager
def memory_errors() -> Iterator[None]:
    """Turn memory that ran out into one line."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise Refusal(f"the question does not fit into memory ({first_line(error)})") from error
