"""Answers of vLLM with a method from the plug-in ``tokensieve.vllm``, chosen per request."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from tokensieve.batch.job import Job, Outcome
from tokensieve.errors import DataError, MissingExtra, Refusal
from tokensieve.evaluate.answer import is_out_of_memory
from tokensieve.evaluate.data import Sample
from tokensieve.evaluate.journal import Answer
from tokensieve.evaluate.plan import Run
from tokensieve.evaluate.rows import FULL
from tokensieve.vllm import checkpoint, engine_options, renders_begin_of_text

UNKNOWN = -1  # visual tokens before the method, where no run keeps all of them


def available() -> bool:
    """Return whether vLLM is installed here."""
    return find_spec("vllm") is not None


def check(job: Job) -> None:
    """Refuse a job that vLLM cannot run: load options, a budget scope, or methods it cannot serve.

    Raises:
        MissingExtra: vLLM is not installed.
    """
    if not available():
        raise MissingExtra("--engine vllm needs vLLM", "vllm")
    given = sorted(job.loading.to_json().keys() - {"dtype", "revision", "trust_remote_code"})
    if given:
        raise Refusal(
            f"vLLM takes dtype, revision and trust_remote_code; got {', '.join(given)}: --engine transformers"
        )
    if job.settings.budget_scope != "image":
        raise Refusal(f"vLLM takes budgets per image; got {job.settings.budget_scope!r}: --engine transformers")
    if job.settings.repair is not None:
        raise Refusal(f"vLLM's attention takes no bias; got --repair {job.settings.repair}: --engine transformers")
    engine_arguments(job)


def engine_arguments(job: Job) -> dict[str, Any]:
    """Return the arguments of ``vllm.LLM`` for a job.

    Raises:
        Refusal: the family, a method or a budget cannot be served.
    """
    specs = [_spec(run) for run in job.runs()]
    folder = checkpoint(job.model)
    options = engine_options(folder, specs[0], allowed=specs[1:], positions=job.settings.positions)
    return {"model": folder, **options, **job.loading.to_json()}


class VllmModel:
    """vLLM's engine for a job.

    Attributes:
        environment: versions.
    """

    def __init__(self, job: Job) -> None:
        from vllm import LLM, SamplingParams

        check(job)
        self.settings, self.runs = job.settings, job.runs()
        arguments = engine_arguments(job)
        self.engine = LLM(**arguments)
        self.begin_of_text = not renders_begin_of_text(arguments["model"])
        self.sampling = SamplingParams(temperature=0.0, max_tokens=job.settings.max_new_tokens)
        config = self.engine.llm_engine.model_config.hf_config
        self.placeholder = getattr(config, "image_token_id", getattr(config, "image_token_index", None))
        self.environment: Mapping[str, Any] = {"engine": "vllm", "vllm": import_module("vllm").__version__}

    def answer(self, samples: Sequence[Sample]) -> Iterator[tuple[str, str, Outcome]]:
        """Yield (run key, sample id, outcome). Each image is opened once for all runs."""
        images: dict[str, list[Any]] = {}
        readable = []
        for sample in samples:
            try:
                images[sample.id] = sample.open_all()
                readable.append(sample)
            except DataError as error:
                reason = str(error).removeprefix(sample.error_prefix)
                yield from ((run.key, sample.id, reason) for run in self.runs)
        before: dict[str, int] = {}
        for run in sorted(self.runs, key=lambda run: run.key != FULL):
            for sample, outcome in zip(readable, self._outcomes(run, readable, images), strict=True):
                if isinstance(outcome, str):
                    yield run.key, sample.id, outcome
                    continue
                text, tokens = outcome
                if run.key == FULL:
                    before[sample.id] = tokens
                total = before.get(sample.id, UNKNOWN)
                yield run.key, sample.id, Answer(sample.id, text, total, tokens, float(tokens))

    def _outcomes(
        self, run: Run, samples: Sequence[Sample], images: Mapping[str, list[Any]]
    ) -> list[tuple[str, int] | str]:
        """Return (answer, visual tokens) or an error for each sample; requests are sent one by one if a batch fails."""
        if not samples:
            return []
        try:
            messages = [self._messages(sample, images[sample.id]) for sample in samples]
            outputs = self.engine.chat(
                messages,
                self.sampling,
                use_tqdm=False,
                tokenization_kwargs={"add_special_tokens": self.begin_of_text},
                mm_processor_kwargs={"tokensieve_method": _spec(run)},
            )
        except ValueError as error:  # a prompt that is too long, an image that the processor refuses, earlier turns
            if is_out_of_memory(error):
                raise
            if len(samples) == 1:
                return [" ".join(str(error).split())]
            return [outcome for sample in samples for outcome in self._outcomes(run, [sample], images)]
        return [(o.outputs[0].text.strip(), list(o.prompt_token_ids).count(self.placeholder)) for o in outputs]

    def _messages(self, sample: Sample, images: Sequence[Any]) -> list[dict[str, Any]]:
        if sample.turns:  # vLLM would decide on the whole conversation, not on its first turn
            raise Refusal(f"earlier turns need --engine transformers; got {len(sample.turns)}")
        text = self.settings.prompt.replace("{question}", sample.text)
        pictures = [{"type": "image_pil", "image_pil": image} for image in images]
        return [{"role": "user", "content": [*pictures, {"type": "text", "text": text}]}]


def _spec(run: Run) -> str:
    """Return the spec of a run's method, with its budget."""
    if run.key == FULL:
        return FULL
    if len(run.stages) > 1:
        raise Refusal(f"vLLM runs one method at a time; got {run.key}: --engine transformers")
    return str(run.stages[0])
