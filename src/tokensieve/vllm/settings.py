"""The choices of an engine and of a request: method, budget and positions, and what vLLM cannot do."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

from tokensieve.budget import check_number, rule_of
from tokensieve.errors import Refusal, first_line, nearest
from tokensieve.methods import Method, Positions, TrainedMethod, parse
from tokensieve.methods.compute import ComputeMethod
from tokensieve.methods.spec import expand
from tokensieve.vllm.families import FAMILIES, REFUSED, ServedFamily

KEEP, METHOD = "tokensieve_keep", "tokensieve_method"
"""The names of a request's choices in ``mm_processor_kwargs``."""

ATTRIBUTE = "tokensieve"
"""The attribute of the model's config that holds the engine's choices (``--hf-overrides`` puts it there)."""


@dataclass(frozen=True)
class EngineSettings:
    """The choices that an engine was started with.

    Attributes:
        method: spec of the default method, such as "vtc-cls(keep=64)".
        allowed: specs of the further methods that a request may choose, as the user spelled them.
        positions: "original" keeps the position ids of the kept tokens, "contiguous" renumbers them.
        from_tokens: images of fewer tokens stay whole.
    """

    method: str
    allowed: tuple[str, ...] = ()
    positions: Positions = "original"
    from_tokens: int = 0

    @classmethod
    def of_config(cls, config: Any) -> EngineSettings:
        """Return the settings in a model's config; a config without any means the unreduced model."""
        values: Mapping[str, Any] = getattr(config, ATTRIBUTE, None) or {"method": "full"}
        return cls(**{**values, "allowed": tuple(values.get("allowed", ()))})

    @cached_property
    def methods(self) -> tuple[Method, ...]:
        """The default method and the allowed ones; a request names one of them by its number."""
        return tuple(served_method(spec) for spec in (self.method, *self.allowed))

    def choose(self, options: Mapping[str, Any]) -> Choice:
        """Return the choice of a request; without options the engine's own.

        Raises:
            Refusal: an option that does not exist, a method that is not allowed, or an impossible budget.
        """
        for name in options:
            if name not in (KEEP, METHOD):
                raise Refusal(f"unknown option {name!r}; allowed: {KEEP}, {METHOD}")
        number = self._number(options[METHOD]) if METHOD in options else 0
        method = self.methods[number]
        if KEEP in options:
            (method,) = with_keep([method], options[KEEP])
        return Choice(number, method)

    def _number(self, chosen: object) -> int:
        """Return the number of a method that a request names: by its spec as given or in full, or by its name alone."""
        full_specs, names = map(str, self.methods), (method.info.name for method in self.methods)
        for texts in ((self.method, *self.allowed), tuple(full_specs), tuple(names)):
            if chosen in texts:
                return texts.index(chosen)
        raise Refusal(f"{METHOD} must be one of {', '.join(map(str, self.methods))}; got {chosen!r}")


@dataclass(frozen=True)
class Choice:
    """The method of one request, with its budget; ``number`` is its place among the engine's methods."""

    number: int
    method: Method


def with_keep(methods: Sequence[Method], keep: Any) -> list[Method]:
    """Return the methods of a request with the request's budget in place of their own.

    Raises:
        Refusal: the budget is impossible, or none of the methods has one.
    """
    keep = check_number(keep)
    if not any("keep" in method.info.parameters for method in methods):
        raise Refusal(f"{KEEP}: {' + '.join(method.info.name for method in methods)} has no budget; got {keep}")
    return [method.with_budget(keep) if "keep" in method.info.parameters else method for method in methods]


def served_method(spec: str, **parameters: Any) -> Method:
    """Return the method of a spec, if an engine can run it.

    Raises:
        Refusal: naming what such an engine cannot do.
    """
    stages = parse(spec, **parameters)
    if len(stages) != 1:
        raise Refusal(f"vLLM runs one method, between vision encoder and LLM; got {len(stages)} stages: {spec}")
    (method,) = stages
    reason = unserved(method)
    if reason is not None:
        raise Refusal(f"{method.info.name} cannot run in vLLM: {reason}")
    return method


def unserved(method: Method) -> str | None:
    """Return why no vLLM engine can run a method; ``None`` if one can."""
    if method.keeps_everything:
        return None
    if method.info.name == "mustdrop-keys":
        return "it only ranks tokens for mustdrop-llm, which acts inside the LLM"
    stage, needs = method.info.stage, method.needs
    if isinstance(method, ComputeMethod):
        return "it changes attention and MLPs of the LLM, which in vLLM are classes of its own"
    if stage == "decoder":
        return "it drops tokens inside the LLM, and vLLM's paged cache has one length for all layers"
    if stage == "fusion":
        return "it acts inside a fusion encoder, which vLLM does not have"
    if stage == "encoder":
        return "it acts inside the vision encoder, and vLLM's encoders are classes of its own"
    if isinstance(method, TrainedMethod) and method.has_net:
        return "its trained net is a part of the handle that attach() returns, which an engine does not have"
    if needs.requests("video"):
        return "it reduces videos, and the plug-in reduces images"
    if method.budget is None:
        remedy = ": give keep" if "keep" in method.info.parameters else ""
        return f"the image's content decides how many tokens stay, and vLLM reserves them before it encodes{remedy}"
    if rule_of(method.budget) is not None:
        worked_out = f"keep={method.budget!r} is worked out for each image once it is encoded"
        return f"{worked_out}, and vLLM reserves tokens before: give a number"
    if method.slots(1, (1, 1)) is None:
        return "with these parameters it decides by the image's content how many tokens stay"
    return None


