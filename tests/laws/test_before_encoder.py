"""The laws of methods that choose tokens by their pixels, before the vision encoder.

The encoder's run on the kept patches equals transformers' full run in which no query sees the dropped patches. Of the
whole model, every law holds against the unmodified LLM that is given the rows of that run by hand.
"""

from functools import cache

import pytest
import torch

import tokensieve
from tests.support import masked_encoder, models, oracle, prompts
from tests.support.masked_encoder import FAMILIES
from tests.support.methods import evidence
from tests.support.oracle import noise
from tokensieve import Refusal

STEPS = 3
ROUNDING = 1e-5
# rows and columns of tokens; the first covers whole windows of 2x2 tokens of Qwen2.5-VL
FLAT = (slice(1, 6), slice(1, 7)), (slice(0, 1), slice(4, None))
each_family = pytest.mark.parametrize("family", FAMILIES)
each_kernel = pytest.mark.parametrize("attention", ["sdpa", "eager"])


@cache
def samples(family):
    """A ragged batch: two images, one image without flat areas, no image, one image."""
    return [
        masked_encoder.sample(family, (3, 2, 5), ((6, 8), (3, 5)), 1, *FLAT),
        prompts.sample(family, (4, 9), ((3, 4),), 2),
        prompts.sample(family, (30,), (), 3),
        masked_encoder.sample(family, (2, 3), ((7, 7),), 4, *FLAT),
    ]


def generate(family, batch, spec, attention="sdpa", policy="original"):
    model = models.tiny_model(family, attention)
    with tokensieve.attach(model, spec, positions=policy) as sieve:
        out = model.generate(**prompts.collate(family, batch), max_new_tokens=STEPS, **prompts.GREEDY)
    columns = {layer.keys.shape[-2] for layer in out.past_key_values.layers if getattr(layer, "keys", None) is not None}
    return torch.stack(out.logits, 1), out.sequences[:, -STEPS:].tolist(), sieve, columns


def encoded(family, sample, decisions):
    """The rows of the kept tokens of each image, from the masked full run."""
    images = zip(sample.images, decisions, strict=True)
    return [masked_encoder.encode(family, image, tuple(r.kept.tolist())) for image, r in images]


# -- the vision encoder ---------------------------------------------------------------------------------------------


@each_kernel
@each_family
@torch.no_grad()
def test_the_encoder_runs_as_if_no_query_saw_the_dropped_patches(family, attention, deviation):
    model, images = models.tiny_model(family, attention), [i for s in samples(family) for i in s.images]
    inputs = prompts.pixels(family, samples(family))
    with tokensieve.attach(model, "pixelprune") as sieve:
        out = model.model.get_image_features(**inputs, return_dict=True)
        model.generate(**prompts.collate(family, samples(family)), max_new_tokens=1)
    decisions = [r for row in sieve.last for r in row]
    assert [len(r.kept) < r.total for r in decisions] == [True, True, False, True]
    planes = getattr(out, "deepstack_features", None) or []
    assert len(planes) == 3 * (family == "qwen3-vl")
    for number, (image, decision) in enumerate(zip(images, decisions, strict=True)):
        hand = masked_encoder.encode(family, image, tuple(decision.kept.tolist()))
        got = [out.pooler_output[number], *(plane[number] for plane in planes)]
        for rows, expected in zip(got, [hand.rows, *hand.planes], strict=True):
            assert len(rows) == image.tokens
            scale = expected.abs().max()
            assert deviation("from the masked run", rows[decision.kept] / scale, expected / scale) <= ROUNDING
            assert int((rows != 0).any(-1).sum()) == decision.slots  # the others are zero


@each_family
def test_the_masked_run_differs_from_the_full_run(family):
    """The law above is no tautology: what the kept patches see makes a difference."""
    image, kept = samples(family)[0].images[0], generate(family, samples(family)[:1], "pixelprune")[2].last[0][0].kept
    full = masked_encoder.encode(family, image, tuple(range(image.tokens))).rows[kept]
    torch.testing.assert_close(full, oracle.encode_image(models.unhooked(family), family, image).rows[kept])
    assert float((masked_encoder.encode(family, image, tuple(kept.tolist())).rows - full).abs().max()) > 0.1


