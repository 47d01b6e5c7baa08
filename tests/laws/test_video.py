"""Laws 1-5 for videos, beside images and alone: tiny models of seven families, real generation, a reference by hand."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product

import pytest
import torch
from torch.nn.functional import interpolate
from transformers import DynamicCache

import tokensieve
from tests.support import families, models, oracle, prompts
from tests.support.oracle import noise
from tokensieve.methods import Method

STEPS = 3
# with these parameters, if a method is among them; else as it comes
TUNED = {"evs": "evs(keep=0.5)", "fastvid": "fastvid(keep=10)"}
TUNED |= {"vidcom2": "vidcom2(keep=11)", "v-cast": "v-cast(keep=11)", "flashvid": "flashvid(keep=10)"}
TUNED |= {"prunevid": "prunevid(keep=9)", "holitom": "holitom(keep=9)"}
VIDEO_SPECS = [TUNED.get(info.name, info.name) for info in tokensieve.list_methods() if info.needs.requests("video")]
SPECS = (
    *((spec, "") for spec in VIDEO_SPECS),
    ("fastervlm(keep=7)", "clip"),
    ("fastervlm(keep=3)", "frame"),
    ("visionzip(keep=9, combine='mean', before_projector=False)", "clip"),
    ("trsm(keep=7)", ""),
    ("pool(keep=9)", ""),
)
DECODER = ("fastv(keep=6, layer=1)", "evs(keep=0.5) + vtw(layer=2)", "sparsevlm(layers=(1, 2), keep=4)")
DECODER += ("flashvid(keep=0.5) + fastv(layer=1, keep=0.3)",)
each_family = pytest.mark.parametrize("family", families.VIDEO_FAMILIES)


def run(family, samples, spec, steps=STEPS, attention="sdpa", **parameters):
    """Greedy steps with the method attached: logits `[row, step, vocabulary]`, tokens, decisions."""
    with tokensieve.attach(models.tiny_model(family, attention), spec, **parameters) as sieve:
        out = sieve.model.generate(**prompts.collate(family, samples), max_new_tokens=steps, **prompts.GREEDY)
        return torch.stack(out.logits, 1), out.sequences[:, -steps:], sieve.last


def assert_oracle(family, kind, logits, tokens, decisions, deviation, policy="original"):
    """Law 2, for every row of a batch."""
    for i, s in enumerate(prompts.batch(family, kind)):
        encoded = [oracle.features(family, "sdpa", image) for image in s.images]
        rows = [e.mixed(r.matrix()) for e, r in zip(encoded, decisions[i], strict=True)]
        kept, answer = [r.kept for r in decisions[i]], tokens[i].tolist()
        by_hand = oracle.logits(models.unhooked(family), family, s, kept, rows, answer[:-1], policy)
        assert deviation("from the hand reference (law 2)", logits[i], by_hand) <= noise(family)
        assert by_hand.argmax(-1).tolist() == answer


@dataclass(frozen=True)
class Cell:
    """A batch of videos and images with one method."""

    family: str
    spec: str
    scope: str = ""
    kind: str = field(default="mixed-videos", init=False)

    def __str__(self) -> str:
        return "-".join(filter(None, (self.family, self.spec, self.scope)))

    @property
    def samples(self):
        return prompts.batch(self.family, self.kind)

    def generate(self, samples):
        return run(self.family, samples, self.spec, **({"budget_scope": self.scope} if self.scope else {}))

    @cached_property
    def run(self):
        return self.generate(self.samples)


@pytest.fixture(scope="module", params=[Cell(f, *spec) for f, spec in product(families.VIDEO_FAMILIES, SPECS)], ids=str)
def cell(request):
    return replace(request.param)  # its cached run goes with it


def test_oracle(cell, deviation):
    assert_oracle(cell.family, cell.kind, *cell.run, deviation)


def test_each_row_is_its_own_run(cell, deviation):
    """Law 3."""
    logits, tokens, decisions = cell.run
    for i, s in enumerate(cell.samples):
        if any(image.frames for image in s.images):
            own_logits, answer, (own,) = cell.generate([s])
            assert deviation("of a row from its own run (law 3)", logits[i], own_logits[0]) <= noise(cell.family)
            assert answer[0].tolist() == tokens[i].tolist()
            assert [r.kept.tolist() for r in own] == [r.kept.tolist() for r in decisions[i]]


def test_conservation(cell):
    """Law 5: every token is somewhere, weights are averages, budgets are kept."""
    for s, decisions in zip(cell.samples, cell.run[2], strict=True):
        assert [r.total for r in decisions] == [image.tokens for image in s.images]
        for image, decision in zip(s.images, decisions, strict=True):
            assert_conserved(image, decision, cell.spec, cell.scope)


def assert_conserved(one, r, spec, scope):
    assert bool((r.kept.diff() > 0).all())
    assert set(r.source.tolist()) - {-1} == set(range(r.slots))
    torch.testing.assert_close(r.weight_sums, torch.ones(r.slots))
    method, newlines = tokensieve.parse(spec)[0], one.newlines
    if one.frames is None:
        assert r.whole == method.needs.requests("video") or r.slots < r.total or r.notes
        if method.needs.requests("video"):
            assert "this is an image" in r.notes[0]
        return
    patches = [token for token in r.kept.tolist() if token not in newlines]
    if scope == "clip" or spec.startswith(("fastvid", "flashvid", "trsm", "vidcom2", "v-cast")):
        assert len(patches) == method.keep
    if scope == "frame":
        h, w = one.grid
        size = h * w + (len(newlines) == one.frames)
        per_frame = [sum(token // size == t for token in patches) for t in range(one.frames)]
        assert per_frame == [method.keep] * one.frames


@each_family
def test_oracle_with_eager_attention(family, deviation):
    samples = prompts.batch(family, "ragged-videos")
    logits, tokens, decisions = run(family, samples, "fastvid(keep=10)", attention="eager")
    assert_oracle(family, "ragged-videos", logits, tokens, decisions, deviation)
    _, _, others = run(family, samples, "fastvid(keep=10)")
    for row, other in zip(decisions, others, strict=True):
        assert [r.kept.tolist() for r in row] == [r.kept.tolist() for r in other]


@each_family
def test_rows_without_patches_stay_with_their_frame(family):
    """[CLS] rows of frames that keep nothing go; the newline that ends a video stays."""
    (s,) = prompts.batch(family, "video")
    _, _, ((r,),) = run(family, [s], [[only_frames(s.images[0], (0, 2))]], steps=1)
    _, _, ((uniform,),) = run(family, [s], "evs(keep=1)", steps=1)  # the first frame and nothing else
    newlines, kept = s.images[0].newlines, set(uniform.kept.tolist())
    assert r.slots < r.total
    if family == "video-llava-frames":
        assert kept & set(newlines) == {newlines[0]}
    else:
        assert kept & set(newlines) == set(newlines)


def only_frames(one, frames):
    size = one.tokens // one.frames
    return tokensieve.Reduction(one.tokens, torch.cat([torch.arange(size) + t * size for t in frames]))


@pytest.mark.parametrize("policy", ["original", "contiguous"])
@each_family
def test_whole_frames_may_go(family, policy, deviation):
    """Runs of placeholders between timestamps may become empty; positions and the text between stay right."""
    samples = prompts.batch(family, "ragged-videos")
    replay = [[only_frames(one, (1,)) for one in s.images] for s in samples]
    logits, tokens, decisions = run(family, samples, replay, positions=policy)
    assert_oracle(family, "ragged-videos", logits, tokens, decisions, deviation, policy)


@each_family
def test_identity(family):
    model, inputs = models.tiny_model(family), prompts.collate(family, prompts.batch(family, "mixed-videos"))
    expected = models.unhooked(family).generate(**inputs, max_new_tokens=2, **prompts.GREEDY)
    for spec in ("full", "evs(keep=1.0)", "fastvid(keep=1.0)", "holitom(keep=1000)"):
        with tokensieve.attach(model, spec):
            out = model.generate(**inputs, max_new_tokens=2, **prompts.GREEDY)
        assert torch.equal(torch.stack(out.logits), torch.stack(expected.logits)), spec
    after = model.generate(**inputs, max_new_tokens=2, **prompts.GREEDY)
    assert torch.equal(torch.stack(after.logits), torch.stack(expected.logits))


@each_family
def test_nothing_is_left_behind(family):
    model = models.tiny_model(family)
    inputs = prompts.collate(family, prompts.batch(family, "mixed-videos"))
    model.generate(**inputs, max_new_tokens=1)
    before = models.footprint(model)
    with tokensieve.attach(model, "fastvid(keep=5)"):
        model.generate(**inputs, max_new_tokens=1)
        assert models.footprint(model) != before
    assert models.footprint(model) == before


@torch.no_grad()
@each_family
def test_a_plain_forward_is_generates_first_step(family, deviation):
    model, inputs = models.tiny_model(family), prompts.collate(family, prompts.batch(family, "mixed-videos"))
    for spec in ("evs(keep=0.5)", "fastervlm(keep=5)"):
        with tokensieve.attach(model, spec):
            first = model.generate(**inputs, max_new_tokens=1, **prompts.GREEDY).logits[0]
            plain = model(**inputs).logits[:, -1]
        assert deviation("of a plain forward", plain, first) <= noise(family)


@each_family
def test_a_second_turn_on_the_cache_equals_the_one_shot_run(family, deviation):
    model, samples = models.tiny_model(family), prompts.batch(family, "mixed-videos")
    inputs, cache = prompts.collate(family, samples), DynamicCache(config=models.tiny_model(family).config.text_config)
    with tokensieve.attach(model, "evs(keep=0.5)"):
        first = model.generate(**inputs, max_new_tokens=3, past_key_values=cache, **prompts.GREEDY)
        ones = torch.ones(len(samples), 8, dtype=torch.long)
        words = torch.arange(11, 16).expand(len(samples), -1)
        turn = {"input_ids": torch.cat([first.sequences, words], 1)}
        turn["attention_mask"] = torch.cat([inputs["attention_mask"], ones], 1)
        if "mm_token_type_ids" in inputs:
            turn["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], 0 * ones.int()], 1)
        again = model.generate(**{**inputs, **turn}, max_new_tokens=3, **prompts.GREEDY)
        grids = {name: inputs[name] for name in ("image_grid_thw", "video_grid_thw") if name in inputs}
        second = model.generate(**turn, **grids, max_new_tokens=3, past_key_values=cache, **prompts.GREEDY)
    assert deviation("of a second turn (law 4)", torch.stack(second.logits), torch.stack(again.logits)) <= noise(family)
    assert torch.equal(second.sequences, again.sequences)


@each_family
def test_beams_of_a_batch_are_those_of_each_row(family):
    model, samples = models.tiny_model(family), prompts.batch(family, "mixed-videos")
    beams = {"num_beams": 2, "num_return_sequences": 2, "max_new_tokens": 3, "do_sample": False}
    with tokensieve.attach(model, "evs(keep=0.5)") as sieve:
        together = model.generate(**prompts.collate(family, samples), **beams)[:, -3:]
        decided = [[r.kept.tolist() for r in row] for row in sieve.last]
        assert [len(row) for row in decided] == [len(s.images) for s in samples]
        for i in (0, 1):
            own = model.generate(**prompts.collate(family, [samples[i]]), **beams)[:, -3:]
            assert together[2 * i : 2 * i + 2].tolist() == own.tolist()
            assert [r.kept.tolist() for r in sieve.last[0]] == decided[i]


@pytest.mark.parametrize("spec", DECODER)
@pytest.mark.parametrize("family", [family for family in families.VIDEO_FAMILIES if family != "qwen3.5"])
def test_inside_the_llm_a_row_is_its_own_run(family, spec, deviation):
    samples = prompts.batch(family, "mixed-videos")
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
    """The attention that a method receives of each frame is that of the frame as a video of its own."""
    (s,) = prompts.batch(family, "video")
    (one,) = s.images
    _, _, ((r,),) = run(family, [s], "fastervlm(keep=5)", steps=1)
    packed = family in families.QWEN_VIDEO
    per_frame = one.pixels.unflatten(0, (one.frames, -1)).unbind() if packed else one.pixels.split(1, 1)
    scores = []
    for pixels in per_frame:
        lonely = prompts.video(family, 1, *one.grid)
        lonely = replace(lonely, inputs={**lonely.inputs, "pixel_values_videos": pixels})
        alone = families.Sample([families.BOS, *[families.VIDEO] * lonely.tokens, 7], [lonely])
        _, _, ((decision,),) = run(family, [alone], "fastervlm(keep=5)", steps=1)
        scores.append(patch_scores(decision, lonely))
    torch.testing.assert_close(patch_scores(r, one), torch.cat(scores))


def patch_scores(r, one):
    newlines = one.newlines
    return torch.tensor([score for token, score in enumerate(r.scores.tolist()) if token not in newlines])


@torch.no_grad()
@pytest.mark.parametrize("family", list(families.VIDEO_SIDE))
def test_attention_by_hand(family):
    """Towers of tiles: eager attention, averaged over a token's patches as the family makes the token of them."""
    (s,) = prompts.batch(family, "video")
    (one,) = s.images
    _, _, ((r,),) = run(family, [s], "fastervlm(keep=5)", steps=1)
    base = models.unhooked(family, "eager").model
    tower = base.video_tower if family == "video-llava-frames" else base.vision_tower
    attention = tower(one.pixels[0], output_attentions=True).attentions[-2].mean(1)
    if family == "llava-onevision-frames":  # no [CLS]: attention received
        side = families.VIDEO_SIDE[family]
        plane = attention.mean(1).view(-1, 1, side, side)
        expected = interpolate(plane, size=one.grid, mode="bilinear").flatten()
    else:
        expected = attention[:, 0, 1:].flatten()
        if family == "llava-next-video-frames":
            side = families.VIDEO_SIDE[family]
            expected = expected.view(-1, side // 2, 2, side // 2, 2).mean((2, 4)).flatten()
    torch.testing.assert_close(patch_scores(r, one), expected, atol=1e-6, rtol=1e-4)


def test_timestamps_are_not_the_users_words():
    """Qwen3-VL's text between frames must not tell a method what the user asks."""
    family, received = "qwen3-vl", []

    class Spy(Method):
        info = tokensieve.parse("trsm")[0].info

        def reduce(self, image):
            received.append(image.user_text)
            return image.keep(torch.arange(3).expand(len(image.features), -1))

    (s,) = prompts.batch(family, "video")
    run(family, [s], Spy(), steps=1)
    (text,) = received
    words = models.unhooked(family).get_input_embeddings()(torch.tensor(s.ids[-6:]))  # six words after the video
    torch.testing.assert_close(text.features[text.mask], words)
    _, _, outer = run(family, [s], "evs(keep=0.5) + text-correlation(layer=1, keep=3)", steps=1)
    assert outer[0][0].slots == 3


# -- refusals -------------------------------------------------------------------------------------------------------


def test_a_video_method_needs_a_video():
    family = "qwen3-vl"
    sample = [prompts.batch(family, "mixed-videos")[3]]
    with pytest.raises(ValueError, match=r"evs\(keep=0.5\) reduces videos; there is none in this prompt"):
        run(family, sample, "evs(keep=0.5)")
    with pytest.raises(ValueError, match=r"reduces videos, which is not supported in LLaVA-1\.5"):
        tokensieve.attach(models.tiny_model("llava-clip"), "evs")


def test_impossible_scopes_and_prompts_are_refused():
    with pytest.raises(ValueError, match="LLaVA-OneVision pools videos after its projector"):
        run("llava-onevision-frames", prompts.batch("llava-onevision-frames", "video"), "visionzip(keep=9)")
    with pytest.raises(ValueError, match="budget_scope must be one of"):
        tokensieve.attach(models.tiny_model("qwen3-vl"), "evs", budget_scope="second")
    with pytest.raises(ValueError, match=r"gives a method one frame at a time; evs\(keep=0.25\) compares frames"):
        tokensieve.attach(models.tiny_model("qwen3-vl"), "evs", budget_scope="frame")
    with pytest.raises(ValueError, match=r"'sample' would share with images, which evs\(keep=0.25\) leaves whole"):
        tokensieve.attach(models.tiny_model("qwen3-vl"), "evs", budget_scope="sample")
    with pytest.raises(ValueError, match="budget_scope='frame' is not for methods that act in the decoder"):
        tokensieve.attach(models.tiny_model("qwen3-vl"), "fastv(layer=1)", budget_scope="frame")
    family = "llava-next-video-frames"
    s = prompts.sample(family, (3, 0, 4), ((2, 2, 3), 0), 1)
    first, image = s.ids.index(families.VIDEO), s.ids.index(families.IMAGE)
    ids = list(s.ids)
    ids[first + 3], ids[image] = families.IMAGE, families.VIDEO
    with pytest.raises(ValueError, match="an image stands between the frames of a video"):
        run(family, [families.Sample(ids, s.images)], "evs(keep=0.5)")