def engine_options(
    model: str,
    method: str,
    *,
    allowed: Sequence[str] = (),
    positions: Positions = "original",
    from_tokens: int = 0,
    **parameters: Any,
) -> dict[str, Any]:
    """Return the keyword arguments that make ``vllm.LLM(model, ...)`` reduce images.

    On vLLM's command line, ``--hf-overrides`` takes the value of ``hf_overrides`` as JSON.

    Args:
        model: folder or hub name of a checkpoint.
        method: spec of a connector method with a budget, such as "vtc-cls(keep=64)"; "full" reduces nothing.
        allowed: specs of further methods. A request chooses one, by its name or its whole spec, with
            ``mm_processor_kwargs={"tokensieve_method": "divprune", "tokensieve_keep": 0.25}``.
        positions: "original" keeps the position ids of the kept tokens; "contiguous" renumbers them.
        from_tokens: images of fewer tokens stay whole.
        parameters: values for parameters of the spec, e.g. ``keep=64``.

    Raises:
        Refusal: naming the method, the family or the budget that cannot be served, and why.
    """
    if positions not in get_args(Positions):
        raise Refusal(f"positions must be 'original' or 'contiguous'; got {positions!r}")
    if isinstance(from_tokens, bool) or not isinstance(from_tokens, int) or from_tokens < 0:
        raise Refusal(f"from_tokens must be a whole number of tokens >= 0; got {from_tokens!r}")
    # the engine keeps no separator, whatever a spec file says
    (method, *allowed), options = expand([method, *allowed], positions=positions, separators="kept-lines")
    positions = options["positions"]
    default = served_method(method, **parameters)
    others = {text: one for text in allowed if (one := served_method(text)) != default}
    config = read_config(checkpoint(model))
    family = family_of(config)
    for chosen in (default, *others.values()):
        reason = family.unserved(config, chosen)
        if reason is not None:
            raise Refusal(f"{chosen.info.name} cannot run on {family.title} in vLLM: {reason}")
    spec = str(default) if parameters else method  # a request may repeat it, spelled the same
    overrides: dict[str, Any] = {
        "architectures": [family.reduced_architecture],
        ATTRIBUTE: asdict(EngineSettings(spec, tuple(others), positions, from_tokens)),
    }
    if positions == "original" and not family.mrope:
        text = family.rope_with_sections(config)
        if text is None:
            raise Refusal(
                f"{family.title}: vLLM takes position ids from a model only where it has one rotary embedding for all "
                "layers; use positions='contiguous'"
            )
        overrides["text_config"] = {"rope_parameters": text}
    return {"hf_overrides": overrides}


def family_of(config: Mapping[str, Any]) -> ServedFamily:
    """Return the family of a checkpoint's config; raise :class:`Refusal` with the reason if there is none."""
    model_type = str(config.get("model_type"))
    for family in FAMILIES:
        if family.describes(config):
            return family
    if model_type in REFUSED:
        raise Refusal(f"{model_type} cannot be reduced in vLLM: {REFUSED[model_type]}")
    known = sorted({name for family in FAMILIES for name in family.model_types})
    raise Refusal(f"the plug-in does not know model type {model_type!r}; {nearest(model_type, known)}")


def read_config(model: str) -> dict[str, Any]:
    """Return the contents of a checkpoint's ``config.json``, from a folder or the hub."""
    file = Path(model) / "config.json"
    if not Path(model).exists():
        from transformers.utils import cached_file

        try:
            file = Path(str(cached_file(model, "config.json")))
        except (OSError, ValueError) as error:
            raise Refusal(f"{model} is neither a folder nor a model that can be fetched ({error})") from None
    try:
        config = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise Refusal(f"{file} cannot be read as the config of a model ({error})") from None
    if not isinstance(config, dict):
        raise Refusal(f"{file} is not the config of a model")
    return config


def checkpoint(model: str) -> str:
    """Return the folder of a bundled model, and any other name unchanged."""
    from tokensieve.reference import NAMES, path

    return str(path(model)) if model in NAMES and not Path(model).exists() else model


def placeholders(folder: str) -> tuple[str, ...]:
    """Return the tokens of a checkpoint that stand for an image or a video."""
    from transformers import AutoTokenizer

    config, tokenizer = read_config(folder), AutoTokenizer.from_pretrained(folder)
    names = [f"{kind}_token_{suffix}" for kind in ("image", "video") for suffix in ("id", "index")]
    ids = [config[name] for name in names if isinstance(config.get(name), int)]
    return tuple(dict.fromkeys(str(tokenizer.convert_ids_to_tokens(number)) for number in ids))


def renders_begin_of_text(folder: str) -> bool:
    """Return whether the chat template writes the token that begins a text.

    transformers adds this token where the template does not, and vLLM does not add it: the same question would be
    another prompt.
    """
    from transformers import AutoProcessor

    # not the tokenizer, which does not read the template of a "chat_template.json"
    processor = AutoProcessor.from_pretrained(folder)
    begin = processor.tokenizer.bos_token
    if begin is None or not processor.chat_template:
        return True
    question = {"role": "user", "content": [{"type": "text", "text": "x"}]}
    try:
        rendered = processor.apply_chat_template([question], tokenize=False)
    except Exception as error:  # templates refuse in any type
        raise Refusal(f"the chat template of {folder} renders no plain question: {first_line(error)}") from error
    return str(rendered).startswith(begin)
