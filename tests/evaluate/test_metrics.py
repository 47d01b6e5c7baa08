"""Metrics against values computed by hand or published."""

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokensieve.evaluate import METRICS, Sample
from tokensieve.evaluate.metrics import _edits as edits
from tokensieve.evaluate.metrics import accepted_answers, normalise, read_choice


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Red cup.", "red cup"),
        ("Three", "3"),
        ("top-left", "top-left"),
        ("A", "a"),  # a choice, not an article
        ("it's 2.5!", "it's 2.5"),
        ("...", ""),
    ],
)
def test_normalise(text, normal):
    assert normalise(text) == normal


def test_exact():
    assert METRICS["exact"]("A red cup.", ["mug", "red cup"]) == 1
    assert METRICS["exact"]("red", ["red cup"]) == 0


def test_contains_matches_whole_words():
    assert METRICS["contains"]("It is the red cup, I think", ["Red cup"]) == 1
    assert METRICS["contains"]("hundred", ["red"]) == 0
    assert METRICS["contains"]("anything", ["..."]) == 0


@pytest.mark.parametrize(("agreeing", "accuracy"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_vqa_of_ten_annotators(agreeing, accuracy):
    # the values of the official evaluation: leave one annotator out, min(1, agreeing / 3), average
    answers = ["cup"] * agreeing + [f"other {i}" for i in range(10 - agreeing)]
    assert METRICS["vqa"]("Cup", answers) == pytest.approx(accuracy)


def test_vqa_of_few_annotators():
    assert METRICS["vqa"]("cup", ["cup"]) == 1
    assert METRICS["vqa"]("cup", ["mug"]) == 0
    assert METRICS["vqa"]("cup", ["cup", "mug"]) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        # DocVQA's own example of the metric: an answer that differs by reading errors counts in part
        ("kitten", ["sitting"], 1 - 3 / 7),
        ("Aple Inc", ["Apple Inc."], 1 - 2 / 10),
        ("  New   YORK ", ["new york"], 1),
        ("ab", ["ac"], 0.5),  # the official script drops what is below the threshold, not what meets it
        ("abc", ["axy"], 0),
        ("12", ["1900", "12.0", "dozen"], 0.5),  # the nearest answer
        ("", ["red"], 0),
        ("", [""], 1),
    ],
)
def test_anls(prediction, answers, score):
    assert METRICS["anls"](prediction, answers) == pytest.approx(score)


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        ("95", "100", 1),
        ("105", "100", 1),
        ("94.9", "100", 0),
        ("105.1", "100", 0),
        ("-95", "-100", 1),
        ("95", "-100", 0),
        ("12%", "0.12", 1),
        ("12%", "12", 0),
        ("12.5%", "12%", 1),
        ("0", "0", 1),
        ("0.01", "0", 0),
        ("Yes.", "yes", 1),
        ("light blue", "blue", 0),
        ("2019", "2010", 1),  # years are numbers to ChartQA's metric
        ("nan", "nan", 1),
        ("inf", "3", 0),
    ],
)
def test_relaxed(prediction, answer, score):
    assert METRICS["relaxed"](prediction, [answer]) == score


@pytest.mark.parametrize(
    ("prediction", "letter"),
    [
        ("B", "B"), ("b", "B"), ("(b)", "B"), ("B.", "B"), ("[B]", "B"), ("B. a red ball", "B"),
        ("B) a red ball", "B"), ("(B) a red ball", "B"), ("Answer: B", "B"), ("Answer: B.", "B"), ("answer: (b)", "B"),
        ("The answer is B.", "B"),
        ("The correct answer is (C) because A is blue.", "C"), ("Option d", "D"), ("I think it is B", "B"),
        ("A", "A"), ("A red ball", ""), ("The answer is a ball", ""), ("I do not know", ""), ("either B or C", ""),
        ("red", ""), ("", ""), ("Choice: A\nThe ball is red", "A"),
    ],
)  # fmt: skip
def test_the_letter_of_a_choice(prediction, letter):
    assert read_choice(prediction)[0] == letter


def test_choice_takes_the_letter_or_the_text():
    score = METRICS["choice"]
    assert score("B. a red ball", ["B"]) == 1
    assert score("A. a red ball", ["B", "a red ball"]) == 0, "the letter decides"
    assert score("A red ball.", ["B", "a red ball"]) == 1
    assert score("(C) a red ball", ["a red ball"]) == 1, "no letter is known"
    assert score("Vitamin C", ["D", "vitamin C"]) == 1
    assert score("a blue ball", ["B", "a red ball"]) == 0


def test_choices_of_the_data_give_letter_and_text():
    def accepted(*answers):
        sample = Sample("1", Path("1.png"), "which?", answers, choices=("a blue ball", "a red ball", "B"))
        return accepted_answers(sample)

    assert accepted("a red ball") == ("a red ball", "B")
    assert accepted("A") == ("A", "a blue ball")
    assert accepted("B") == ("B", "C"), "B is the text of an option"
    assert accepted("none") == ("none",)


@pytest.mark.parametrize(
    ("prediction", "says"),
    [("Yes", "yes"), ("yes, there is a dog", "yes"), ("No", "no"), ("NO.", "no"), ("There is no dog.", "no"),
     ("It is not.", "no"), ("Yes. There is no cat.", "yes"), ("Nothing", "yes"), ("three", "yes")],
)  # fmt: skip
def test_yes_no_follows_the_evaluation_of_pope(prediction, says):
    assert METRICS["yes_no"](prediction, [says]) == 1
    assert METRICS["yes_no"](prediction, [{"yes": "no", "no": "yes"}[says]]) == 0


TEXTS = st.text(st.sampled_from("abcABC 12.5%()-yesno"), min_size=1, max_size=12).filter(str.strip)


@pytest.mark.parametrize("name", METRICS)
@given(prediction=TEXTS, answers=st.lists(TEXTS, min_size=1, max_size=4), data=st.data())
def test_every_metric_is_bounded_and_ignores_the_order_of_answers(name, prediction, answers, data):
    metric = METRICS[name]
    score = metric(prediction, answers)
    assert 0 <= score <= 1
    assert math.isclose(metric(prediction, data.draw(st.permutations(answers))), score)
    if name != "vqa":  # there a further annotator may disagree
        assert metric(prediction, [*answers, data.draw(TEXTS)]) >= score or name == "choice"


@pytest.mark.parametrize("name", METRICS)
@given(
    answer=st.text(st.sampled_from("abcABC 12.5"), min_size=1, max_size=12).filter(lambda text: normalise(text) != "")
)
def test_every_metric_accepts_the_answer_itself(name, answer):
    assert METRICS[name](answer, [answer]) == 1


@given(text=TEXTS, other=TEXTS, third=TEXTS)
def test_the_edit_distance_is_a_distance(text, other, third):
    assert (edits(text, other) == 0) == (text == other)
    assert edits(text, other) == edits(other, text) <= max(len(text), len(other))
    assert edits(text, third) <= edits(text, other) + edits(other, third)


def test_the_help_and_the_page_name_every_metric():
    import inspect

    from tokensieve.commands.compare import compare

    option = inspect.signature(compare, eval_str=True).parameters["metric"].annotation.__metadata__[0].help
    page = (Path(__file__).parents[2] / "docs" / "comparing.md").read_text("utf-8")
    for name in METRICS:
        assert f" {name} (" in option
        assert f"| `{name}` |" in page
