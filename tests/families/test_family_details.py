"""What single families do differently, by hand."""

import pytest
import torch
from transformers import DynamicCache

import tokensieve
from tests.support import families, models, prompts
from tests.support.oracle import NOISE


@pytest.mark.parametrize("positions", ["original", "contiguous"])
@pytest.mark.parametrize("name", ["paligemma", "gemma3"])
@torch.no_grad()
def test_decoding_by_hand_counts_from_the_familys_first_position(name, positions, deviation):
    """Without position ids a step is numbered as the model would do it: PaliGemma counts from 1."""
    model, inputs = models.tiny_model(name), prompts.collate(name, prompts.batch(name, "single"))
    with tokensieve.attach(model, "divprune", keep=5, positions=positions):
        expected = model.generate(**inputs, max_new_tokens=3, **prompts.GREEDY)
        cache = DynamicCache(config=model.config.text_config)
        model(**inputs, past_key_values=cache)
        for step in range(2):
            token = expected.sequences[:, step - 3][:, None]
            mask = torch.ones(1, cache.get_seq_length() + 1, dtype=torch.long)
            got = model(input_ids=token, attention_mask=mask, past_key_values=cache).logits[:, -1]
            assert deviation("of decoding by hand (law 4)", got, expected.logits[step + 1]) <= NOISE


@torch.no_grad()
def test_a_video_beside_an_image_stays_whole_where_only_images_are_reduced():
    model, (sample,) = models.tiny_model("perception-lm"), prompts.batch("perception-lm", "single")
    (image,) = sample.images
    ids = torch.tensor([[*sample.ids, *[families.VIDEO] * image.tokens, 7, 8]])
    pixels = image.inputs["pixel_values"]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    inputs["pixel_values_videos"] = pixels
    expected = model(**inputs).logits
    with tokensieve.attach(model, "divprune", keep=1.0):
        assert torch.equal(model(**inputs).logits, expected)
    with tokensieve.attach(model, "divprune", keep=5) as sieve:
        assert model(**inputs).logits.shape[1] == ids.shape[1] - image.tokens + 5
        assert model.generate(**inputs, max_new_tokens=2).shape[1] == ids.shape[1] + 2
        assert [[image.slots for image in row] for row in sieve.last] == [[5]]


SEVERAL = {"beams": {"num_beams": 2}, "returns": {"num_return_sequences": 2, "do_sample": True}}


@pytest.mark.parametrize("kind", SEVERAL)
def test_beams_that_transformers_gives_the_wrong_images_are_refused(kind):
    """GLM-4V: `A A B B` where two beams of one sample show A and B. Where transformers mends it, this fails."""
    model, samples = models.tiny_model("glm4v"), prompts.batch("glm4v", "one-and-two")
    options = {"max_new_tokens": 1, **prompts.GREEDY, **SEVERAL[kind]}
    inputs, alone = prompts.collate("glm4v", samples), [s for s in samples if len(s.images) == 1]
    once = model.generate(**inputs, max_new_tokens=1, **prompts.GREEDY).logits[0]
    unhooked = model.generate(**inputs, **options).logits[0]
    assert torch.allclose(unhooked[0], once[0], atol=1e-4), "a sample of one image is right"
    assert not torch.allclose(unhooked[2], once[1], atol=0.1), "transformers has mended it: drop the refusal"
    for spec in ("uniform(keep=5)", "fastv(layer=1, keep=5)", "full"):
        with tokensieve.attach(model, spec) as sieve:
            with pytest.raises(ValueError, match=r"beams .* of sample 1 its 2 images in another order in GLM-4V"):
                model.generate(**inputs, **options)
            model.generate(**inputs, max_new_tokens=1)
            model.generate(**prompts.collate("glm4v", alone), **options)
            assert [len(row) for row in sieve.last] == [1, 1]
