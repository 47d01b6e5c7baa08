"""The figures of the page: equal to those of ``attach``, one clear line for wrong input, and no mixing of visitors."""

import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
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
from tokensieve.demo.run import Request, Row, Workbench
from tokensieve.evaluate.prompt import decode, encode
from tokensieve.measure import Spread
from tokensieve.report.overlay import overlay

pytestmark = pytest.mark.skipif(not (reference.path() / "model.safetensors").is_file(), reason="no trained weights")
METHODS = ("vtc-cls", "trsm", "visionzip", "fastv", "vtw")


@pytest.fixture(scope="module")
def bench() -> Workbench:
    return Workbench("reference", *reference.load())


@pytest.fixture(scope="module")
def scenes() -> list[Example]:
    return examples("reference")


def request(example: Example, methods: tuple[str, ...] = METHODS, number: int = 0, **more: Any) -> Request:
    sample = example.samples[number]
    settings = {"keep": 0.25, "rounds": 0, "right_answers": sample.answers, **more}
    return Request(example.picture, sample.question, methods, **settings)


def test_examples_are_scenes_of_the_benchmark(scenes: list[Example]) -> None:
    assert len(scenes) == 8
    assert len({example.samples[0].open().tobytes() for example in scenes}) == 8
    assert all(sample.image == example.picture for example in scenes for sample in example.samples)


def test_examples_of_a_file(tmp_path: Path) -> None:
    for number in range(3):
        Image.new("RGB", (20, 20), (number, 0, 0)).save(tmp_path / f"{number}.png")
    rows = [f'{{"image": "{number % 3}.png", "question": "q{number}?", "answer": "a"}}' for number in range(5)]
    (tmp_path / "data.jsonl").write_text("\n".join(rows))
    asked = {
        example.picture.name: {sample.question for sample in example.samples}
        for example in examples(str(tmp_path / "data.jsonl"))
    }
    assert asked == {"0.png": {"q0?", "q3?"}, "1.png": {"q1?", "q4?"}, "2.png": {"q2?"}}


@pytest.mark.parametrize("positions", ["original", "contiguous"])
def test_rows_are_those_of_attach(bench: Workbench, scenes: list[Example], positions: Any) -> None:
    asked = request(scenes[1], number=1, positions=positions)
    rows = list(bench.rows(asked))
    assert [row.name for row in rows] == ["full", *(f"{name} at 25%" for name in METHODS[:-1]), "vtw"]
    for row, spec in zip(rows, ("full", *(f"{name}(keep=0.25)" for name in METHODS[:-1]), "vtw"), strict=True):
        inputs = encode(bench.processor, [asked.sample])
        with tokensieve.attach(bench.model, spec, processor=bench.processor, positions=positions) as sieve:
            generated = bench.model.generate(**inputs, do_sample=False, max_new_tokens=32)
        decision = sieve.last[0][0]
        assert row.answer == decode(bench.processor, generated, inputs["input_ids"].shape[1])[0]
        assert row.decision is not None
        assert row.decision.to_json() == decision.to_json()
        assert row.tokens_average == pytest.approx(sum(sieve.tokens[0][0]) / len(sieve.tokens[0][0]))
        assert row.right == (row.answer == scenes[1].samples[1].answers[0])
        assert row.picture is not None
        assert row.picture.tobytes() == overlay(asked.sample.open(), decision, 384).tobytes()


def test_merged_tokens_are_counted(bench: Workbench, scenes: list[Example]) -> None:
    _, pooled, pruned = bench.rows(request(scenes[0], ("pool", "trsm")))
    assert pooled.groups == (36, 144)
    assert pruned.groups == (0, 0)
    assert ("merged", "144 tokens into 36 groups") in cards.facts_of(pooled)


def test_an_image_that_the_budget_covers_is_kept_whole_and_says_so(bench: Workbench, scenes: list[Example]) -> None:
    full, row = bench.rows(request(scenes[0], ("trsm",), keep=1000))
    assert row.answer == full.answer
    assert row.decision is not None
    assert row.decision.whole
    assert "kept whole" in cards.card(row)


def test_costs_are_measured_for_the_rows_with_an_answer(bench: Workbench, scenes: list[Example]) -> None:
    asked = request(scenes[0], ("trsm", "text-correlation(keep=9)", "pumer"), rounds=2)
    rows = bench.costs(asked, list(bench.rows(asked)))
    assert [bool(row.refusal) for row in rows] == [False, False, False, True]
    assert [row.cost is None for row in rows] == [False, False, False, True]
    full, trsm = rows[0].cost, rows[1].cost
    assert full is not None
    assert trsm is not None
    assert (full.flops_ratio, full.tokens_after, trsm.tokens_after) == (1.0, 144, 36)
    assert trsm.flops_ratio < 0.8
    shown = dict(cards.facts_of(rows[1]))
    assert shown["prefill FLOPs"] == f"{trsm.flops_ratio:.0%}"
    assert re.fullmatch(r"[\d.]+ \([\d.]+–[\d.]+\) ms", shown["prefill"])
    assert "pumer" in rows[3].name


