"""The random baseline draws its places per image: the image's pixels and the seed decide, not the batch."""

import pytest
import torch

import tokensieve
from tests.support import families, models, prompts

SPEC = "random(keep=0.4)"
IMAGES = sorted(families.FAMILIES)


def places(name, samples, spec=SPEC, **more):
    """Return the kept tokens, `[sample][image]`."""
    model = models.tiny_model(name)
    with torch.no_grad(), tokensieve.attach(model, spec, **more) as sieve:
        model(**prompts.collate(name, samples))
    return [[image.kept.tolist() for image in sample] for sample in sieve.last]


@pytest.mark.parametrize("name", IMAGES)
def test_every_image_has_places_of_its_own_whatever_the_batch(name):
    samples = [prompts.sample(name, (3, 4), (0,), seed) for seed in range(6)]
    alone = [places(name, [sample])[0] for sample in samples]
    assert places(name, samples) == alone
    assert places(name, samples[::-1]) == alone[::-1]
    assert len({str(kept) for kept in alone}) > 3  # the same places for all images before


@pytest.mark.parametrize("name", IMAGES)
def test_padding_and_neighbours_in_a_prompt_change_nothing(name):
    samples = prompts.batch(name, "mixed")
    assert places(name, samples) == [places(name, [sample])[0] if sample.images else [] for sample in samples]


@pytest.mark.parametrize("name", families.VIDEO_FAMILIES)
def test_videos_too(name):
    samples = prompts.batch(name, "mixed-videos")
    alone = [places(name, [sample])[0] if sample.images else [] for sample in samples]
    assert places(name, samples) == alone


def test_a_question_about_the_same_image_meets_the_same_tokens_and_another_seed_others():
    first, second = prompts.sample("llava-clip", (3, 4), (0,), 1), prompts.sample("llava-clip", (9, 2), (0,), 2)
    second = families.Sample(second.ids, first.images)
    assert places("llava-clip", [first]) == places("llava-clip", [second])
    assert places("llava-clip", [first]) != places("llava-clip", [first], "random(keep=0.4, seed=1)")


def test_tiles_of_one_image_are_drawn_one_by_one():
    samples = [prompts.sample("llava-next", (3, 4), (0,), 1)]
    (whole,), ((per_tile,),) = places("llava-next", samples), places("llava-next", samples, budget_scope="tile")
    assert whole != [per_tile]


def test_images_are_resized_before_and_drawn_after():
    samples = [prompts.sample("llava-clip", (3, 4), (0,), seed) for seed in range(2)]
    spec = "downsample(keep=0.5) + random(keep=4)"
    assert places("llava-clip", samples, spec) == [places("llava-clip", [s], spec)[0] for s in samples]
