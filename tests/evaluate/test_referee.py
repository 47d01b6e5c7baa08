"""The referee: tests, corrections, groups and guards on hand-made scores; the blind row and moved images on a model."""

import json
from dataclasses import replace
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.report.report_rows import Draft, results, row
from tokensieve.evaluate import Results, compare, decode
from tokensieve.evaluate.blind import encode_texts, refusal
from tokensieve.evaluate.referee import (
    chance_overlap,
    exact_p,
    guarded_types,
    holm,
    jaccard,
    referee,
    similar,
)
from tokensieve.evaluate.stability import moved, pixels

BINARY = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=60)


def binomial_p(gained, lost):
    """McNemar's exact test in closed form: the two-sided binomial test of the discordant pairs."""
    n, extreme = gained + lost, max(gained, lost)
    return min(1.0, 2 * sum(comb(n, k) for k in range(extreme, n + 1)) / 2**n)


def examined(*drafts: Draft, **options) -> Results:
    return referee(results(drafts, **options))


def scored(method: str, keep, right, **changes) -> Draft:
    """A row that answers these questions right, of 0 … len(right) - 1."""
    draft = row(method, keep, sum(right) / len(right), samples=len(right), **changes)
    return replace(draft, scores=(tuple(map(float, right)),))


# -- pure functions -------------------------------------------------------------------------------------------------


@given(BINARY)
def test_mcnemar_is_the_binomial_test_of_the_pairs_that_differ(pairs):
    mine, other = np.array(pairs, dtype=float).T
    gained, lost = int((mine > other).sum()), int((mine < other).sum())
    alone = np.arange(len(pairs))
    p = exact_p(mine[None], other[None], alone)
    assert p == pytest.approx(binomial_p(gained, lost))
    assert exact_p(other[None], mine[None], alone) == pytest.approx(p)


def test_seeds_are_joined_by_ruegers_rule():
    """Five p-values: the third smallest times 5/3. The others do not matter."""
    other = np.zeros((1, 40))
    gains = [4, 6, 8, 10, 12]
    seeds = np.array([[1.0] * gain + [0.0] * (40 - gain) for gain in gains])
    middle = binomial_p(8, 0)
    assert exact_p(seeds, other, np.arange(40)) == pytest.approx(middle * 5 / 3)
    assert exact_p(seeds[:1], other, np.arange(40)) == pytest.approx(binomial_p(4, 0))


def test_graded_scores_have_no_exact_p():
    assert exact_p(np.array([[0.5, 1.0]]), np.array([[0.0, 1.0]]), np.arange(2)) is None


@pytest.mark.parametrize("seeds", [1, 5])
def test_p_values_are_valid_if_nothing_differs(seeds):
    """At most 5 % of 400 comparisons of equal rows are below 0.05, within the error of 400 draws."""
    random = np.random.default_rng(7)
    below = 0
    for _ in range(400):
        scores = (random.random((seeds, 60)) < 0.7).astype(float)
        other = (random.random((1, 60)) < 0.7).astype(float)
        p = exact_p(scores, other, np.arange(60))
        below += p < 0.05
    assert below <= 400 * 0.05 + 3 * np.sqrt(400 * 0.05 * 0.95)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_holm_lies_between_the_p_value_and_bonferroni(p_values):
    corrected = holm(p_values)
    for p, q in zip(p_values, corrected, strict=True):
        assert p <= q <= min(1.0, p * len(p_values)) + 1e-12
    assert [q for _, q in sorted(zip(p_values, corrected, strict=True))] == sorted(corrected)


@given(st.sets(st.integers(0, 20)), st.sets(st.integers(0, 20)))
def test_jaccard(first, second):
    overlap = jaccard(first, second)
    assert 0 <= overlap <= 1
    assert overlap == jaccard(second, first)
    assert (overlap == 1) == (first == second)


@settings(max_examples=5, deadline=None)
@given(st.sampled_from([0.05, 0.25, 0.5, 1.0]))
def test_chance_overlap_is_that_of_independent_draws(share):
    random, total = np.random.default_rng(0), 1000
    draws = [set(random.permutation(total)[: int(share * total)].tolist()) for _ in range(40)]
    measured = np.mean([jaccard(a, b) for a, b in zip(draws[::2], draws[1::2], strict=True)])
    assert chance_overlap(share) == pytest.approx(measured, abs=0.01)


def test_similar_tokens():
    assert similar(36, 36)
    assert similar(36, 30)
    assert not similar(36, 29)
    assert not similar(0, 36)


# -- a comparison ---------------------------------------------------------------------------------------------------

HALF = [1, 0] * 50
FULL = scored("full", None, [1] * 90 + [0] * 10)


