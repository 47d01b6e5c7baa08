"""The path through vLLM, against the contract of the plug-in: a stand-in records the calls and answers them.

vLLM itself is not in the environment of these tests.
"""

import json
import sys
from types import SimpleNamespace

import pytest

from tests.batch.conftest import job, write_rows
from tokensieve.batch import vllm
from tokensieve.batch.worker import Worker
from tokensieve.errors import MissingExtra, Refusal
from tokensieve.loading import LoadOptions

PLACEHOLDER = 7
FULL = 576


class Engine:
    """Answers with the request: text and number of placeholders."""

    def __init__(self, **arguments):
        self.arguments, self.requests = arguments, []
        config = SimpleNamespace(image_token_id=PLACEHOLDER)
        self.llm_engine = SimpleNamespace(model_config=SimpleNamespace(hf_config=config))

    def chat(self, messages, sampling, *, use_tqdm, mm_processor_kwargs):
        self.requests.append((mm_processor_kwargs, len(messages)))
        if any("long" in turns[0]["content"][-1]["text"] for turns in messages):
            raise ValueError("the prompt is too long")
        keep = mm_processor_kwargs["tokensieve_keep"]
        tokens = keep if isinstance(keep, int) else round(keep * FULL)
        outputs = []
        for (turn,) in messages:
            *images, text = turn["content"]
            assert all(image["type"] == "image_pil" and image["image_pil"].mode == "RGB" for image in images)
            answer = SimpleNamespace(text=f" {text['text']} ")
            outputs.append(SimpleNamespace(outputs=[answer], prompt_token_ids=[1, *[PLACEHOLDER] * tokens, 2]))
        return outputs


@pytest.fixture
def stand_in(monkeypatch):
    """Return a function that makes a worker's model of a job, and the calls of ``engine_options``."""
    calls = []

    def engine_options(model, method, *, allowed=(), **parameters):
        calls.append((model, method, allowed, parameters))
        return {"hf_overrides": {"tokensieve": method}}

    library = SimpleNamespace(LLM=Engine, SamplingParams=lambda **values: values, __version__="0")
    monkeypatch.setitem(sys.modules, "vllm", library)
    monkeypatch.setitem(sys.modules, "tokensieve.vllm", SimpleNamespace(engine_options=engine_options))
    monkeypatch.setattr(vllm, "available", lambda: True)
    return calls


def answers(worker, data):
    outcomes = [json.loads(text) for part in data for text in worker({"part": [json.dumps(vars(part))]})["outcome"]]
    return [row for outcome in outcomes for row in outcome["rows"]]


def test_each_run_is_a_request_with_its_method_and_budget(stand_in, questions):
    three = job(questions, "vtc-cls(keep=64)", "full", "divprune(keep=0.25)", engine="vllm")
    worker = Worker(three, 1)
    allowed = ("full", "vtc-cls", "divprune")
    assert stand_in[-1] == ("reference", "vtc-cls", allowed, {})
    engine = worker.model.engine
    assert engine.arguments == {"model": "reference", "hf_overrides": {"tokensieve": "vtc-cls"}}
    rows = answers(worker, three.parts()[:1])
    sent = [
        {"tokensieve_keep": 1.0, "tokensieve_method": "full"},
        {"tokensieve_keep": 64, "tokensieve_method": "vtc-cls"},
        {"tokensieve_keep": 0.25, "tokensieve_method": "divprune"},
    ]
    assert [request for request, _ in engine.requests] == sent
    assert [(r["method"], r["tokens_before"], r["tokens_after"]) for r in rows[:3]] == [
        ("full", FULL, FULL),
        ("vtc-cls(keep=64)", FULL, 64),
        ("divprune(keep=0.25)", FULL, 144),
    ]
    assert len(rows) == 3 * 30
    first = json.loads(questions.read_text("utf-8").splitlines()[0])
    assert [r["answer"] for r in rows[:3]] == [first["question"]] * 3


def test_errors_stay_with_their_rows(stand_in, questions, tmp_path):
    whole = str(questions.parent / "images/0.png")
    rows = [
        {"image": whole, "question": "short?"},
        {"image": whole, "question": "long?"},
        {"image": "none.png", "question": "short?"},
    ]
    data = write_rows(tmp_path, rows)
    one = job(data, "vtc-cls(keep=64)", engine="vllm")
    first, second, third = answers(Worker(one, 1), one.parts())
    assert (first["answer"], first["tokens_before"], first["tokens_after"]) == ("short?", None, 64)
    assert second["error"] == "the prompt is too long"
    assert third["error"] == "none.png: no such image file"


@pytest.mark.parametrize(
    ("methods", "options", "reason"),
    [
        (("vtc-cls(first_layer=-2)", "divprune"), {}, "one set of parameters"),
        (("vtc-cls", "full"), {"loading": LoadOptions(system="be brief")}, "got system"),
    ],
)
def test_a_job_that_it_cannot_serve_is_refused(stand_in, questions, methods, options, reason):
    with pytest.raises(Refusal, match=reason):
        vllm.check(job(questions, *methods, engine="vllm", **options))


def test_parameters_of_one_method_go_to_the_engine(stand_in, questions):
    vllm.check(job(questions, "vtc-cls(first_layer=-2, keep=64)", "full", engine="vllm"))
    assert stand_in[-1][3] == {"first_layer": -2}


def test_without_vllm_the_extra_is_named(questions, monkeypatch):
    monkeypatch.setattr(vllm, "available", lambda: False)
    with pytest.raises(MissingExtra, match=r"\[vllm\]"):
        vllm.check(job(questions, engine="vllm"))
