"""New images in a later turn, on the cache of the turns before: the same as all turns in one prompt."""

import pytest
import torch
from transformers import DynamicCache

import tokensieve
from tests.support import families, models, prompts
from tests.support.oracle import NOISE

POLICIES = ("original", "contiguous")
SPECS = ("vtc-cls(first_layer=1, keep=5)", "visionzip(keep=9)", "divprune(keep=7)", "pool(keep=6)")
each_policy = pytest.mark.parametrize("policy", POLICIES)


def turns(family, kind):
    """Three turns: a picture, words only, another picture; `ids`, `mask` and the images of each."""
    samples = prompts.batch(family, kind)
    first = prompts.collate(family, samples)
    words = {"input_ids": torch.arange(20, 24).repeat(len(samples), 1)}
    other = prompts.collate(family, [prompts.sample(family, (2, 3 + i), (0,), 7 + i) for i in range(len(samples))])
    return [first, {**words, "attention_mask": torch.ones_like(words["input_ids"])}, other]


def joined(parts):
    out = {k: torch.cat([p[k] for p in parts], 1) for k in ("input_ids", "attention_mask")}
    types = [p.get("mm_token_type_ids", torch.zeros_like(p["input_ids"]).int()) for p in parts]
    if any("mm_token_type_ids" in p for p in parts):
        out["mm_token_type_ids"] = torch.cat(types, 1)
    return out


def of_each_row(parts):
    """Images of the whole conversation, row by row as transformers wants them."""
    rows = len(parts[0]["input_ids"])
    pictures = [p["pixel_values"].unflatten(0, (rows, -1)) for p in parts if "pixel_values" in p]
    return torch.cat(pictures, 1).flatten(0, 1)


@each_policy
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("family", families.CORE_LLAVA)
@torch.no_grad()
def test_a_picture_in_a_later_turn(family, spec, policy, deviation):
    model, parts = models.tiny_model(family), turns(family, "single")
    whole = {**joined(parts), "pixel_values": of_each_row(parts)}
    answer = torch.cat([whole["input_ids"], torch.tensor([[11]])], 1)
    with tokensieve.attach(model, spec, positions=policy) as sieve:
        cache = DynamicCache(config=model.config.text_config)
        for number, part in enumerate(parts):
            pictures = {k: part[k] for k in ("pixel_values",) if k in part}
            model.generate(**joined(parts[: number + 1]), **pictures, max_new_tokens=1, past_key_values=cache)
        held, kept = cache.layers[0].keys.shape[-2], sum(r.slots for r in sieve.last[0])
        later = model.generate(answer, past_key_values=cache, max_new_tokens=3, **prompts.GREEDY)
        expected = model.generate(answer, pixel_values=whole["pixel_values"], max_new_tokens=3, **prompts.GREEDY)
        assert sum(r.slots for r in sieve.last[0]) == 2 * kept
    placeholders = int((whole["input_ids"] == families.IMAGE).sum())
    assert held == whole["input_ids"].shape[1] - placeholders + 2 * kept
    assert cache.get_seq_length() == answer.shape[1] + 2, "columns as the caller counts them"
    got, wanted = torch.stack(later.logits), torch.stack(expected.logits)
    assert deviation("of a picture in a later turn (law 4)", got, wanted) <= NOISE


@each_policy
@pytest.mark.parametrize("kind", ["ragged", "mixed"])
@torch.no_grad()
def test_pictures_for_every_row_of_a_ragged_batch(kind, policy, deviation):
    """Each row of a batch, whose first turns are of different lengths, against its own conversation."""
    family = "llava-clip"
    model, parts = models.tiny_model(family), turns(family, kind)
    spec = "vtc-cls(first_layer=1, keep=0.4)"
    with tokensieve.attach(model, spec, positions=policy):
        cache = DynamicCache(config=model.config.text_config)
        for number, part in enumerate(parts):
            seen, pictures = joined(parts[: number + 1]), {k: part[k] for k in ("pixel_values",) if k in part}
            out = model.generate(
                **seen, **pictures, max_new_tokens=4 if number == 2 else 1, past_key_values=cache, **prompts.GREEDY
            )
        got = torch.stack(out.logits, 1)
        whole, counts = joined(parts), [len(s.images) for s in prompts.batch(family, kind)]
        first = torch.split(parts[0]["pixel_values"], counts)
        for row, own in enumerate(first):
            real = whole["attention_mask"][row].bool()
            pixels = torch.cat([own, parts[2]["pixel_values"][row : row + 1]])
            alone = model.generate(
                whole["input_ids"][row][real][None], pixel_values=pixels, max_new_tokens=4, **prompts.GREEDY
            )
            expected = torch.stack(alone.logits, 1)[0]
            assert deviation("of a ragged later turn (law 4)", got[row], expected) <= NOISE


@each_policy
@pytest.mark.parametrize("family", families.CORE_QWEN)
@torch.no_grad()
def test_m_rope_with_position_ids(family, policy, deviation):
    """transformers numbers a later picture only if told how: the ids of the whole conversation, cut as it goes."""
    model, parts = models.tiny_model(family), turns(family, "single")
    whole = joined(parts)
    grid = torch.cat([p["image_grid_thw"] for p in parts if "image_grid_thw" in p])
    axes, _ = model.model.get_rope_index(
        whole["input_ids"], mm_token_type_ids=whole["mm_token_type_ids"], image_grid_thw=grid
    )
    plain = torch.arange(axes.shape[-1])[None, None].expand(1, len(whole["input_ids"]), -1)
    positions, start = torch.cat([plain, axes]), 0
    with tokensieve.attach(model, "divprune(keep=5)", positions=policy):
        cache = DynamicCache(config=model.config.text_config)
        for number, part in enumerate(parts):
            end = start + part["input_ids"].shape[1]
            given = {k: v for k, v in part.items() if k != "attention_mask"}
            got = model(
                **given,
                attention_mask=joined(parts[: number + 1])["attention_mask"],
                position_ids=positions[..., start:end],
                past_key_values=cache,
            ).logits
            start = end
        pixels = torch.cat([p["pixel_values"] for p in parts if "pixel_values" in p])
        expected = model(
            **whole, pixel_values=pixels, image_grid_thw=grid, position_ids=positions, past_key_values=DynamicCache()
        ).logits
        assert deviation("of an M-RoPE later turn (law 4)", got, expected[:, -got.shape[1] :]) <= NOISE
        with pytest.raises(ValueError, match="new images on a filled cache with M-RoPE: pass position_ids"):
            model(**{k: v for k, v in parts[2].items() if k != "attention_mask"}, past_key_values=cache)


@pytest.mark.parametrize("family", ["llava-clip", "qwen2.5-vl"])
@torch.no_grad()
def test_inside_the_llm_it_is_refused(family):
    model, parts = models.tiny_model(family), turns(family, "single")
    later = {**parts[2], "attention_mask": joined([parts[0], parts[2]])["attention_mask"]}
    with tokensieve.attach(model, "fastv(layer=1, keep=5)"):
        cache = model(**parts[0]).past_key_values
        with pytest.raises(ValueError, match="new images on a filled cache cannot be reduced inside the LLM"):
            model(**later, past_key_values=cache)
    with (
        tokensieve.attach(model, "divprune", keep=5),
        pytest.raises(ValueError, match="continue with the decoder method attached, and without new images"),
    ):
        model(**later, past_key_values=cache)
