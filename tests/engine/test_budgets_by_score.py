"""``budget_scope="sample-score"``: the best tokens of all images of a prompt, by one ranking, at least one of each."""

import re
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import tokensieve
from tests.support import models, oracle, prompts
from tokensieve import Method
from tokensieve.engine.connector.decide import share_by_score
from tokensieve.ops import top_k
from tokensieve.tokens import ByLayer, ConnectorTokens, UserText

# images of unequal sizes; tiles that are images; mosaics with newlines; tiles that are one image
NAMES = ("qwen2.5-vl", "idefics3", "llava-next", "internvl")
BY_SCORE = ("vtc-cls", "vtc-cls(over_layers='max')", "fastervlm", "trsm", "trsm(query='prompt')", "simignore", "fopru")
GENERATE = {"max_new_tokens": 1, **prompts.GREEDY}


@dataclass(frozen=True)
class Loudest(Method):
    keep: int | float = 8
    by_score: ClassVar = True

    def reduce(self, image):
        scores = image.features.norm(dim=-1)
        return image.keep(top_k(scores, image.budget), scores)


@dataclass(frozen=True)
class Mute(Loudest):
    def reduce(self, image):
        return image.keep(top_k(image.features.norm(dim=-1), image.budget))


@pytest.fixture
def loudest(registry):
    return registry.register("loudest-by-norm", paper="none")(Loudest)


def best_of(scores, keep):
    """By hand: which tokens of each image are among the ``keep`` best of all, the best of each image always."""
    ranked = sorted((-s, image, place) for image, row in enumerate(scores) for place, s in enumerate(row))
    firsts = [min((-s, image, place) for place, s in enumerate(row)) for image, row in enumerate(scores)]
    chosen = [*firsts, *(entry for entry in ranked if entry not in firsts)][: max(keep, len(scores))]
    return [sorted(place for _, of, place in chosen if of == image) for image in range(len(scores))]


def answers(name, samples, method, **more):
    model = models.tiny_model(name)
    with tokensieve.attach(model, method, budget_scope="sample-score", **more) as sieve:
        out = model.generate(**prompts.collate(name, samples), **GENERATE)
    return out.logits[0], sieve.last


def patches(image, decision):
    """Kept tokens that are no newlines, counted without them."""
    places = [place for place in range(image.tokens) if place not in image.newlines]
    return [places.index(place) for place in decision.kept.tolist() if place not in image.newlines]


@pytest.mark.parametrize("keep", [1, 9, 21, 0.3])
@pytest.mark.parametrize("name", NAMES)
def test_is_a_top_k_over_all_images_of_a_prompt_alone_and_in_a_padded_batch(name, keep, loudest):
    samples = prompts.batch(name, "one-and-two")
    logits, decisions = answers(name, samples, loudest(keep))
    for row, sample in enumerate(samples):
        rows = [encoded.rows.norm(dim=-1) for encoded in oracle.encode(models.unhooked(name), name, sample)]
        scores = [
            [float(s) for place, s in enumerate(row) if place not in image.newlines]
            for row, image in zip(rows, sample.images, strict=True)
        ]
        wanted = keep if isinstance(keep, int) else round(keep * sum(map(len, scores)))
        expected = best_of(scores, wanted)
        assert [patches(*both) for both in zip(sample.images, decisions[row], strict=True)] == expected
        assert sum(map(len, expected)) == min(max(wanted, len(sample.images)), sum(map(len, scores)))
        own, (mine,) = answers(name, [sample], loudest(keep))
        assert [r.kept.tolist() for r in mine] == [r.kept.tolist() for r in decisions[row]]
        assert torch.allclose(own[0], logits[row], atol=1e-4)


def test_beams_share_out_as_one_prompt_does(loudest):
    name = "qwen2.5-vl"
    samples, model = prompts.batch(name, "one-and-two"), models.tiny_model(name)
    _, expected = answers(name, samples, loudest(9))
    with tokensieve.attach(model, loudest(9), budget_scope="sample-score") as sieve:
        model.generate(**prompts.collate(name, samples), **GENERATE, num_beams=2)
    for row, wanted in zip(sieve.last, expected, strict=True):
        assert [r.kept.tolist() for r in row] == [r.kept.tolist() for r in wanted]


def test_everything_and_less_than_one_token_each(loudest):
    samples = prompts.batch("qwen2.5-vl", "one-and-two")
    assert all(r.whole for row in answers("qwen2.5-vl", samples, loudest(1.0))[1] for r in row)
    assert share_by_score(2, [torch.tensor([5.0, 4.0]), torch.tensor([1.0]), torch.tensor([3.0, 3.0])]) == [1, 1, 1]
    assert share_by_score(4, [torch.tensor([1.0, 1.0, 1.0]), torch.tensor([1.0, 1.0])]) == [3, 1]  # ties: the earlier


def test_a_prompt_without_an_image_may_stand_in_the_batch():
    model, samples = models.tiny_model("llava-clip"), prompts.batch("llava-clip", "mixed")
    with tokensieve.attach(model, "simignore", keep=13, budget_scope="sample-score") as sieve:
        model.generate(**prompts.collate("llava-clip", samples), **GENERATE)
        assert [sum(image.slots for image in row) for row in sieve.last] == [13, 13, 0, 13]


def test_methods_without_a_budget_have_nothing_to_share():
    samples = prompts.batch("qwen2.5-vl", "one-and-two")
    assert all(r.whole for row in answers("qwen2.5-vl", samples, "full")[1] for r in row)


@pytest.mark.parametrize("spec", BY_SCORE)
def test_methods_by_score_keep_the_largest_scores(spec):
    (method,) = tokensieve.parse(spec, keep=7)
    drawn = ByLayer({layer: torch.rand(3, 24) for layer in range(4)})
    text = UserText(torch.randn(3, 5, 8), torch.ones(3, 5, dtype=torch.bool))
    image = ConnectorTokens(torch.randn(3, 24, 8), cls_attention=drawn, attention_received=drawn, user_text=text)
    decision = method(image)
    assert method.by_score
    assert torch.equal(decision.anchors, top_k(decision.scores, 7))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        *((spec, "does not choose by a score alone") for spec in ("divprune", "visionzip", "random", "hired")),
        ("fopru(select='row')", "does not choose by a score alone"),
        ("simignore(start=1)", "does not choose by a score alone"),
        ("fastv", "budget_scope='sample-score' is not for methods that act in the decoder"),
        ("downsample", "budget_scope='sample-score' is not for methods that act in the encoder"),
        ("pumer", "is not for methods that act in the fusion"),
    ],
)
def test_methods_without_a_score_are_refused(spec, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        tokensieve.attach(models.tiny_model("internvl"), spec, budget_scope="sample-score")


def test_a_method_that_declares_a_score_and_gives_none(registry):
    mute = registry.register("mute", paper="none")(Mute)
    with pytest.raises(ValueError, match="declares by_score"):
        answers("internvl", prompts.batch("internvl", "one-and-two"), mute(8))


def test_the_shares_are_exact():
    generator = torch.Generator().manual_seed(0)
    for keep in (1, 3, 8, 40, 0.2, 0.9):
        scores = [torch.rand(size, generator=generator) for size in (9, 1, 14, 6)]
        shares, wanted = share_by_score(keep, scores), keep if isinstance(keep, int) else round(30 * keep)
        assert sum(shares) == min(max(wanted, 4), 30)
        assert shares == [len(kept) for kept in best_of([row.tolist() for row in scores], min(wanted, 30))]
