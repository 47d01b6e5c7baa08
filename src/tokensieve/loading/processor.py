"""Load a processor, and set its options and those of its chat template."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

from tokensieve.errors import Refusal, first_line, nearest
from tokensieve.loading.options import DEFAULTS, LoadOptions
from tokensieve.loading.place import Place, from_pretrained

PARTS = ("image_processor", "video_processor", "tokenizer")


def load_processor(place: Place, options: LoadOptions = DEFAULTS) -> Any:
    """Return the processor of a model, with the processor and chat options set."""
    from transformers import AutoProcessor

    processor = from_pretrained(AutoProcessor, place, options, **options.processor)
    check_processor(processor, options.processor)
    if options.chat or options.system is not None:
        processor.chat_template = _chat_template(processor, options)
    return processor


def check_processor(processor: Any, options: Mapping[str, Any]) -> None:
    """Refuse options that a processor, or an image processor, would ignore, and values that it cannot work with."""
    from PIL import Image

    if not options:
        return
    images, videos = getattr(processor, "image_processor", processor), getattr(processor, "video_processor", None)
    known = set(inspect.signature(type(processor).__init__).parameters) - {"self", "kwargs", *PARTS}
    for part in (images, videos):
        known |= set(getattr(getattr(part, "valid_kwargs", None), "__annotations__", {}))
    for name in options:
        if name not in known:
            raise Refusal(f"{type(processor).__name__} has no option {name!r}; {nearest(name, known)}")
    try:
        images(Image.new("RGB", (64, 48)))
    except Exception as error:  # what a wrong value raises depends on the processor
        values = ", ".join(f"{name}={value!r}" for name, value in options.items())
        raise Refusal(f"{type(processor).__name__} does not work with {values}: {first_line(error)}") from error


def _chat_template(processor: Any, options: LoadOptions) -> Any:
    """Return the chat template with the options written into it.

    Each is an assignment in front of the template, so that every use of the processor renders the same prompt: the
    encoding of a question, and the search for the user's words in it.
    """
    template = getattr(processor, "chat_template", None)
    if not template:
        raise Refusal(f"{type(processor).__name__} has no chat template; leave chat options and system prompt out")
    texts = template.values() if isinstance(template, Mapping) else [template]
    variables = set().union(*map(_variables, texts))
    for name in options.chat:
        if name not in variables:
            raise Refusal(f"the chat template reads no {name!r}; {nearest(name, variables)}")
    assigned = {name: repr(value) for name, value in options.chat.items()}
    if options.system is not None:
        if re.search("[\ud800-\udfff]", options.system):
            raise Refusal(f"the system prompt is not valid text: half of a character in {options.system!r}")
        turn = {"role": "system", "content": [{"type": "text", "text": options.system}]}
        assigned["messages"] = f"[{turn!r}] + messages"
    # Python's literals are Jinja's; the empty expression keeps Jinja from trimming the template's first line break
    prefix = "".join(f"{{% set {name} = {value} %}}" for name, value in assigned.items()) + "{{ '' }}"
    if isinstance(template, Mapping):
        changed: Any = {name: prefix + text for name, text in template.items()}
    else:
        changed = prefix + template
    _check_rendering(processor, changed, options.system)
    return changed


def _variables(template: str) -> set[str]:
    """Return the variables that a chat template reads from its caller."""
    from jinja2 import Environment, TemplateSyntaxError, meta

    try:
        tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
    except TemplateSyntaxError:  # tags of transformers, such as {% generation %}
        return set(re.findall(r"[A-Za-z_]\w*", template))
    return meta.find_undeclared_variables(tree) - {"messages", "raise_exception", "strftime_now"}


def _check_rendering(processor: Any, template: Any, system: str | None) -> None:
    template = template["default"] if isinstance(template, Mapping) and "default" in template else template
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}]
    try:
        text = processor.apply_chat_template(turns, chat_template=template, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # templates refuse in any type
        raise Refusal(f"the chat template does not take these options: {first_line(error)}") from error
    if system is not None and system.strip() not in text:
        raise Refusal("the chat template has no place for a system prompt")
