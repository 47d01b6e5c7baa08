"""Metrics: the score of an answer, 0 … 1."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

from tokensieve.errors import DataError
from tokensieve.evaluate.data import LETTERS, Sample
from tokensieve.evaluate.vqa_words import ARTICLES, DIGITS, vqa_words

Metric = Callable[[str, Sequence[str]], float]
"""(prediction, accepted answers) -> 0 … 1."""


def exact(prediction: str, answers: Sequence[str]) -> float:
    """Return 1 if the prediction equals an answer, after :func:`normalise`."""
    return float(normalise(prediction) in {normalise(answer) for answer in answers})


def contains(prediction: str, answers: Sequence[str]) -> float:
    """Return 1 if an answer occurs in the prediction as whole words, after :func:`normalise`."""
    text = normalise(prediction)
    matches = (re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text) for answer in map(normalise, answers) if answer)
    return float(any(matches))


def vqa(prediction: str, answers: Sequence[str]) -> float:
    """Return VQA accuracy: min(1, agreeing annotators / 3), averaged over leaving out each annotator in turn.

    Texts are normalised as in the official evaluation (:func:`~tokensieve.evaluate.vqa_words.vqa_words`). With n < 4
    annotators the divisor is n - 1; with one this is :func:`exact`.
    """
    if len(answers) == 1:
        return exact(prediction, answers)
    text = vqa_words(prediction)
    agrees = [text == vqa_words(answer) for answer in answers]
    needed = min(3, len(answers) - 1)
    return sum(min(1.0, (sum(agrees) - left_out) / needed) for left_out in agrees) / len(agrees)


def anls(prediction: str, answers: Sequence[str]) -> float:
    """Return the normalised Levenshtein similarity to the nearest answer, or 0 if it is below 0.5.

    The similarity of two texts is 1 - edits / length of the longer one, with small letters and single spaces. This is
    ANLS of DocVQA and ST-VQA (Biten et al. 2019, arXiv:1907.00490); as in the official script, 0.5 itself counts.
    """
    similarity = max(_similarity(_plain(prediction), _plain(answer)) for answer in answers)
    return similarity if similarity >= 0.5 else 0.0


def relaxed(prediction: str, answers: Sequence[str]) -> float:
    """Return 1 if the prediction is a number within 5 % of an answer, or the same text.

    This is relaxed accuracy of ChartQA (Masry et al. 2022, arXiv:2203.10244), with the reading of numbers of its
    public scripts: "12%" is 0.12, and an answer of 0 must be met as text. Case and a final full stop are ignored.
    """
    return float(any(_within(_plain(prediction).rstrip("."), _plain(answer).rstrip(".")) for answer in answers))


def choice(prediction: str, answers: Sequence[str]) -> float:
    """Return 1 if the prediction names the letter of the right option, or is its text.

    The letter is read from "B", "(b)", "B. a red ball", "Answer: B" or "The answer is (B)", or where only one letter
    stands in brackets or alone as a capital. A prediction without a letter is compared as text. The answers are the
    letter, the text, or both; for data with choices, :func:`accepted_answers` returns both.
    """
    letters = {answer.strip("().: ").upper() for answer in answers if len(answer.strip("().: ")) == 1}
    letter, text = read_choice(prediction)
    if letter and letters and _plain(prediction) not in map(_plain, answers):  # "Vitamin C" may be a text
        return float(letter in letters)
    return max(exact(prediction, answers), exact(text, answers))


def yes_no(prediction: str, answers: Sequence[str]) -> float:
    """Return 1 if the prediction says yes or no as the answer does.

    As in the official evaluation of POPE (Li et al. 2023, arXiv:2305.10355), the first sentence decides: with "no" or
    "not" among its words it is a no, without them a yes, whatever else it says. Precision, recall, F1 and the share of
    yes are in :class:`~tokensieve.evaluate.YesNo`.
    """
    return float(any(says_yes(prediction) == says_yes(answer) for answer in answers))


def yes_no_prefix(prediction: str, answers: Sequence[str]) -> float:
    """Return 1 if "yes" or "no" among the first four characters is the answer, as in the official evaluation of MME.

    A prediction with neither is wrong (Fu et al. 2023, arXiv:2306.13394).
    """
    return float(any(_yes_no_prefix(prediction) == _yes_no_prefix(answer) for answer in answers))


def gqa(prediction: str, answers: Sequence[str]) -> float:
    """Return 1 if the prediction equals an answer but for case and full stops at its end, as LLaVA is scored on GQA."""
    return float(prediction.rstrip(".").lower() in {answer.rstrip(".").lower() for answer in answers})


def letter(prediction: str, answers: Sequence[str]) -> float:
    """Return 1 if the prediction is an answer, to the letter, as LLaVA is scored on SEED-Bench: "B." is wrong."""
    return float(prediction in answers)


def scienceqa(prediction: str, answers: Sequence[str]) -> float:
    """Return 1 for the letter of the answer, read from "B", "B. text" or "The answer is B." only.

    This is the reading of LLaVA's evaluation on ScienceQA (Lu et al. 2022, arXiv:2209.09513).
    """
    return float(prediction in answers or read_scienceqa(prediction) in answers)


def mmbench(prediction: str, answers: Sequence[str]) -> float:
    """Return 1 for the letter of the answer, read by the rules of MMBench's evaluation (arXiv:2307.06281).

    One letter A to E stands alone, before a punctuation mark, or in brackets. The official evaluation lets a language
    model read predictions without a letter; here they are wrong.
    """
    return float(prediction in answers or read_mmbench(prediction) in answers)


_ALL = (exact, contains, vqa, anls, relaxed, choice, yes_no, yes_no_prefix, gqa, letter, scienceqa, mmbench)
METRICS: dict[str, Metric] = {function.__name__: function for function in _ALL}


# -- parts of the metrics -------------------------------------------------------------------------------------------


def normalise(text: str) -> str:
    """Return lower case, single spaces, no articles, no punctuation around words, number words up to ten as digits.

    A text of articles only stays as it is: "A" may name a choice.
    """
    words = [word.strip(".,;:!?\"'`()[]{}") for word in text.lower().split()]
    kept = [word for word in words if word not in ARTICLES] if set(words) - ARTICLES else words
    return " ".join(DIGITS.get(word, word) for word in kept if word)


def answers_for(metric: Metric, sample: Sample) -> tuple[str, ...]:
    """Return the answers that a metric compares a prediction with: for ``choice`` the letters as well."""
    return accepted_answers(sample) if metric is choice else sample.answers


def accepted_answers(sample: Sample) -> tuple[str, ...]:
    """Return the answers of a sample; with choices, the letter and the text of each right option."""
    answers = list(sample.answers)
    for letter, option in zip(LETTERS, sample.choices, strict=False):
        # an option's text decides before its letter: "A" may be the text of option C
        if option in sample.answers or (letter in sample.answers and letter not in sample.choices):
            answers += [letter, option]
    return tuple(dict.fromkeys(answers))


def check_answers(metric: str, samples: Sequence[Sample]) -> None:
    """Refuse right answers that the metric cannot read: every text without a no would be a yes for ``yes_no``."""
    for sample in samples if metric in ("yes_no", "yes_no_prefix") else ():
        for answer in sample.answers:
            if says_yes(answer) and "yes" not in normalise(answer).split():
                place = sample.where or f"the sample {sample.id!r}"
                raise DataError(f"{place}: the metric {metric} needs the answer yes or no; got {answer!r}")


def says_yes(text: str) -> bool:
    """Return False if the first sentence contains "no" or "not"."""
    return not {"no", "not"} & set(re.findall(r"[\w']+", text.split(".")[0].lower()))


def _yes_no_prefix(text: str) -> str:
    text = text.lower().strip().replace(".", "")
    if len(text) == 1:
        return {"y": "yes", "n": "no"}.get(text, "")
    return next((word for word in ("yes", "no") if word in text[:4]), "")


def read_scienceqa(prediction: str) -> str:
    """Return the letter A to E that a prediction names, or ""."""
    if re.fullmatch("[A-E]", prediction) or re.match(r"[A-E]\. ", prediction):
        return prediction[0]
    named = re.findall(r"The answer is ([A-Z]).", prediction)
    return named[0] if len(named) == 1 else ""


def read_mmbench(prediction: str) -> str:
    """Return the letter A to E that a prediction names, or ""."""
    words = prediction.split()
    for before, after in _AROUND_A_LETTER:
        named = [character for character in "ABCDE" if f"{before}{character}{after}" in words]
        # in a longer text, "A" alone is an article, and no other letter alone is read either
        if len(named) == 1 and not (before == after == "" and "A" in words and len(words) > 3):
            return named[0]
    return ""


def read_choice(prediction: str) -> tuple[str, str]:
    """Return the letter that a prediction names, a capital or "", and the text after it."""
    for pattern in _CHOICES:
        if match := pattern.match(prediction):
            return next(filter(None, match.groups())).upper(), prediction[match.end() :]
    for single in (r"\(([A-Za-z])\)", r"(?<![\w'])([B-HJ-Z])(?![\w'])"):  # "A" and "I" alone are words
        if len(letters := set(re.findall(single, prediction))) == 1:
            return letters.pop().upper(), ""
    return "", prediction


# what stands before and after a letter, in the order of the official rules
_AROUND_A_LETTER = [("", ""), ("", "."), ("", ","), ("", ":"), ("", ")"), ("", ").")]
_AROUND_A_LETTER += [("(", ")"), ("(", ")."), (":", ""), (":", ","), (":", "."), (":", ")"), (":", ").")]

_CHOICES = [
    re.compile(pattern)
    for pattern in (
        r"\s*[(\[]?([A-Za-z])[)\].:,]*\s*$",  # B    (b)    B.
        r"\s*[(\[]([A-Za-z])[)\]]",  # (B) a red ball
        r"\s*([A-Za-z])[).:]\s",  # B. a red ball
        # Answer: B    The answer is (B).    Option b    but not: the answer is a ball
        r"(?:.*\W)?(?i:answer|option|choice)(?:\s+is)?\s*:?\s*[(\[]?(?:([A-Z])(?![\w'])|([a-z])(?=[)\].]|\s*$))",
    )
]


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _similarity(text: str, other: str) -> float:
    longer = max(len(text), len(other))
    return 1 - _edits(text, other) / longer if longer else 1.0


def _edits(text: str, other: str) -> int:
    """Return the Levenshtein distance: insertions, deletions and replacements of characters."""
    row = list(range(len(other) + 1))  # edits from the part of `text` before `i` to each beginning of `other`
    for i, character in enumerate(text, 1):
        diagonal, row[0] = row[0], i
        for j, target in enumerate(other, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (character != target))
    return row[-1]


def _within(text: str, answer: str) -> bool:
    number, target = _number(text), _number(answer)
    if number is None or not target:
        return text == answer
    return abs(number - target) <= 0.05 * abs(target)


def _number(text: str) -> float | None:
    try:
        number = float(text.rstrip("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
