"""What single families do differently, by hand."""

import pytest
import torch
from transformers import DynamicCache

import tokensieve
from families import tiny
from laws.reference import NOISE


@pytest.mark.parametrize("positions", ["original", "contiguous"])
@pytest.mark.parametrize("name", ["paligemma", "gemma3"])
@torch.no_grad()
def test_decoding_by_hand_counts_from_the_familys_first_position(name, positions, deviation):
    """Without position ids a step is numbered as the model would do it: PaliGemma counts from 1."""
    model, inputs = tiny.subject(name), tiny.collate(name, tiny.scenario(name, "single"))
    with tokensieve.attach(model, "divprune", keep=5, positions=positions):
        expected = model.generate(**inputs, max_new_tokens=3, **tiny.GREEDY)
        cache = DynamicCache(config=model.config.text_config)
        model(**inputs, past_key_values=cache)
        for step in range(2):
            token = expected.sequences[:, step - 3][:, None]
            mask = torch.ones(1, cache.get_seq_length() + 1, dtype=torch.long)
            got = model(input_ids=token, attention_mask=mask, past_key_values=cache).logits[:, -1]
            assert deviation("of decoding by hand (law 4)", got, expected.logits[step + 1]) <= NOISE


@torch.no_grad()
def test_a_video_beside_an_image_stays_whole_where_only_images_are_reduced():
    model, (sample,) = tiny.subject("perception-lm"), tiny.scenario("perception-lm", "single")
    (image,) = sample.images
    ids = torch.tensor([[*sample.ids, *[tiny.VIDEO] * image.tokens, 7, 8]])
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
