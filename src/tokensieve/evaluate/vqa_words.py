"""The normalisation of answers in the official evaluation of VQA, TextVQA and VizWiz (EvalAI)."""

from __future__ import annotations

import re

ARTICLES = {"a", "an", "the"}
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)}
_DIGITS_OF_VQA = {"none": "0"} | DIGITS
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_MOST_FULL_STOPS = 32  # the official call passes a flag (re.UNICODE, 32) where the number of replacements stands

# A contraction is found with one of its apostrophes left out. "she's" and "let's" are not completed officially.
_LIST = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_COMPLETED = {
    contraction[:place] + contraction[place + 1 :]: contraction
    for contraction in _LIST.split()
    for place, character in enumerate(contraction)
    if character == "'"
} | {"somebody'd": "somebodyd"}  # the other way round in the official list


def vqa_words(text: str) -> str:
    """Return lower case without articles and punctuation, with digits for number words and completed contractions.

    The quirks of the official code are kept: a comma or question mark leaves at once, "'s" stands alone, another mark
    becomes a space unless it stands beside one, and a full stop leaves unless a digit follows.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    beside_space = {mark for mark in _PUNCTUATION if f"{mark} " in text or f" {mark}" in text}
    text = "".join(
        ("" if character in beside_space else " ") if character in _PUNCTUATION else character for character in text
    )
    text = re.sub(r"\.(?!\d)", "", text, count=_MOST_FULL_STOPS)
    words = [_DIGITS_OF_VQA.get(word, word) for word in text.split()]
    return " ".join(_COMPLETED.get(word, word) for word in words if word not in ARTICLES)
