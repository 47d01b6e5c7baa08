"""Conversations: equal to one-shot runs, decided on the first question, and apart from each other."""

from functools import partial
from typing import Any

import pytest
import torch
from PIL import Image

import tokensieve
from tests.support.models import tiny_model
from tests.support.processors import processor as tiny_processor
from tokensieve import Refusal, reference
from tokensieve.demo import cards
from tokensieve.demo.examples import Example, examples
from tokensieve.demo.run import Workbench
from tokensieve.demo.talk import Conversation, conversation_inputs
from tokensieve.evaluate.prompt import decode

pytestmark = pytest.mark.skipif(not (reference.path() / "model.safetensors").is_file(), reason="no trained weights")


@pytest.fixture(scope="module")
def bench() -> Workbench:
    return Workbench("reference", *reference.load())


@pytest.fixture(scope="module")
def scene() -> Example:
    return examples("reference")[0]


def begin(bench: Workbench, scene: Example, method: str, reuse: Any = "cache", keep: Any = 16) -> Conversation:
    return Conversation(bench, scene.picture, method, keep, "original", reuse)


def questions(scene: Example, count: int = 3) -> list[str]:
    return [sample.question for sample in scene.samples[:count]]


@pytest.mark.parametrize("method", ["trsm", "vtc-cls", "fastv", "visionzip"])
def test_later_questions_are_answered_from_the_tokens_of_the_first(
    bench: Workbench, scene: Example, method: str
) -> None:
    """The answers equal those to the whole conversation in one prompt with the tokens of the first question."""
    talk = begin(bench, scene, method)
    asked = questions(scene)
    for number, question in enumerate(asked):
        talk.ask(question)
        turns = talk.reduced.turns
        assert turns[number].on_cache == (number > 0)
        if method == "fastv":  # inside the LLM a replay is another computation
            continue
        inputs = conversation_inputs(bench.processor, talk.image, turns[:number], question)
        assert talk.reduced.decision is not None
        with tokensieve.attach(bench.model, [[talk.reduced.decision]]), torch.inference_mode():
            generated = bench.model.generate(**inputs, do_sample=False, max_new_tokens=32)
        assert turns[number].answer == decode(bench.processor, generated, inputs["input_ids"].shape[1])[0]
    assert talk.reduced.decided_on == (asked[0],)
    first, later = talk.reduced.turns[0], talk.reduced.turns[1]
    assert later.prefilled < 30 < talk.full.turns[0].prefilled
    assert first.prefilled < talk.full.turns[0].prefilled


def test_with_its_history_a_method_decides_anew(bench: Workbench, scene: Example) -> None:
    asked = questions(scene)
    kept = {}
    for reuse in ("cache", "history"):
        talk = begin(bench, scene, "trsm", reuse)
        for question in asked:
            talk.ask(question)
        assert talk.reduced.decision is not None
        kept[reuse] = talk.reduced.decision.kept.tolist()
        assert talk.full.turns[-1].on_cache == (reuse == "cache")
    assert kept["cache"] != kept["history"]
    assert talk.reduced.decided_on == tuple(asked)


@pytest.mark.parametrize("method", ["trsm", "fastv", "vtc-cls"])
def test_tokens_chosen_anew_are_those_of_the_history(bench: Workbench, scene: Example, method: str) -> None:
    talks = {reuse: begin(bench, scene, method, reuse) for reuse in ("reselect", "history")}
    for number, question in enumerate(questions(scene)):
        for talk in talks.values():
            talk.ask(question)
        assert talks["reselect"].reduced.turns[-1].encoded == (number == 0)
    anew, history = talks["reselect"].reduced, talks["history"].reduced
    assert anew.decision is not None
    assert history.decision is not None
    assert anew.decision.kept.tolist() == history.decision.kept.tolist()
    assert [turn.answer for turn in anew.turns] == [turn.answer for turn in history.turns]
    text = " ".join(talks["reselect"].explanation())
    assert anew.turns[-1].on_cache == (method == "vtc-cls") != ("the vision encoder did not run again" in text)


def test_the_page_says_on_what_a_method_decided(bench: Workbench, scene: Example) -> None:
    asked = questions(scene, 2)
    texts = {}
    for method in ("trsm", "vtc-cls", "fastv"):
        talk = begin(bench, scene, method)
        for question in asked:
            talk.ask(question)
        texts[method] = " ".join(talk.explanation())
    assert f"by the words of the first question, “{asked[0]}”. Later questions" in texts["trsm"]
    assert "It reads no question" in texts["vtc-cls"]
    assert "inside the LLM, by the words of the first question" in texts["fastv"]
    assert "kept 16 of 144" in texts["trsm"]
    shown = cards.conversation(talk)
    assert shown.count('<div class="turn">') == 4
    assert "<img" in shown


def test_a_refused_question_leaves_the_conversation_as_it_was(bench: Workbench, scene: Example) -> None:
    talk = begin(bench, scene, "trsm")
    with pytest.raises(Refusal, match="no words"):
        talk.ask("</s>")
    with pytest.raises(Refusal, match="is empty"):
        talk.ask(" ")
    assert talk.full.turns == talk.reduced.turns == []
    talk.ask(questions(scene)[0])
    with pytest.raises(Refusal, match="leave <image> out"):
        talk.ask("<image>")
    assert len(talk.full.turns) == len(talk.reduced.turns) == 1


def test_a_conversation_is_refused_where_there_can_be_none(bench: Workbench, scene: Example) -> None:
    with pytest.raises(Refusal, match="there is no image"):
        Conversation(bench, None, "trsm", 0.25, "original", "cache")
    with pytest.raises(Refusal, match="cannot read the method spec"):
        Conversation(bench, scene.picture, "", 0.25, "original", "cache")
    classifier = Workbench("pumer-reference", *reference.load("pumer-reference"))
    with pytest.raises(Refusal, match="it holds no conversation"):
        Conversation(classifier, scene.picture, "pumer", 0.25, "original", "cache")


def test_conversations_in_turns_do_not_mix() -> None:
    """Qwen2-VL remembers the position offset of its latest call, which was another visitor's."""
    bench = Workbench("tiny", tiny_model("qwen2-vl"), tiny_processor("qwen2-vl"))
    asked = ["what is this ?", "which one is red ?", "is it blue ?"]
    photos = [partial(Image.radial_gradient("L").resize, size) for size in ((56, 56), (112, 28))]

    def talks() -> list[Conversation]:
        return [Conversation(bench, photo, "divprune", 2, "original", "cache") for photo in photos]

    def answers(talk: Conversation) -> list[tuple[str, ...]]:
        return [tuple(turn.answer for turn in side.turns) for side in (talk.full, talk.reduced)]

    alone, mixed = talks(), talks()
    for talk in alone:
        for question in asked:
            talk.ask(question, 4)
    for question in asked:
        for talk in mixed:
            talk.ask(question, 4)
    assert all(turn.on_cache for talk in mixed for turn in talk.reduced.turns[1:])
    assert [answers(talk) for talk in mixed] == [answers(talk) for talk in alone]
