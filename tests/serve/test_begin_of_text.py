"""The token that begins a text: vLLM is asked for it exactly where transformers adds it to a rendered chat."""

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from tests.serve.asgi import chat, post
from tests.serve.test_guard import Engine
from tokensieve.errors import Refusal
from tokensieve.reference import path
from tokensieve.serve import Settings
from tokensieve.serve.guard import Guard
from tokensieve.vllm import renders_begin_of_text

QUESTION = "{{ messages[0]['content'][0]['text'] }}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a copy of the bundled model without its weights: its tokenizer puts <s> in front of a text."""
    return Path(shutil.copytree(path(), tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors")))


@pytest.mark.parametrize(
    ("template", "written"),
    [("USER: " + QUESTION, False), ("<s>USER: " + QUESTION, True), ("{{ bos_token }}" + QUESTION, True)],
)
@pytest.mark.parametrize("file", ["chat_template.jinja", "chat_template.json"])
def test_the_template_is_read_as_transformers_reads_it(folder: Path, file: str, template: str, written: bool) -> None:
    from transformers import AutoProcessor

    (folder / "chat_template.jinja").unlink()
    (folder / file).write_text(template if file.endswith("jinja") else json.dumps({"chat_template": template}))
    assert renders_begin_of_text(str(folder)) is written
    processor = AutoProcessor.from_pretrained(folder)
    messages = [{"role": "user", "content": [{"type": "text", "text": "what colour is the 1?"}]}]
    rendered = processor.apply_chat_template(messages, tokenize=False)
    (ids,) = processor.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    asked_of_vllm = processor.tokenizer(rendered, add_special_tokens=not written)["input_ids"]
    assert ids == asked_of_vllm
    assert ids.count(processor.tokenizer.bos_token_id) == 1


def test_nothing_is_added_without_such_a_token_or_a_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    assert renders_begin_of_text(str(folder))
    (folder / "chat_template.jinja").write_text(QUESTION)
    assert not renders_begin_of_text(str(folder))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"bos_token": None}))
    assert renders_begin_of_text(str(folder))


def test_a_template_that_takes_no_question_is_refused(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ raise_exception('tools only') }}")
    with pytest.raises(Refusal, match="renders no plain question: tools only"):
        renders_begin_of_text(str(folder))


@pytest.mark.parametrize(("setting", "received"), [(True, {"add_special_tokens": True}), (False, {})])
def test_the_guard_asks_for_the_token(setting: bool, received: dict[str, Any]) -> None:
    engine = Engine()
    settings = Settings(("reference",), begin_of_text=setting)
    guard = Guard(engine, settings, CollectorRegistry())
    assert asyncio.run(post(guard, chat())).status == 200
    assert engine.bodies == [chat(**received)]
