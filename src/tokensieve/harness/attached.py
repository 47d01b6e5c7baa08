"""A method attached for a harness's whole run: errors that end the run, and the tokens before and after."""

from __future__ import annotations

import atexit
import itertools
import json
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, NoReturn

import torch

from tokensieve.budget import parse_budget
from tokensieve.engine import attach
from tokensieve.errors import Refusal, first_line
from tokensieve.evaluate.answer import average_tokens, is_out_of_memory
from tokensieve.loading import find
from tokensieve.methods.spec import expand
from tokensieve.methods.spec_file import DEFAULTS
from tokensieve.version import __version__

OPTIONS = ("method", "keep", "positions", "budget_scope", "separators", "repair")
PROCESSORS = ("processor", "_processor", "_image_processor", "image_processor")


def take_options(arguments: dict[str, Any]) -> dict[str, Any]:
    """Remove the options of :class:`Attachment` from a harness's model arguments, and return them."""
    return {name: arguments.pop(name) for name in OPTIONS if name in arguments}


def model_path(pretrained: Any) -> str:
    """Return the folder or hub name that a harness can load; "reference" is the bundled model.

    Raises:
        Refusal: there is no model of this name.
    """
    return find(str(pretrained)).path


def end_run(line: str, code: int = 2) -> NoReturn:
    """End the process with one line on stderr.

    A harness that catches exceptions would log the error, score an empty answer, and exit with 0. ``SystemExit`` is no
    ``Exception``, so it passes.
    """
    # a harness's progress bar may stand in an unfinished line
    print(f"\ntokensieve: {' '.join(line.split())}", file=sys.stderr, flush=True)
    raise SystemExit(code)


@contextmanager
def loud() -> Iterator[None]:
    """Turn an exception into the end of the run: a user's error in one line (2), a bug with its traceback (1)."""
    try:
        yield
    except Refusal as error:
        end_run(str(error))
    except Exception as error:
        if is_out_of_memory(error):
            end_run(f"memory ran out; use a smaller batch size or a smaller budget ({first_line(error)})")
        traceback.print_exc()
        end_run(f"the run ends, so that no empty answer is scored: {type(error).__name__}: {first_line(error)}", 1)


@dataclass
class Counts:
    """Sums over the questions that one process has answered.

    Attributes:
        questions: the number of questions, with or without images.
        images: the number of their images or videos.
        before, after: visual tokens of these images before any stage, and after the last one.
        average: the same, averaged over the layers of the LLM.
    """

    questions: int = 0
    images: int = 0
    before: int = 0
    after: int = 0
    average: float = 0.0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


class Attachment:
    """A method on a harness's model until the process ends.

    Args:
        model: the Hugging Face model that the harness calls ``generate`` on.
        processor: its processor, for the words that the user wrote.
        method: a spec or the path of a spec file, also in quotes, which lmms-eval leaves around a spec with commas.
        keep: a budget such as 64, 0.25 or "25%", if the spec leaves it open.
        positions, budget_scope, separators, repair: as for :func:`tokensieve.attach`.

    Attributes:
        sieve: the attached method.
        counts: sums over the questions that this process has answered.

    Raises:
        Refusal: as :func:`tokensieve.attach` does.
    """

    _numbers = itertools.count()  # of the attachments of a process; equal in all processes of a run

    def __init__(self, model: Any, processor: Any, *, method: str = "full", keep: Any = None, **options: Any) -> None:
        budget: dict[str, Any] = {} if keep is None else {"keep": parse_budget(str(keep))}
        # a spec file holds options, which the record must show as well
        (spec,), self.options = expand([str(method).strip("\"'")], **DEFAULTS | options)
        self.sieve = attach(model, spec, processor=processor, **self.options, **budget)
        self.counts, self._number = Counts(), next(self._numbers)
        # a reference: VLMEvalKit takes the process group down before the record is read
        self._store, self._rank, self._processes = _processes()
        self._generate: Callable[..., Any] = model.generate
        model.generate = self._counted
        self._publish()

    def _counted(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model's ``generate``, and count the tokens of its images."""
        with loud():
            output = self._generate(*args, **kwargs)
            ids = args[0] if args else kwargs.get("input_ids", self.sieve.last)
            # beams and several answers repeat each prompt; a prompt without images is a question, too
            repeats = max(1, len(self.sieve.last) // max(1, len(ids)))
            self.counts += Counts(questions=len(ids))
            for images, layers in zip(self.sieve.last[::repeats], self.sieve.tokens[::repeats], strict=True):
                self.counts += Counts(
                    images=len(images),
                    before=sum(image.total for image in images),
                    after=sum(image.slots for image in images),
                    average=average_tokens(layers) if layers else 0.0,
                )
        self._publish()
        return output

    def _publish(self) -> None:
        """Write the sums where the first process reads them in the end.

        They go through the key-value store of the process group: no process has to wait for another, and processes may
        call ``generate`` unequally often.
        """
        if self._store is not None:
            self._store.set(self._key(self._rank), json.dumps(vars(self.counts)))

    def _key(self, rank: int) -> str:
        return f"tokensieve/{self._number}/{rank}"

    def record(self) -> dict[str, Any]:
        """Return the facts for the harness's results; call it when all processes have answered.

        ``tokens_before``, ``tokens_after`` and ``tokens_average`` (over the layers of the LLM) are means per image,
        ``None`` without images.
        """
        counts = self.counts
        if self._store is not None:
            published = [self._store.get(self._key(rank)) for rank in range(self._processes)]
            counts = sum((Counts(**json.loads(text)) for text in published), Counts())
        means = {"tokens_before": counts.before, "tokens_after": counts.after, "tokens_average": counts.average}
        return {
            "version": __version__,
            "method": str(self.sieve),
            **self.options,
            "processes": self._processes,
            "questions": counts.questions,
            "images": counts.images,
            **{name: total / counts.images if counts.images else None for name, total in means.items()},
        }


def _processes() -> tuple[Any, int, int]:
    """Return the key-value store of the process group, this process's rank and the number of processes."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None, 0, 1
    atexit.register(_end_gloo)
    store = torch.distributed.distributed_c10d._get_default_store()
    return store, torch.distributed.get_rank(), torch.distributed.get_world_size()


def _end_gloo() -> None:
    """Stop gloo's threads: a process that ends while one runs is aborted, and the whole run with it.

    NCCL has none, and taking it down after an error would wait for the other processes.
    """
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
        torch.distributed.destroy_process_group()


def processor_of(owner: Any) -> Any:
    """Return the processor that a harness's own model holds, under one of the names in use; ``None`` without one."""
    processors = (getattr(owner, name, None) for name in PROCESSORS)
    return next((processor for processor in processors if hasattr(processor, "tokenizer")), None)


def check_arguments(arguments: Mapping[str, Any], known: tuple[str, ...]) -> None:
    """Refuse model arguments that the model does not have; a spec with commas and without quotes gives such."""
    for name in arguments:
        if name not in known:
            raise Refusal(
                f"unknown model argument {name!r}; known: {', '.join(sorted((*known, *OPTIONS)))}. "
                'A method with commas needs quotes: method="fastv(keep=64, layer=2)"'
            )
