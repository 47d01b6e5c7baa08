"""Metrics and totals against vectors that the authors' scripts made, and the rule of the verdict."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tokensieve.errors import DataError
from tokensieve.evaluate import METRICS, Question, YesNo
from tokensieve.evaluate.intervals import interval
from tokensieve.evaluate.metrics import read_mmbench, read_scienceqa, says_yes
from tokensieve.evaluate.vqa_words import vqa_words
from tokensieve.reproduce import BENCHMARKS, Published
from tokensieve.reproduce.recipes import COGNITION, PERCEPTION
from tokensieve.reproduce.totals import units
from tokensieve.reproduce.verdict import judge

OFFICIAL = json.loads(Path(__file__).with_name("official.json").read_text("utf-8"))


def test_vqa_normalisation_is_the_official_one():
    assert len(OFFICIAL["vqa_words"]) > 150
    assert [(text, vqa_words(text)) for text, _ in OFFICIAL["vqa_words"]] == [
        tuple(pair) for pair in OFFICIAL["vqa_words"]
    ]


def test_vqa_accuracy_is_the_official_one():
    for prediction, answers, score in OFFICIAL["vqa"]:
        assert METRICS["vqa"](prediction, answers) == pytest.approx(score), (prediction, answers)


@pytest.mark.parametrize(("metric", "name"), [("gqa", "gqa")])
def test_gqa_is_scored_as_in_llava(metric, name):
    for prediction, answer, score in OFFICIAL[name]:
        assert METRICS[metric](prediction, [answer]) == score, (prediction, answer)


def test_letters_are_read_as_officially():
    for text, letter in OFFICIAL["sqa"]:
        assert (read_scienceqa(text) or "FAILED") == letter, text
    for text, letter in OFFICIAL["mmbench"]:
        assert read_mmbench(text) == letter, text
    assert METRICS["letter"]("B", ["B"]) == 1
    assert METRICS["letter"]("B.", ["B"]) == 0


def test_mme_reads_the_first_four_characters():
    for text, label in OFFICIAL["prefix"]:
        scores = {name: METRICS["yes_no_prefix"](text, [name]) for name in ("yes", "no")}
        assert scores == {"yes": float(label == "yes"), "no": float(label == "no")}, text


def question(number, type="", positive=None, cluster=None):
    return Question(str(number), type, number if cluster is None else cluster, positive)


@pytest.mark.parametrize("run", range(len(OFFICIAL["pope"])))
def test_pope_is_the_official_f1(run):
    made = OFFICIAL["pope"][run]
    answers, labels = made["answers"], made["labels"]
    assert [("yes" if says_yes(text) else "no") for text in answers] == made["read"]
    scores = np.array([[METRICS["yes_no"](text, [label]) for text, label in zip(answers, labels, strict=True)]])
    assert scores.mean() == pytest.approx(made["accuracy"])
    questions = [question(i, "random", label == "yes") for i, label in enumerate(labels)]
    values, clusters = units("f1", scores, questions, {})
    assert values.mean() == pytest.approx(made["f1"])
    # the same interval as that of compare's F1
    expected = YesNo.of(scores, np.array([label == "yes" for label in labels]), clusters)
    assert interval(values, clusters) == pytest.approx((expected.f1_low, expected.f1_high), abs=0.02)


def test_pope_averages_its_three_parts():
    runs = OFFICIAL["pope"][:3]
    questions, scores = [], []
    for part, made in enumerate(runs):
        for text, label in zip(made["answers"], made["labels"], strict=True):
            questions.append(question(len(questions), f"part {part}", label == "yes"))
            scores.append(METRICS["yes_no"](text, [label]))
    values, _ = units("f1", np.array([scores]), questions, {})
    assert values.mean() == pytest.approx(np.mean([made["f1"] for made in runs]))


@pytest.mark.parametrize(("kind", "categories"), [("perception", PERCEPTION), ("cognition", COGNITION)])
def test_mme_is_the_official_sum(kind, categories):
    rows = [row for row in OFFICIAL["mme"]["rows"] if row["category"] in categories]
    scores = np.array([[METRICS["yes_no_prefix"](row["text"], [row["answer"]]) for row in rows]])
    questions = [question(i, row["category"], cluster=i // 2) for i, row in enumerate(rows)]
    values, clusters = units("pairs", scores, questions, {str(i): row["question_id"] for i, row in enumerate(rows)})
    present = len({row["category"] for row in rows})
    assert 200 * present * values.mean() == pytest.approx(OFFICIAL["mme"][kind])
    assert len(clusters) == len(rows) // 2
    assert BENCHMARKS["mme"].scale == 200 * len(PERCEPTION)
    assert BENCHMARKS["mme-total"].scale == 200 * len(PERCEPTION + COGNITION)


def test_a_single_question_of_mme_is_refused():
    with pytest.raises(DataError, match="two questions about each image; 'a' has 1"):
        units("pairs", np.ones((1, 1)), [question(0, "OCR")], {"0": "a"})


def test_mmbench_counts_questions_that_are_right_in_every_rotation():
    rows = OFFICIAL["circular"]["rows"]
    scores = np.array([[METRICS["mmbench"](prediction, [answer]) for _, answer, prediction in rows]])
    questions = [question(i, cluster=index % 1_000_000) for i, (index, _, _) in enumerate(rows)]
    values, clusters = units("circular", scores, questions, {str(i): str(row[0]) for i, row in enumerate(rows)})
    assert values.mean() == pytest.approx(OFFICIAL["circular"]["accuracy"])
    assert scores.mean() > values.mean()
    assert len(clusters) == len({row[0] % 1_000_000 for row in rows})


def test_the_interval_of_f1_covers_the_truth():
    rng, inside, draws = np.random.default_rng(0), 0, 400
    for _ in range(draws):
        positive = np.repeat([True, False], 75)
        right = rng.random(150) < np.where(positive, 0.8, 0.9)
        questions = [question(i, ("a", "b", "c")[i % 3], bool(label)) for i, label in enumerate(positive)]
        values, clusters = units("f1", right[None].astype(float), questions, {})
        low, high = interval(values, clusters)
        inside += low <= 2 * 0.8 / (0.8 + 0.1 + 1) <= high
    assert 0.92 <= inside / draws <= 0.99


@pytest.mark.parametrize(
    ("published", "interval_of_ours", "obstacles", "answer"),
    [
        (78.8, (79.0, 78.0, 80.0), [], "reproduced"),
        (78.8, (77.0, 76.0, 78.0), [], "not reproduced"),
        (78.8, (75.0, 65.0, 85.0), [], "cannot tell"),  # half a width of 10 is more than 5 % of 78.8
        (78.8, (50.0, 35.0, 65.0), [], "not reproduced"),  # outside, however wide
        (78.8, (79.0, 78.0, 80.0), ["another model"], "cannot tell"),
        (1510.7, (1500.0, 1430.0, 1570.0), [], "reproduced"),
    ],
)
def test_the_rule_of_the_verdict(published, interval_of_ours, obstacles, answer):
    verdict = judge(published, *interval_of_ours, obstacles)
    assert verdict.answer == answer
    assert bool(verdict.reason) == (answer != "reproduced")


def test_rounding_of_the_printed_number_is_no_difference():
    assert judge(60.0, 60.6, 60.04, 61.2, rounding=0.05).answer == "reproduced"
    assert judge(60.0, 60.6, 60.06, 61.2, rounding=0.05).answer == "not reproduced"
    row = Published("llava-1.5-7b", "pope", "vtc-cls", 64, 78.8, 85.9, None, "", "")
    assert row.rounding == 0.05
    exact = [100 * value / full for value in (78.75, 78.85) for full in (85.85, 85.95)]
    printed = 100 * 78.8 / 85.9
    assert max(abs(share - printed) for share in exact) == pytest.approx(row.relative_rounding, rel=0.01)
    mme = replace(row, benchmark="mme-total", value=1343, full=1862)
    assert mme.rounding == 0.5
    assert replace(mme, value=1510.7).rounding == 0.05
    assert replace(mme, full=None).relative_rounding == 0
