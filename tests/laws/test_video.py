"""Laws 1-5 for videos, beside images and alone: tiny models of six families, real generation, a reference by hand."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch.nn.functional import interpolate
from transformers import DynamicCache

import tokensieve
from tests.support import laws_reference as laws
from tests.support import laws_tiny as tiny
from tests.support import video_models as models
from tests.support import video_reference as reference
from tokensieve.methods import Method

STEPS = 3
SPECS = (
    ("evs(keep=0.5)", {}),
    ("dycoke", {}),
    ("fastvid(keep=10)", {}),
    ("prunevid(keep=9)", {}),
    ("holitom(keep=9)", {}),
    ("fastervlm(keep=7)", {"budget_scope": "clip"}),
    ("fastervlm(keep=3)", {"budget_scope": "frame"}),
    ("visionzip(keep=9, combine='mean', before_projector=False)", {"budget_scope": "clip"}),
    ("trsm(keep=7)", {}),
    ("pool(keep=9)", {}),
)
DECODER = ("fastv(keep=6, layer=1)", "evs(keep=0.5) + vtw(layer=2)", "sparsevlm(layers=(1, 2), keep=4)")
# linear attention runs in chunks in a prefill and step by step after it: unhooked, Qwen3.5 is as far from its reference
LINEAR_NOISE = 1e-3
each_family = pytest.mark.parametrize("family", models.FAMILIES)


def noise(family):
    return LINEAR_NOISE if family == "qwen3.5" else laws.NOISE


def run(family, samples, spec, steps=STEPS, attention="sdpa", **parameters):
    """Greedy steps with the method attached: logits `[row, step, vocabulary]`, tokens, decisions."""
    model = models.subject(family, attention)
    with tokensieve.attach(model, spec, **parameters) as sieve:
        out = model.generate(**models.collate(family, samples), max_new_tokens=steps, **tiny.GREEDY)
        return torch.stack(out.logits, 1), out.sequences[:, -steps:], sieve.last


@cache
def encoded(family, scenario):
    model = models.pristine(family)
    return [[reference.encode(model, family, one) for one in s.shown] for s in models.scenario(family, scenario)]


def assert_oracle(family, scenario, logits, tokens, decisions, deviation, policy="original"):
    """Law 2, for every row of a batch."""
    for i, s in enumerate(models.scenario(family, scenario)):
        rows = [e.mixed(r.matrix()) for e, r in zip(encoded(family, scenario)[i], decisions[i], strict=True)]
        kept, answer = [r.kept for r in decisions[i]], tokens[i].tolist()
        by_hand = reference.logits(models.pristine(family), family, s, kept, rows, policy, answer[:-1])
        assert deviation("from the hand reference (law 2)", logits[i], by_hand) <= noise(family)
        assert by_hand.argmax(-1).tolist() == answer


@pytest.mark.slow
@pytest.mark.parametrize(("spec", "parameters"), SPECS, ids=[f"{spec}-{len(p)}" for spec, p in SPECS])
@each_family
def test_oracle_batch_and_conservation(family, spec, parameters, deviation):
    samples = models.scenario(family, "mixed")
    logits, tokens, decisions = run(family, samples, spec, **parameters)
    assert [[r.total for r in row] for row in decisions] == [[one.tokens for one in s.shown] for s in samples]
    assert_oracle(family, "mixed", logits, tokens, decisions, deviation)
    for i, s in enumerate(samples):
        for one, r in zip(s.shown, decisions[i], strict=True):
            assert_conserved(one, r, spec, parameters)
        if any(one.kind == "video" for one in s.shown):
            alone, answer, (own,) = run(family, [s], spec, **parameters)
            assert deviation("of a row from its own run (law 3)", logits[i], alone[0]) <= noise(family)
            assert answer[0].tolist() == tokens[i].tolist()
            assert [r.kept.tolist() for r in own] == [r.kept.tolist() for r in decisions[i]]


@each_family
def test_oracle_with_eager_attention(family, deviation):
    samples = models.scenario(family, "ragged")
    logits, tokens, decisions = run(family, samples, "fastvid(keep=10)", attention="eager")
    assert_oracle(family, "ragged", logits, tokens, decisions, deviation)
    _, _, others = run(family, samples, "fastvid(keep=10)")
    for row, other in zip(decisions, others, strict=True):
        assert [r.kept.tolist() for r in row] == [r.kept.tolist() for r in other]


def assert_conserved(one, r, spec, parameters):
    """Law 5: every token is somewhere, weights are averages, budgets are kept."""
    assert bool((r.kept.diff() > 0).all())
    assert set(r.source.tolist()) - {-1} == set(range(r.slots))
    torch.testing.assert_close(r.weight_sums, torch.ones(r.slots))
    method, structure = tokensieve.parse(spec)[0], one.structure
    if one.kind == "image":
        assert r.whole == method.needs.video or r.slots < r.total or r.notes
        if method.needs.video:
            assert "this is an image" in r.notes[0]
        return
    patches = [token for token in r.kept.tolist() if token not in structure]
    if "clip" in parameters.values() or spec.startswith(("fastvid", "trsm")):
        assert len(patches) == method.keep
    if "frame" in parameters.values():
        h, w = one.grid
        size = h * w + (len(structure) == one.frames)
        per_frame = [sum(token // size == t for token in patches) for t in range(one.frames)]
        assert per_frame == [method.keep] * one.frames


@each_family
def test_structure_rows_stay_with_their_frame(family):
    """[CLS] rows of frames that keep nothing go; the newline that ends a video stays."""
    (s,) = models.scenario(family, "single")
    _, _, ((r,),) = run(family, [s], [[only_frames(s.shown[0], (0, 2))]], steps=1)
    _, _, ((uniform,),) = run(family, [s], "evs(keep=1)", steps=1)  # the first frame and nothing else
    structure, kept = s.shown[0].structure, set(uniform.kept.tolist())
    assert r.slots < r.total
    if family == "video-llava":
        assert kept & set(structure) == {structure[0]}
    else:
        assert kept & set(structure) == set(structure)


def only_frames(one, frames):
    size = one.tokens // one.frames
    return tokensieve.Reduction(one.tokens, torch.cat([torch.arange(size) + t * size for t in frames]))


@pytest.mark.parametrize("policy", ["original", "contiguous"])
@each_family
def test_whole_frames_may_go(family, policy, deviation):
    """Runs of placeholders between timestamps may become empty; positions and the text between stay right."""
    samples = models.scenario(family, "ragged")
    replay = [[only_frames(one, (1,)) for one in s.shown] for s in samples]
    logits, tokens, decisions = run(family, samples, replay, positions=policy)
    assert_oracle(family, "ragged", logits, tokens, decisions, deviation, policy)


@each_family
def test_identity(family):
    model, inputs = models.subject(family), models.collate(family, models.scenario(family, "mixed"))
    expected = models.pristine(family).generate(**inputs, max_new_tokens=2, **tiny.GREEDY)
    for spec in ("full", "evs(keep=1.0)", "fastvid(keep=1.0)", "holitom(keep=1000)"):
        with tokensieve.attach(model, spec):
            out = model.generate(**inputs, max_new_tokens=2, **tiny.GREEDY)
        assert torch.equal(torch.stack(out.logits), torch.stack(expected.logits)), spec
    after = model.generate(**inputs, max_new_tokens=2, **tiny.GREEDY)
    assert torch.equal(torch.stack(after.logits), torch.stack(expected.logits))


@each_family
def test_nothing_is_left_behind(family):
    model = models.subject(family)
    inputs = models.collate(family, models.scenario(family, "mixed"))
    model.generate(**inputs, max_new_tokens=1)
    before = tiny.footprint(model)
    with tokensieve.attach(model, "fastvid(keep=5)"):
        model.generate(**inputs, max_new_tokens=1)
        assert tiny.footprint(model) != before
    assert tiny.footprint(model) == before


@torch.no_grad()
@each_family
def test_a_plain_forward_is_generates_first_step(family, deviation):
    model, inputs = models.subject(family), models.collate(family, models.scenario(family, "mixed"))
    for spec in ("evs(keep=0.5)", "fastervlm(keep=5)"):
        with tokensieve.attach(model, spec):
            first = model.generate(**inputs, max_new_tokens=1, **tiny.GREEDY).logits[0]
            plain = model(**inputs).logits[:, -1]
        assert deviation("of a plain forward", plain, first) <= noise(family)


@each_family
def test_a_second_turn_on_the_cache_equals_the_one_shot_run(family, deviation):
    model, samples = models.subject(family), models.scenario(family, "mixed")
    inputs, cache = models.collate(family, samples), DynamicCache(config=models.subject(family).config.text_config)
    with tokensieve.attach(model, "evs(keep=0.5)"):
        first = model.generate(**inputs, max_new_tokens=3, past_key_values=cache, **tiny.GREEDY)
        ones = torch.ones(len(samples), 8, dtype=torch.long)
        words = torch.arange(11, 16).expand(len(samples), -1)
        turn = {"input_ids": torch.cat([first.sequences, words], 1)}
        turn["attention_mask"] = torch.cat([inputs["attention_mask"], ones], 1)
        if "mm_token_type_ids" in inputs:
            turn["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], 0 * ones.int()], 1)
        again = model.generate(**{**inputs, **turn}, max_new_tokens=3, **tiny.GREEDY)
        grids = {name: inputs[name] for name in ("image_grid_thw", "video_grid_thw") if name in inputs}
        second = model.generate(**turn, **grids, max_new_tokens=3, past_key_values=cache, **tiny.GREEDY)
    assert deviation("of a second turn (law 4)", torch.stack(second.logits), torch.stack(again.logits)) <= noise(family)
    assert torch.equal(second.sequences, again.sequences)


@each_family
def test_beams_of_a_batch_are_those_of_each_row(family):
    model, samples = models.subject(family), models.scenario(family, "mixed")
    beams = {"num_beams": 2, "num_return_sequences": 2, "max_new_tokens": 3, "do_sample": False}
    with tokensieve.attach(model, "evs(keep=0.5)") as sieve:
        together = model.generate(**models.collate(family, samples), **beams)[:, -3:]
        decided = [[r.kept.tolist() for r in row] for row in sieve.last]
        assert [len(row) for row in decided] == [len(s.shown) for s in samples]
        for i in (0, 1):
            own = model.generate(**models.collate(family, [samples[i]]), **beams)[:, -3:]
            assert together[2 * i : 2 * i + 2].tolist() == own.tolist()
            assert [r.kept.tolist() for r in sieve.last[0]] == decided[i]


@pytest.mark.parametrize("spec", DECODER)
@pytest.mark.parametrize("family", [family for family in models.FAMILIES if family != "qwen3.5"])
def test_inside_the_llm_a_row_is_its_own_run(family, spec, deviation):
    samples = models.scenario(family, "mixed")
    logits, tokens, decisions = run(family, samples, spec)
    assert any(r.slots < r.total for row in decisions for r in row)
    for i in (0, 1):
        alone, answer, (own,) = run(family, [samples[i]], spec)
        assert deviation("of a row from its own run (law 3)", logits[i], alone[0]) <= noise(family)
        assert answer[0].tolist() == tokens[i].tolist()
        assert [r.kept.tolist() for r in own] == [r.kept.tolist() for r in decisions[i]]


# -- evidence -------------------------------------------------------------------------------------------------------


@each_family
def test_attention_of_a_frame_is_that_of_the_frame_alone(family):
    """What a method is shown of a video is, frame by frame, what it would be shown of each frame as a video."""
    (s,) = models.scenario(family, "single")
    (one,) = s.shown
    _, _, ((r,),) = run(family, [s], "fastervlm(keep=5)", steps=1)
    per_frame = one.pixels.unflatten(0, (one.frames, -1)).unbind() if family in models.QWEN else one.pixels[:, None]
    seen = []
    for pixels in per_frame:
        lonely = models.show(family, "video", 1, one.grid, torch.Generator())
        lonely = replace(lonely, pixels=pixels)
        alone = models.Sample([tiny.BOS, *[tiny.VIDEO] * lonely.tokens, 7], [lonely])
        _, _, ((decision,),) = run(family, [alone], "fastervlm(keep=5)", steps=1)
        seen.append(patch_scores(decision, lonely))
    torch.testing.assert_close(patch_scores(r, one), torch.cat(seen))


def patch_scores(r, one):
    structure = one.structure
    return torch.tensor([score for token, score in enumerate(r.scores.tolist()) if token not in structure])


@torch.no_grad()
@pytest.mark.parametrize("family", models.FAMILIES[4:])
def test_attention_by_hand(family):
    """Towers of tiles: eager attention, averaged over a token's patches as the family makes the token of them."""
    (s,) = models.scenario(family, "single")
    (one,) = s.shown
    _, _, ((r,),) = run(family, [s], "fastervlm(keep=5)", steps=1)
    base = models.pristine(family, "eager").model
    tower = base.video_tower if family == "video-llava" else base.vision_tower
    attention = tower(one.pixels, output_attentions=True).attentions[-2].mean(1)
    if family == "llava-onevision":  # no [CLS]: attention received
        side = models.SIDE[family]
        plane = attention.mean(1).view(-1, 1, side, side)
        expected = interpolate(plane, size=one.grid, mode="bilinear").flatten()
    else:
        expected = attention[:, 0, 1:].flatten()
        if family == "llava-next-video":
            side = models.SIDE[family]
            expected = expected.view(-1, side // 2, 2, side // 2, 2).mean((2, 4)).flatten()
    torch.testing.assert_close(patch_scores(r, one), expected, atol=1e-6, rtol=1e-4)


def test_timestamps_are_not_the_users_words():
    """Qwen3-VL's text between frames must not tell a method what the user asks."""
    family, seen = "qwen3-vl", []

    class Spy(Method):
        info = tokensieve.parse("trsm")[0].info

        def reduce(self, image):
            seen.append(image.words())
            return tokensieve.parse("trsm(keep=3)")[0].reduce(image)

    (s,) = models.scenario(family, "single")
    run(family, [s], Spy(), steps=1)
    ((text, real),) = seen
    asked = models.pristine(family).get_input_embeddings()(torch.tensor(s.ids[-6:]))  # six words after the video
    torch.testing.assert_close(text[real], asked)
    _, _, outer = run(family, [s], "evs(keep=0.5) + text-correlation(layer=1, keep=3)", steps=1)
    assert outer[0][0].slots == 3


# -- refusals -------------------------------------------------------------------------------------------------------


def test_a_video_method_needs_a_video():
    family = "qwen3-vl"
    sample = [models.scenario(family, "mixed")[3]]
    with pytest.raises(ValueError, match=r"evs\(keep=0.5\) reduces videos; there is none in this prompt"):
        run(family, sample, "evs(keep=0.5)")
    with pytest.raises(ValueError, match=r"reduces videos, which is not supported in LLaVA-1\.5"):
        tokensieve.attach(tiny.subject("llava-clip"), "evs")


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="LLaVA-OneVision pools videos after its projector"):
        run("llava-onevision", models.scenario("llava-onevision", "single"), "visionzip(keep=9)")
    with pytest.raises(ValueError, match="budget_scope must be one of"):
        tokensieve.attach(models.subject("qwen3-vl"), "evs", budget_scope="second")
    with pytest.raises(ValueError, match=r"shows a method one frame at a time; evs\(keep=0.25\) compares frames"):
        tokensieve.attach(models.subject("qwen3-vl"), "evs", budget_scope="frame")
    with pytest.raises(ValueError, match=r"'sample' would share with images, which evs\(keep=0.25\) leaves whole"):
        tokensieve.attach(models.subject("qwen3-vl"), "evs", budget_scope="sample")
    with pytest.raises(ValueError, match="budget_scope='frame' is not for methods that act in the decoder"):
        tokensieve.attach(models.subject("qwen3-vl"), "fastv(layer=1)", budget_scope="frame")
    family = "llava-next-video"
    s = models.sample(family, (3, (2, 2, 3), "image", 4), 1)
    first, image = s.ids.index(tiny.VIDEO), s.ids.index(tiny.IMAGE)
    ids = list(s.ids)
    ids[first + 3], ids[image] = tiny.IMAGE, tiny.VIDEO
    with pytest.raises(ValueError, match="an image stands between the frames of a video"):
        run(family, [models.Sample(ids, s.shown)], "evs(keep=0.5)")
