"""Questions with earlier turns: answered on the first turn's cache, on which alone the method decides."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from tokensieve import Refusal, attach, reference
from tokensieve.errors import ResumeError
from tokensieve.evaluate import compare, encode, load_data
from tokensieve.evaluate.answer import Answerer, attaching
from tokensieve.evaluate.data import Sample
from tokensieve.evaluate.plan import Settings
from tokensieve.evaluate.prompt import first_turn, left_padded_batch
from tokensieve.evaluate.provenance import sample_key
from tokensieve.reference.benchmark import benchmark
from tokensieve.reference.scenes import scene

OPTIONS = {"batch_size": 4, "seeds": 1, "measure": False, "max_new_tokens": 3}


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """Return conversations of two lengths about drawn scenes, and a question without earlier turns."""
    folder = tmp_path_factory.mktemp("conversations")
    rows = benchmark("validation", scenes=5, types=("turn",))
    lines = []
    for number, row in enumerate(rows):
        row.image.save(folder / f"{number}.png")
        line = {"id": row.id, "images": [f"{number}.png"], "question": row.question, "answer": row.answer}
        lines.append(line | ({"turns": row.turns} if number else {}))
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return load_data(folder / "data.jsonl")


def texts(folder, run: str) -> dict[str, str]:
    lines = map(json.loads, (folder / "predictions.jsonl").read_text().splitlines())
    # the answers about shifted images are left out
    return {line["sample"]: line["text"] for line in lines if line.get("run") == run and "moved" not in line["sample"]}


def test_an_answer_on_the_whole_cache_is_that_of_the_whole_conversation(samples, tmp_path):
    model, processor = reference.load()
    compare(model, processor, samples, ["divprune(keep=1.0)"], [1.0], output=tmp_path, **OPTIONS)
    full, whole = texts(tmp_path, "full"), texts(tmp_path, "divprune(keep=1.0)")
    assert len(full) == 5
    assert full == whole
    for sample in samples:
        inputs = encode(processor, [sample])
        assert (inputs["input_ids"].shape[1] > encode(processor, [first_turn(sample)])["input_ids"].shape[1]) == bool(
            sample.turns
        )
        output = model.generate(**inputs, max_new_tokens=3)[0, inputs["input_ids"].shape[1] :]
        assert full[sample_key(sample)] == processor.decode(output, skip_special_tokens=True)


def test_an_answer_with_a_method_is_that_of_a_turn_on_its_cache(samples, tmp_path):
    model, processor = reference.load()
    spec = "trsm(keep=9)"
    compare(model, processor, samples[1:], [spec], [9], output=tmp_path, **OPTIONS)
    answers = texts(tmp_path, spec)
    for sample in samples[1:]:
        (first,), (whole,) = (encode(processor, [part])["input_ids"] for part in (first_turn(sample), sample))
        with attach(model, spec, processor=processor):
            inputs = encode(processor, [first_turn(sample)])
            cache = model(**inputs, use_cache=True).past_key_values
            assert cache.layers[0].keys.shape[-2] == len(first) - 144 + 9
            mask = torch.ones_like(whole)[None]
            output = model.generate(input_ids=whole[None], attention_mask=mask, past_key_values=cache, max_new_tokens=3)
        assert answers[sample_key(sample)] == processor.decode(output[0, len(whole) :], skip_special_tokens=True)


def test_the_method_reads_the_first_question_alone(samples, tmp_path):
    """Conversations that part after the first turn have the decision of the first question."""
    model, processor = reference.load()
    one = samples[1]
    other = replace(one, id="other", question="how many digits are there?")
    plain = replace(first_turn(one), id="plain")
    last = replace(one, id="last", turns=())
    asked = [one, other, plain, last]
    keys = {sample.id: sample.id for sample in asked}
    answerer = Answerer(model, processor, asked, Settings(batch_size=4, max_new_tokens=3), keys, set(keys))
    (batch,) = answerer.run(attaching(model, "trsm(keep=9)", processor), set(), {})
    kept = {answer.sample: answer.reduction for answer in batch.answers}
    assert kept[one.id] == kept["other"] == kept["plain"] != kept["last"]
    assert kept[one.id] is not None


def test_turns_change_the_key_of_an_answer(samples):
    assert sample_key(replace(samples[1], turns=())) != sample_key(samples[1])


def test_bad_turns_are_refused_with_their_line(tmp_path):
    scene("validation", 0).image.save(tmp_path / "0.png")
    row = {"image": "0.png", "question": "where is the star?", "answer": "top-left"}
    for turns, error in (
        ("red", r"data.jsonl, line 1: turns are a list of \[question, answer\]; got 'red'"),
        ([["what colour is the star?"]], r"turns are a list of \[question, answer\]"),
        ([["what colour is the star?", " "]], "turns hold no empty question or answer"),
    ):
        (tmp_path / "data.jsonl").write_text(json.dumps(row | {"turns": turns}))
        with pytest.raises(Refusal, match=error):
            load_data(tmp_path / "data.jsonl")


def test_models_without_conversations_refuse_turns(samples, tmp_path):
    model, processor = reference.load("vilt-reference")
    with pytest.raises(Refusal, match="this model answers single questions; got 1 earlier turns"):
        compare(model, processor, samples, ["pumer(layers=(2, 4, 6))"], [0.5], output=tmp_path, **OPTIONS)
    _, processor = reference.load()
    processor.chat_template = None
    with pytest.raises(Refusal, match="has no chat template, and earlier turns need one"):
        left_padded_batch(processor, [[samples[1].open()]], ["what?"], [[("who?", "you")]])


@pytest.mark.parametrize("spec", ["trsm(keep=9)", "fastv(layer=1, keep=9)"])
def test_with_reselect_the_answers_are_those_of_the_whole_conversation(samples, tmp_path, spec):
    model, processor = reference.load()
    compare(model, processor, samples, [spec], [9], output=tmp_path / "anew", reselect=True, **OPTIONS)
    answers = texts(tmp_path / "anew", next(iter(runs(tmp_path / "anew"))))
    for sample in samples:
        inputs = encode(processor, [sample])
        with attach(model, spec, processor=processor):
            output = model.generate(**inputs, max_new_tokens=3)[0, inputs["input_ids"].shape[1] :]
        assert answers[sample_key(sample)] == processor.decode(output, skip_special_tokens=True)


def test_predictions_with_reselect_are_not_mixed_with_others(samples, tmp_path):
    model, processor = reference.load()
    compare(model, processor, samples, ["trsm(keep=9)"], [9], output=tmp_path, **OPTIONS)
    with pytest.raises(ResumeError, match="reselect"):
        compare(model, processor, samples, ["trsm(keep=9)"], [9], output=tmp_path, reselect=True, **OPTIONS)


def runs(folder) -> list[str]:
    """Return the runs of a comparison with a method, in order."""
    lines = map(json.loads, (folder / "predictions.jsonl").read_text().splitlines())
    names = dict.fromkeys(line["run"] for line in lines if "run" in line)
    return [name for name in names if "(" in name and not name.startswith("oracle")]