def test_a_speedup_has_a_verdict_only_where_its_quartiles_agree() -> None:
    assert cards.verdict(Spread(1.2, 1.1, 1.3)) == "faster"
    assert cards.verdict(Spread(0.8, 0.7, 0.9)) == "slower"
    assert cards.verdict(Spread(1.2, 0.9, 1.3)) == "not told apart"


def test_a_method_without_words_is_refused_in_its_own_row(bench: Workbench, scenes: list[Example]) -> None:
    asked = Request(scenes[0].picture, "</s>", ("trsm", "vtc-cls"), 0.25, rounds=0)
    full, refused, answered = bench.rows(asked)
    assert "no words" in refused.refusal
    assert not full.refusal
    assert not answered.refusal
    assert "no words" in cards.card(refused)


WRONG = {
    "no image": ({"picture": None}, "there is no image"),
    "empty question": ({"question": "  "}, "the question is empty"),
    "long question": ({"question": "a" * 3000}, "3,000 characters; the limit is 2,000"),
    "half a character": ({"question": "\ud83c?"}, "not valid text"),
    "a placeholder": ({"question": "<image> what?"}, "leave <image> out"),
    "no method": ({"methods": ()}, "choose from 1 to 12 methods"),
    "many methods": ({"methods": ("trsm",) * 13}, "got 13"),
    "unknown method": ({"methods": ("trms",)}, "did you mean trsm"),
    "unknown parameter": ({"methods": ("trsm(kep=2)",)}, "trsm has no parameter 'kep'"),
    "a file": ({"methods": ("/etc/mine.py:Mine",)}, "takes no method from a file"),
    "a file among others": ({"methods": ("trsm + /etc/mine.py:Mine",)}, "takes no method from a file"),
    "a spec file, which may name a file": ({"methods": ("/tmp/any.json",)}, "takes no method from a file"),
    "budget 0": ({"keep": 0}, "keep must be"),
    "budget 1.5": ({"keep": 1.5}, "keep must be"),
    "rounds": ({"rounds": 51}, "timed rounds must be a whole number from 0 to 50; got 51"),
    "answer": ({"max_new_tokens": 0}, "the longest answer must be a whole number from 1 to 512; got 0"),
    "damaged image": ({"picture": partial(Image.open, __file__)}, "not an image"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_clear_line(bench: Workbench, scenes: list[Example], case: str) -> None:
    change, line = WRONG[case]
    form = {"picture": scenes[0].picture, "question": "where is the sun?", "methods": ("trsm",), "keep": 0.25} | change
    with pytest.raises(Refusal, match=re.escape(line)) as refusal:
        list(bench.rows(Request(**form)))
    assert "\n" not in str(refusal.value)


def test_a_file_that_the_command_line_named_is_allowed(tmp_path: Path, scenes: list[Example]) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from dataclasses import dataclass\n"
        "from tokensieve import register\n"
        "from tokensieve.methods import Method\n\n\n"
        "@register('mine-of-the-page', paper='none')\n@dataclass(frozen=True)\nclass Mine(Method):\n"
        "    '''Keep the first tokens.'''\n\n    keep: int = 4\n\n    def reduce(self, image):\n"
        "        return image.keep(__import__('torch').arange(image.budget).expand(len(image.features), -1))\n"
    )
    bench = Workbench("reference", *reference.load(), [f"{file}:Mine"])
    _, row = bench.rows(request(scenes[0], (f"{file}:Mine(keep=3)",)))
    assert row.decision is not None
    assert row.decision.kept.tolist() == [0, 1, 2]


def test_texts_of_users_and_models_are_no_html() -> None:
    row = Row("<b>name</b>", answer="<script>alert(1)</script>")
    assert "<script>" not in cards.card(row)
    assert "<b>name" not in cards.card(row)
    assert "<i>" not in cards.message("<i>")
    assert 'srcdoc="&lt;p class=&quot;x&quot;&gt;"' in cards.frame('<p class="x">')


def test_visitors_do_not_mix(bench: Workbench, scenes: list[Example]) -> None:
    wanted = [request(example, (METHODS[number % 4],), keep=9 + number) for number, example in enumerate(scenes)]

    def outcome(asked: Request) -> list[tuple[str, Any]]:
        return [(row.answer, row.decision and row.decision.to_json()) for row in bench.rows(asked)]

    alone = [outcome(asked) for asked in wanted]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(outcome, wanted, timeout=120)) == alone


def test_a_model_that_chooses_among_answers(scenes: list[Example]) -> None:
    bench = Workbench("pumer-reference", *reference.load("pumer-reference"))
    asked = request(scenes[0], ("pumer(layers=(1, 2))",), rounds=1)
    full, reduced = bench.costs(asked, list(bench.rows(asked)))
    assert full.answer
    assert reduced.decision is not None
    assert reduced.decision.slots < reduced.decision.total
    assert reduced.cost is not None


def test_a_model_of_another_family() -> None:
    bench = Workbench("tiny", tiny_model("qwen2-vl"), tiny_processor("qwen2-vl"))
    photo = partial(Image.radial_gradient, "L")
    full, row = bench.rows(Request(photo, "what is this ?", ("trsm",), 2, rounds=0))
    assert full.decision is not None
    assert row.decision is not None
    assert (full.decision.slots, row.decision.slots) == (full.decision.total, 2)
    assert torch.is_inference_mode_enabled() is False