@each_family
@torch.no_grad()
def test_kept_patches_keep_their_pixels_and_positions_bit_by_bit(family):
    model, inputs = models.tiny_model(family), prompts.pixels(family, samples(family))

    def what_enters():
        """Pixels, rows of the first layer, and rotary positions, in the order of the processor."""
        seen = []
        hooks = [
            model.model.visual.register_forward_pre_hook(
                lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
            ),
            model.model.visual.blocks[0].register_forward_pre_hook(
                lambda _, args, kwargs: seen.extend([args[0], *kwargs["position_embeddings"]]), with_kwargs=True
            ),
        ]
        model.model.get_image_features(**inputs, return_dict=True)
        for hook in hooks:
            hook.remove()
        return seen

    full = what_enters()
    with tokensieve.attach(model, "pixelprune") as sieve:
        subset = what_enters()
        model.generate(**prompts.collate(family, samples(family)), max_new_tokens=1)
    decisions = [r for row in sieve.last for r in row]
    kept = torch.cat([torch.zeros(r.total, dtype=torch.bool).index_fill(0, r.kept, True) for r in decisions])
    patches = kept.repeat_interleave(masked_encoder.PATCHES)
    assert torch.equal(subset[0], full[0][patches])
    if family == "qwen2.5-vl":  # it runs window by window
        order = masked_encoder.running_order(family, inputs["image_grid_thw"])
        patches = kept[order].repeat_interleave(masked_encoder.PATCHES)
    assert len(subset) == 4
    for rows, whole in zip(subset[1:], full[1:], strict=True):
        assert torch.equal(rows, whole[patches])


@torch.no_grad()
def test_windows_without_a_kept_token_vanish():
    model, lengths = models.tiny_model("qwen2.5-vl"), []

    def record(block, args, kwargs):
        lengths.append(kwargs["cu_seqlens"].diff().tolist())

    hooks = [block.register_forward_pre_hook(record, with_kwargs=True) for block in model.model.visual.blocks]
    sample = masked_encoder.sample("qwen2.5-vl", (1, 1), ((6, 8),), 1, (slice(1, 6), slice(1, 8)))
    with tokensieve.attach(model, "pixelprune") as sieve:
        model.generate(**prompts.collate("qwen2.5-vl", [sample]), max_new_tokens=1)
    for hook in hooks:
        hook.remove()
    windowed, *full = lengths
    grid = torch.zeros(6, 8, dtype=torch.int).flatten().index_fill(0, sieve.last[0][0].kept, 1).view(6, 8)
    per_window = grid.unflatten(0, (3, 2)).unflatten(2, (4, 2)).sum((1, 3)).flatten().tolist()
    assert 0 in per_window
    assert windowed == [masked_encoder.PATCHES * n for n in per_window if n]
    assert full == [[sum(windowed)]] * 3


# -- the whole model ------------------------------------------------------------------------------------------------


@each_kernel
@each_family
def test_where_no_tokens_are_equal_no_bit_changes(family, attention):
    batch = [prompts.sample(family, (3, 2, 5), ((6, 8), (3, 5)), 1), prompts.sample(family, (4, 9), ((3, 4),), 2)]
    model, inputs = models.tiny_model(family, attention), prompts.collate(family, batch)
    before = models.footprint(model)
    plain = model.generate(**inputs, max_new_tokens=STEPS, **prompts.GREEDY)
    for spec in ("pixelprune", "pixelprune(tolerance=0.01)"):
        logits, _, sieve, _ = generate(family, batch, spec, attention)
        assert torch.equal(logits, torch.stack(plain.logits, 1))
        assert all(r.whole for row in sieve.last for r in row)
    generate(family, samples(family), "pixelprune", attention)
    assert models.footprint(model) == before


