"""The model "tokensieve" of lmms-eval, found through an entry point.

Without ``base`` it loads and asks any supported model itself. With ``base=llava_hf`` or another model of lmms-eval, the
prompts and the generation are those of that model, and the method is attached to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import wraps
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.loggers import EvaluationTracker
from lmms_eval.models import get_model
from lmms_eval.protocol import ChatMessages
from lmms_eval.utils import Collator, simple_parse_args_string
from tqdm import tqdm

from tokensieve.errors import Refusal
from tokensieve.harness.attached import (
    Attachment,
    check_arguments,
    end_run,
    loud,
    model_path,
    processor_of,
    take_options,
)
from tokensieve.loading import LoadOptions, load_model, to_model

LOADING = tuple(field.name for field in fields(LoadOptions))
SAVE_RESULTS = EvaluationTracker.save_results_aggregated


class Tokensieve(lmms):  # type: ignore[misc]
    """A vision-language model with a method attached, asked through its own chat template.

    Args:
        pretrained: folder or hub name; "reference" is the bundled model.
        batch_size: questions per forward.
        arguments: the options of :class:`~tokensieve.harness.attached.Attachment` and of
            :class:`~tokensieve.loading.LoadOptions`; ``attn_implementation`` is ``attn``.
    """

    is_simple = False

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> Any:
        """Return the model for ``--model_args``, or lmms-eval's own model named by ``base``."""
        with loud():
            given = {name: value for name, value in (additional_config or {}).items() if value is not None}
            arguments = simple_parse_args_string(arg_string) | given
            if "pretrained" not in arguments:
                raise Refusal("--model_args needs pretrained=FOLDER_OR_NAME; pretrained=reference is the bundled model")
            base = arguments.pop("base", None)
            model = cls(**arguments) if base is None else with_method(base, arguments)
            write_record(model.attachment)
            return model

    def __init__(
        self, pretrained: str, batch_size: int | str = 1, max_batch_size: Any = None, **arguments: Any
    ) -> None:
        super().__init__()
        options = take_options(arguments)
        if "attn_implementation" in arguments:
            arguments["attn"] = arguments.pop("attn_implementation")
        check_arguments(arguments, LOADING)
        if not str(batch_size).isdecimal():
            raise Refusal(f"batch_size must be a number; got {batch_size!r}")
        # of several processes, each has selected its GPU here, so that "cuda" and "auto" name it
        self.accelerator = Accelerator(cpu=arguments.get("device") == "cpu")
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.model, self.processor = load_model(str(pretrained), LoadOptions(**arguments))
        self.device, self.batch_size = self.model.device, int(batch_size)
        self.attachment = Attachment(self.model, self.processor, **options)

    def generate_until(self, requests: list[Any]) -> list[Any]:
        """Return the answers to the requests, in their order."""
        with loud():
            return without_padding(self._generate_until)(requests)

    def _generate_until(self, requests: list[Any]) -> list[Any]:
        # one batch has equal generation settings (argument 2) and texts of similar length
        collator = Collator([r.args for r in requests], lambda x: (len(x[0]), x[3]), lambda x: x[2], grouping=True)
        results: list[Any] = []
        bar = tqdm(total=len(requests), disable=self.rank != 0, desc=f"tokensieve: {self.attachment.sieve}")
        for chunk in collator.get_batched(n=self.batch_size):
            results += self._answer(chunk)
            bar.update(len(chunk))
        bar.close()
        ordered: list[Any] = collator.get_original(results)
        return ordered

    def _answer(self, chunk: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Return the answers to one batch of requests with equal generation settings."""
        turns = [
            ChatMessages(messages=to_messages(self.task_dict[task][split][number])).to_hf_messages()
            for _, to_messages, _, number, task, split in chunk
        ]
        padding = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
        template = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
        inputs = dict(self.processor.apply_chat_template(turns, **template, processor_kwargs=padding))
        settings = dict(chunk[0][2])
        until = settings.pop("until", None) or []
        with torch.inference_mode():
            output = self.model.generate(**to_model(self.model, inputs), **generation_settings(settings))
        output = output[:, inputs["input_ids"].shape[1] :]
        answers = []
        for text, ids in zip(self.processor.batch_decode(output, skip_special_tokens=True), output, strict=True):
            for stop in [until] if isinstance(until, str) else until:
                text = text.split(stop)[0] if stop else text
            answers.append(GenerationResult(text=text.strip(), token_counts=TokenCounts(output_tokens=len(ids))))
        return answers

    def loglikelihood(self, requests: list[Any]) -> list[Any]:
        """Refuse: a method acts on prompts with images, whose log-likelihoods lmms-eval's models seldom support."""
        end_run("--model tokensieve answers tasks of type generate_until only; this task needs log-likelihoods")

    def generate_until_multi_round(self, requests: list[Any]) -> list[Any]:
        """Refuse conversations of several rounds."""
        end_run("--model tokensieve answers tasks of type generate_until only; base=... may support several rounds")


def with_method(base: str, arguments: dict[str, Any]) -> Any:
    """Return lmms-eval's own model with a method attached to its Hugging Face model.

    Raises:
        Refusal: the model holds no Hugging Face model, or :func:`tokensieve.attach` refuses it.
    """
    options = take_options(arguments)
    try:
        kind = get_model(base)
    except ValueError as error:
        raise Refusal(f"base={base} is no model of lmms-eval; `lmms-eval models` lists them") from error
    model = kind(**arguments | {"pretrained": model_path(arguments["pretrained"])})
    target = getattr(model, "model", None)
    if not isinstance(target, torch.nn.Module):
        raise Refusal(f"base={base} holds no Hugging Face model in .model, so no method can be attached to it")
    model.attachment = Attachment(target, processor_of(model), **options)
    model.generate_until = _checked(base, model.attachment, model.generate_until)
    return model


def _checked(base: str, attachment: Attachment, inner: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``generate_until`` of a model that may catch exceptions and return an empty answer in their place."""

    def generate_until(requests: list[Any]) -> list[Any]:
        answered = attachment.counts.questions
        with loud():
            results: list[Any] = without_padding(inner)(requests)
        empty = sum(not getattr(result, "text", result) for result in results)
        missing = sum(not is_padding(request) for request in requests) - (attachment.counts.questions - answered)
        if empty and missing > 0:
            end_run(
                f"{missing} questions never reached the model, and {base} returned empty answers; see its log above"
            )
        return results

    return generate_until


def is_padding(request: Any) -> bool:
    """Return whether lmms-eval asks a question again, in a process with fewer questions than the others."""
    return bool((request.metadata or {}).get("__padding_only__"))


def without_padding(answer: Callable[[list[Any]], list[Any]]) -> Callable[[list[Any]], list[Any]]:
    """Answer each question once: no process waits for another here, and padding would be counted in the record."""

    def answered(requests: list[Any]) -> list[Any]:
        results = iter(answer([request for request in requests if not is_padding(request)]))
        return ["" if is_padding(request) else next(results) for request in requests]

    return answered


def generation_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Return a task's generation settings as transformers takes them: sampling settings only where it samples."""
    temperature = float(settings.pop("temperature", 0) or 0)
    sampled = bool(settings.pop("do_sample", temperature > 0)) and temperature > 0
    top_p, beams = settings.pop("top_p", None), settings.pop("num_beams", 1)
    sampling = {"temperature": temperature, "top_p": top_p} if sampled else {"temperature": None, "top_p": None}
    longest = settings.pop("max_new_tokens", 1024)
    return {"do_sample": sampled, "num_beams": beams or 1, "max_new_tokens": longest, **sampling}


def write_record(attachment: Attachment) -> None:
    """Add the attachment's record to the configuration in the results file that lmms-eval is going to write.

    lmms-eval offers models no place for it: its tracker is the last to see the results.
    """

    @wraps(SAVE_RESULTS)
    def save(self: Any, results: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        results["config"]["tokensieve"] = attachment.record()
        return SAVE_RESULTS(self, results, *args, **kwargs)

    EvaluationTracker.save_results_aggregated = save