def test_every_row_meets_its_references():
    refereed = examined(
        FULL, scored("vtc-cls", 36, [1] * 80 + [0] * 20), scored("trsm", 36, [1] * 70 + [0] * 30),
        scored("random", 36, HALF), scored("downsample", 34, [1] * 20 + [0] * 80), scored("vtc-cls", 9, HALF),
    )  # fmt: skip
    vtc = refereed.row("vtc-cls", 36).referee
    others = {part.reference: part.method for part in vtc.against}
    assert others == {
        "full": "full", "random": "random", "downsample": "downsample", "runner-up": "trsm", "equal time": "random",
    }  # fmt: skip
    to_full = vtc.to("full")
    assert to_full.difference == pytest.approx(-0.1)
    assert to_full.p == pytest.approx(binomial_p(0, 10))
    assert to_full.tests == 5
    assert to_full.p <= to_full.p_holm <= 5 * to_full.p
    # 9 tokens have no similar random or downsample; alone in its budget it has no runner-up
    assert [part.reference for part in refereed.row("vtc-cls", 9).referee.against] == ["full", "equal time"]
    assert refereed.row("full").referee.against == ()


def test_verdicts_survive_the_results_file_and_older_files_have_none(tmp_path):
    refereed = examined(FULL, scored("vtc-cls", 36, HALF), scored("random", 36, HALF, seeds=1))
    refereed.save(tmp_path / "results.json")
    assert Results.load(tmp_path / "results.json") == refereed
    old = json.loads((tmp_path / "results.json").read_text())
    for entry in old["rows"]:
        del entry["referee"]
    (tmp_path / "old.json").write_text(json.dumps(old))
    loaded = Results.load(tmp_path / "old.json")
    assert [row.referee for row in loaded.rows] == [None] * 3
    assert referee(loaded) == refereed


def test_groups_are_chosen_by_blind_and_by_downsample():
    blind = scored("blind", None, [0] * 60 + [1] * 40, tokens_after=0, tokens_average=0)
    refereed = examined(
        FULL, scored("vtc-cls", 36, [1] * 50 + [0] * 50), scored("random", 36, [1] * 40 + [0] * 60),
        scored("downsample", 36, [1] * 30 + [0] * 70), blind,
    )  # fmt: skip
    groups = {score.group: score for score in refereed.row("vtc-cls").referee.groups}
    assert {name: (score.samples, score.by) for name, score in groups.items()} == {
        "needs image": (60, "blind"), "hard": (70, "downsample at 36"), "easy": (30, "downsample at 36"),
        "hard, full right": (60, "downsample at 36"), "easy, full right": (30, "downsample at 36"),
    }  # fmt: skip
    assert groups["needs image"].accuracy == pytest.approx(50 / 60)
    assert groups["hard"].accuracy == pytest.approx(20 / 70)
    assert groups["hard"].difference == pytest.approx(10 / 70)  # random has 10 of the 70
    assert groups["easy"].accuracy == 1
    by_itself = refereed.row("downsample").referee
    assert (by_itself.group("hard").accuracy, by_itself.group("easy").accuracy) == (0, 1)
    assert [score.group for score in refereed.row("full").referee.groups] == ["needs image"]
    assert refereed.row("blind").referee.groups == ()


def test_small_groups_are_not_read():
    refereed = examined(
        FULL, scored("vtc-cls", 36, HALF), scored("random", 36, HALF), scored("pool", 36, [1] * 71 + [0] * 29)
    )
    hard = refereed.row("vtc-cls").referee.group("hard")
    assert (hard.by, hard.samples, hard.few, hard.difference) == ("pool at 36", 29, True, None)
    everything_right = examined(FULL, scored("vtc-cls", 36, HALF), scored("pool", 36, [1] * 100))
    hard = everything_right.row("vtc-cls").referee.group("hard")
    assert (hard.samples, hard.accuracy, hard.few) == (0, None, True)


def test_equal_time_takes_the_baseline_of_nearest_time():
    """downsample with more tokens takes as long as a method with fewer."""
    drafts = [
        FULL, scored("vtc-cls", 36, HALF, prefill_ms=10.0), scored("random", 36, HALF, prefill_ms=8.0),
        scored("downsample", 72, [1] * 70 + [0] * 30, prefill_ms=9.8), scored("pool", 72, HALF, prefill_ms=14.0),
    ]  # fmt: skip
    against = examined(*drafts).row("vtc-cls").referee.to("equal time")
    assert (against.method, against.keep, against.time_ratio) == ("downsample", 72, pytest.approx(0.98))
    assert against.difference == pytest.approx(-0.2)
    untimed = [replace(draft, row=replace(draft.row, prefill_ms=None)) for draft in drafts]
    assert examined(*untimed).row("vtc-cls").referee.to("equal time") is None


def test_guards_flag_what_the_mean_hides():
    full = scored("full", None, [1] * 400)
    hidden = scored("vtc-cls", 36, [1] * 384 + [0] * 16)  # the last 200 questions are `where`: -8 points
    plain = scored("trsm", 36, [1] * 300 + [0] * 100)  # the mean shows it
    slight = scored("pool", 36, [1] * 395 + [0] * 5)
    (guard,) = (refereed := examined(full, hidden, plain, slight)).row("vtc-cls").referee.guards
    assert (guard.type, guard.samples, guard.difference) == ("where", 200, pytest.approx(-0.08))
    assert guard.mean == pytest.approx(-0.04)
    assert refereed.row("trsm").referee.guards == ()
    assert refereed.row("pool").referee.guards == ()