@pytest.mark.parametrize("policy", ["original", "contiguous"])
@each_kernel
@each_family
def test_oracle_batch_and_cache(family, attention, policy, deviation):
    """Laws 2, 3 and 6 on a ragged batch."""
    batch = samples(family)
    logits, answers, sieve, columns = generate(family, batch, "pixelprune", attention, policy)
    model, widest = models.unhooked(family, attention), 0
    for row, (s, decisions, answer) in enumerate(zip(batch, sieve.last, answers, strict=True)):
        kept = [r.kept for r in decisions]
        hand = oracle.logits(model, family, s, kept, encoded(family, s, decisions), answer[:-1], policy)
        assert deviation("from the hand reference (law 2)", logits[row], hand) <= noise(family)
        assert hand.argmax(-1).tolist() == answer
        widest = max(widest, len(oracle.kept_columns(s, kept)))
        if s.images:
            alone, (own,), _, _ = generate(family, [s], "pixelprune", attention, policy)
            assert deviation("of a batch row from its own run (law 3)", logits[row], alone[0]) <= noise(family)
            assert own == answer
    assert columns == {widest + STEPS - 1}


@pytest.mark.parametrize("family", FAMILIES[:3])
def test_a_method_inside_the_llm_follows(family, deviation):
    batch, first = samples(family)[::3], generate(family, samples(family)[::3], "pixelprune")[2].last
    logits, answers, sieve, _ = generate(family, batch, "pixelprune + fastv(layer=1, keep=6)")
    for row, (s, entered, decisions) in enumerate(zip(batch, first, sieve.last, strict=True)):
        assert all(r.slots == min(6, e.slots) for r, e in zip(decisions, entered, strict=True))
        hand = oracle.logits_inside(
            models.unhooked(family), family, s, {1: [r.kept.tolist() for r in decisions]}, answers[row][:-1],
            [r.kept.tolist() for r in entered], encoded=encoded(family, s, entered),
        )  # fmt: skip
        assert deviation("from the layer loop by hand (law 2)", logits[row], hand) <= noise(family)
        for image, (layers, entering) in enumerate(zip(sieve.tokens[row], entered, strict=True)):
            assert layers == [entering.slots, *[decisions[image].slots] * 2]


@each_family
def test_a_connector_method_receives_the_evidence_of_the_kept_tokens(family, deviation):
    model, batch = models.tiny_model(family), samples(family)
    needs = tokensieve.Needs(attention_received=-1, patches=True, encoder_keys=-1)
    before = generate(family, batch, "pixelprune")[2].last
    received, after = evidence(model, prompts.collate(family, batch), needs, "pixelprune")
    by_count = {image.total: image for image in received}  # one group for each number of tokens: all differ here
    for s, decisions, final in zip(batch, before, after, strict=True):
        for image, entered, decision in zip(s.images, decisions, final, strict=True):
            given, kept = by_count[entered.slots], tuple(entered.kept.tolist())
            assert given.grid == (image.grid if entered.whole else None)
            assert decision.kept.tolist() == list(kept)[:-1]  # the spy drops the last
            rows, by_hand = given.features[0], masked_encoder.encode(family, image, kept).rows
            scale = by_hand.abs().max()
            assert deviation("of features", rows / scale, by_hand / scale) <= ROUNDING
            weights = masked_encoder.attention_received(family, image, kept)
            assert deviation("of attention received", given.attention_received[-1][0], weights) <= ROUNDING
            with torch.no_grad():
                projected = model.model.visual.merger(given.patches[0].view(len(rows) * masked_encoder.PATCHES, -1))
            assert deviation("of patches, projected", projected, rows) <= ROUNDING


# -- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llava-clip", "internvl", "glm4v"])
def test_other_families_are_refused_and_the_supported_ones_named(family):
    with pytest.raises(Refusal, match=r"supported in Qwen2-VL, Qwen2\.5-VL, Qwen3-VL; Qwen3\.5; got "):
        tokensieve.attach(models.tiny_model(family), "pixelprune")


@each_family
def test_videos_are_refused(family):
    model = models.tiny_model(family)
    for kind in ("video", "mixed-videos"):
        inputs = prompts.collate(family, prompts.batch(family, kind))
        with tokensieve.attach(model, "pixelprune"):
            with pytest.raises(Refusal, match=r"pixelprune .*videos are not supported"):
                model.generate(**inputs, max_new_tokens=1)
            with pytest.raises(Refusal, match=r"pixelprune .*videos are not supported"):
                model(**inputs)


def test_a_tolerance_outside_of_the_scale_is_refused():
    with pytest.raises(Refusal, match=r"tolerance must be a share in \[0, 1\]; got 4"):
        tokensieve.parse("pixelprune(tolerance=4)")
