"""Successive halving and the order of the finalists, on answers that are given."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tokensieve import Refusal
from tokensieve.evaluate import Sample
from tokensieve.evaluate.journal import Answer
from tokensieve.evaluate.table import clusters
from tokensieve.measure import Spread
from tokensieve.tune.race import FINALISTS, Race, Standing, finalists, rounds
from tokensieve.tune.search import split
from tokensieve.tune.space import space
from tokensieve.tune.steps import Search

CANDIDATES = space(["divprune", "vtc-cls"], [0.5, 0.33, 0.25, 0.16, 0.11], trials=10)


def questions(images: int, each: int) -> list[list[Sample]]:
    return [
        [Sample(f"{image}-{number}", f"{image}.png", "?", ("yes",)) for number in range(each)]
        for image in range(images)
    ]


class GivenAnswers:
    """Answers with fixed chances, and what was asked."""

    def __init__(self, chances: dict[str, float]) -> None:
        self.chances, self.asked = chances, []

    def ask(self, candidate, block):
        if candidate is not None and self.chances.get(candidate.run.key) is None:
            raise Refusal("no such token")
        self.asked.append((None if candidate is None else candidate.run.key, len(block)))

    def scores(self, candidate, samples):
        if candidate is None:
            return np.ones(len(samples))
        right = self.chances[candidate.run.key]
        return np.array([hash_share(sample.id) < right for sample in samples], float)


def hash_share(name: str) -> float:
    """Return a fixed number in 0 … 1 for a name, so that a worse configuration loses more of the same questions."""
    return int.from_bytes(np.random.default_rng([ord(c) for c in name]).bytes(4), "big") / 2**32


def test_blocks_hold_whole_images_and_double_the_questions():
    images = questions(60, 7)
    blocks = rounds(images, 24)
    assert [sample for block in blocks for sample in block] == [sample for image in images for sample in image]
    assert all(len(block) % 7 == 0 for block in blocks)
    ends = np.cumsum([len(block) for block in blocks])
    assert len(blocks) == 4  # 24, 12, 6 and 3 configurations
    assert np.allclose(ends[1:] / ends[:-1], 2, atol=0.3)
    assert len(rounds(images, 3)) == 1
    assert [len(block) for block in rounds(questions(5, 1), 100)] == [5]


def test_the_race_ends_with_the_cheapest_good_configuration_at_a_fraction_of_the_answers():
    costs = {candidate.run.key: 0.4 + 0.05 * number for number, candidate in enumerate(CANDIDATES)}
    chances = {key: 0.999 if cost >= 0.6 else 0.7 for key, cost in costs.items()}
    asker, blocks = GivenAnswers(chances), rounds(questions(800, 1), len(CANDIDATES))
    standings = Race(asker, costs, 1200, 0.02).run(CANDIDATES, blocks)
    assert costs[standings[0].candidate.run.key] == pytest.approx(0.6)
    assert FINALISTS <= len(standings) < len(CANDIDATES)
    halved = sum(count for _, count in asker.asked)
    exhaustive = GivenAnswers(chances)
    Race(exhaustive, costs, 1200, 0.02, halve=False).run(CANDIDATES, blocks)
    assert sum(count for _, count in exhaustive.asked) == 800 * (len(CANDIDATES) + 1)
    assert halved < 0.7 * 800 * (len(CANDIDATES) + 1)


def test_a_method_that_refuses_a_question_leaves_and_its_reason_is_kept():
    costs = {candidate.run.key: 0.5 for candidate in CANDIDATES}
    chances = {candidate.run.key: 1.0 for candidate in CANDIDATES[1:]}
    race = Race(GivenAnswers(chances), costs, 1000, 0.02)
    standings = race.run(CANDIDATES, rounds(questions(100, 1), len(CANDIDATES)))
    assert CANDIDATES[0] not in [standing.candidate for standing in standings]
    assert race.failed == {CANDIDATES[0].run.key: "no such token"}


class HeldOutAnswers(GivenAnswers):
    """The parts of an asker that the held-out questions need."""

    def __init__(self, chances: dict[str, float], samples: list[Sample]) -> None:
        super().__init__(chances)
        self.keys = {sample.id: sample.id for sample in samples}
        self.journal = SimpleNamespace(skipped={}, answers={})

    def answers(self, candidate):
        return {key: Answer(key, "yes", 144, 72, 72.0) for key in self.keys}


@pytest.mark.parametrize("refusing", [1, 3])
def test_a_finalist_that_refuses_a_held_out_question_leaves_the_others(refusing, monkeypatch):
    samples = [sample for image in questions(400, 1) for sample in image]
    costs = {candidate.run.key: 0.8 - 0.1 * number for number, candidate in enumerate(CANDIDATES[:3])}
    tested = [Standing(candidate, costs[candidate.run.key], 0.9, 0.0) for candidate in CANDIDATES[:3]]
    search = Search(
        HeldOutAnswers(dict.fromkeys(list(costs)[refusing:], 1.0), samples), 0.02, None, None, "flops", 0, None
    )
    search.flops = costs
    search.facts |= {"candidates": 3, "refused": {}, "search_questions": 200, "held_out_questions": 400}
    cost = SimpleNamespace(prefill_speedup=Spread(1.2, 1.1, 1.3))
    monkeypatch.setattr(search, "_times", lambda *arguments: dict.fromkeys(costs, cost))
    if refusing == 3:
        with pytest.raises(Refusal, match="each remaining configuration refuses a held-out question; no such token"):
            search._judge(tested, samples, samples)
        return
    result = search._judge(tested, samples, samples)
    assert (result.verdict, result.chosen.flops) == ("use", min(costs.values()))
    assert [finalist.spec for finalist in result.tested] == [str(candidate) for candidate in CANDIDATES[1:3]]
    assert result.refused == {CANDIDATES[0].run.key: "no such token"}


def test_finalists_run_from_the_safest_to_the_cheapest():
    rows = [(0.9, 0.99), (0.7, 0.9), (0.6, 0.5), (0.5, 0.1), (0.8, 0.3)]
    standings = [Standing(c, *row, 0.0) for c, row in zip(CANDIDATES, rows, strict=False)]
    chain = [(standing.cost, standing.chance) for standing in finalists(standings)]
    assert chain == [(0.9, 0.99), (0.7, 0.9), (0.6, 0.5)]
    assert finalists([]) == []
    assert len(finalists(standings[:1])) == 1


def test_no_image_is_in_both_parts_and_the_seed_decides():
    samples = [sample for image in questions(30, 7) for sample in image]
    held_out, searched = split(samples, seed=3)
    names = [{sample.image for image in part for sample in image} for part in (held_out, searched)]
    assert names[0].isdisjoint(names[1])
    assert sum(map(len, held_out)) + sum(map(len, searched)) == len(samples)
    assert sum(map(len, searched)) == pytest.approx(0.4 * len(samples), abs=7)
    assert split(samples, seed=3) == (held_out, searched)
    assert split(samples, seed=4) != (held_out, searched)
    assert [len(part) for part in split(samples[:9], seed=0)] == [1, 1]


def test_one_image_is_refused():
    with pytest.raises(Refusal, match="at least two images, one of them held out; got 7 questions about 1"):
        split(questions(1, 7)[0], seed=0)


def test_no_image_is_searched_and_held_out_also_where_questions_share_several():
    alone = [Sample(f"{i}", f"{i}.png", "?", ("yes",)) for i in range(40)]
    pairs = [Sample(f"{i} {i + 1}", (f"{i}.png", f"{i + 1}.png"), "?", ("yes",)) for i in range(0, 40, 2)]
    for seed in range(5):
        parts = [
            {picture for image in part for sample in image for picture in sample.images}
            for part in split([*alone, *pairs], seed)
        ]
        assert len(parts[0] | parts[1]) == 40
        assert not parts[0] & parts[1]
    with pytest.raises(Refusal, match="3 questions about 1; images that questions show together count as one"):
        split([*alone[:2], pairs[0]], seed=0)


def test_files_with_equal_content_are_one_image(tmp_path):
    for number in range(8):
        Image.new("RGB", (8, 8), (30 * (number // 2), 0, 0)).save(tmp_path / f"{number}.png")
    samples = [Sample(str(number), tmp_path / f"{number}.png", "?", ("yes",)) for number in range(8)]
    assert clusters(samples).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    held_out, searched = split(samples, seed=0)
    assert {len(image) for image in [*held_out, *searched]} == {2}