def test_rows_without_a_loss_are_seldom_flagged():
    """Eight guarded types of 50 questions: 5 % of the rows at most, and not 5 % of each type."""
    random, types = np.random.default_rng(2), tuple(f"where {number}" for number in range(8))
    flagged = 0
    for _ in range(40):
        full = (random.random(400) < 0.7).astype(int).tolist()
        equal = [(random.random(400) < 0.7).astype(int).tolist() for _ in range(5)]
        drafts = [scored("full", None, full), *(scored("trsm", 36 + i, right) for i, right in enumerate(equal))]
        flagged += sum(bool(row.referee.guards) for row in examined(*drafts, types=types).rows)
    assert flagged / 200 <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 200)


def test_guarded_types():
    names = ["colour", "where", "count", "read", "point"]
    assert guarded_types(names, "exact") == ["where", "read", "point"]
    assert guarded_types(["a", "b"], "exact") == ["a", "b"]  # unknown names: all are guarded
    assert guarded_types(names, "anls") == names


def test_the_spread_of_seeds():
    draft = scored("random", 36, HALF)
    draft = replace(draft, scores=(draft.scores[0], tuple([1.0] * 60 + [0.0] * 40)))
    verdict = examined(FULL, draft).row("random").referee
    assert (verdict.seeds, verdict.seed_low, verdict.seed_high) == (2, 0.5, 0.6)
    assert examined(FULL, draft).row("full").referee.seed_low is None


# -- on a model -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "gap"), [((120, 120), 2), ((336, 640), 7), ((10, 10), 1)])
def test_a_moved_image_is_the_image_moved(size, gap):
    pixel = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    after = np.asarray(moved(lambda: Image.fromarray(pixel)))
    assert pixels(size) == gap
    assert after.shape == pixel.shape
    assert (after[gap:, gap:] == pixel[:-gap, :-gap]).all()
    assert (after[:gap, gap:] == pixel[0, :-gap]).all()


def test_the_blind_row_answers_without_pixels(model, processor, samples, tmp_path):
    options = {"output": tmp_path / "out", "batch_size": 4, "max_new_tokens": 2, "measure": False, "seeds": 2}
    refereed = compare(model, processor, samples, ["random", "uniform"], [9], **options)
    *_, blind = refereed.rows
    assert (blind.method, blind.keep, blind.tokens_before, blind.tokens_after) == ("blind", None, 144, 0)
    assert refereed.scores[-1] == ((0.0,) * 10,)
    inputs = encode_texts(processor, samples[:1], "{question}")
    assert set(inputs) == {"input_ids", "attention_mask"}
    assert model.config.image_token_id not in inputs["input_ids"]
    text = decode(processor, model.generate(**inputs, do_sample=False, max_new_tokens=2), inputs["input_ids"].shape[1])
    right = [replace(sample, answers=tuple(text)) for sample in samples]
    again = compare(model, processor, right, ["random", "uniform"], [9], **options)  # answered before: scored anew
    assert again.scores[-1][0][0] == 1
    random, uniform = again.row("random").referee, again.row("uniform").referee
    assert (uniform.overlap.shift, uniform.overlap.seeds, uniform.overlap.images) == (1, None, 4)
    assert 0 <= random.overlap.seeds < 0.5
    assert 0 <= random.overlap.shift < 0.5  # its places are drawn from the pixels
    assert uniform.overlap.chance == pytest.approx(chance_overlap(9 / 144))
    assert uniform.overlap.pixels == 2
    assert again.row("full").referee.overlap is None
    lines = (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()
    assert sum('"run": "blind"' in line for line in lines) == 10
    assert sum("moved 2%" in line for line in lines) == 2 * 4
    without = compare(model, processor, right, ["uniform"], [9], **options, referee=False)
    assert [row.method for row in without.rows] == ["full", "uniform"]
    assert without.row("uniform").referee.overlap is None


def test_a_processor_that_needs_an_image_gives_no_blind_row(model, processor, samples, tmp_path, monkeypatch):
    call = type(processor).__call__

    def strict(self, images=None, text=None, **options):
        if not images:
            raise ValueError("images are expected")
        return call(self, images=images, text=text, **options)

    monkeypatch.setattr(type(processor), "__call__", strict)
    assert "images are expected" in refusal(model, processor, samples[0], "{question}")
    plain = compare(
        model,
        processor,
        samples,
        ["uniform"],
        [9],
        output=tmp_path / "out",
        measure=False,
        max_new_tokens=1,
        examples=0,
    )
    assert [row.method for row in plain.rows] == ["full", "uniform"]
    assert "images are expected" in plain.settings["no_blind"]
