"""The laws for the connector methods of the zoo: tiny models of every family, real generation, a reference by hand."""

from dataclasses import replace
from functools import cache

import pytest
import torch

import tokensieve
from laws import reference, tiny
from laws.reference import NOISE, Encoded
from tokensieve import Reduction
from tokensieve.tokens import ConnectorTokens

STEPS = 3
SPECS = (
    "visionzip(keep=9)",
    "visionzip(keep=9, combine='mean', before_projector=False)",
    "visionzip(keep=5, contextual=0)",
    "prumerge",
    "prumerge(keep=6, neighbours=4)",
    "prumerge(keep=1)",
    "prumerge(keep=6, before_projector=False)",
    "prumerge+",
    "prumerge+(keep=7)",
    "prumerge+(top=3, stride=4, offset=1)",
    "vispruner(keep=8)",
    "vispruner(keep=7, important=0.3, step=2, sinks=0.1)",
    "hired(keep=6)",
    "hired(keep=5, spatial=3)",
    "fopru(keep=6)",
    "fopru(keep=7, select='row')",
    "cdpruner(keep=6)",
    "scope(keep=6)",
    "mmtok(keep=6)",
    "holov(keep=6, windows=4)",
    "holov(keep=6, windows=4, rank='holistic')",
    "par(keep=6, threshold=0.3)",
    "setok-cluster(threshold=9, fallback=3)",
    "setok-cluster(threshold=0.9)",
)


# the first spec of each method, for what is sampled; each of them leaves fewer tokens of every image
METHODS = tuple({spec.split("(")[0]: spec for spec in reversed(SPECS)}.values())
OTHER_WAYS = (("sdpa", "contiguous"), ("eager", "original"), ("eager", "contiguous"))


@cache
def encoded(family, scenario, attention="sdpa"):
    """Per sample and image: rows before the projector `[N, C]`, and the reference's features."""
    model = tiny.pristine(family, attention)
    return [
        [(unprojected(model, family, i), reference.encode(model, family, i)) for i in s.images]
        for s in tiny.scenario(family, scenario)
    ]


@torch.no_grad()
def unprojected(model, family, image):
    """What enters the projector, one row per visual token: found by what comes out."""
    if family in tiny.LLAVA:
        states = model.model.vision_tower(image.pixels[None], output_hidden_states=True).hidden_states[-2]
        return states[0, family == "llava-clip" :]
    tower, (h, w), seen = model.model.visual, image.grid, []
    handle = tower.merger.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    out = tower(image.pixels, grid_thw=torch.tensor([[1, 2 * h, 2 * w]]))
    handle.remove()
    units = seen[0].view(h * w, -1)
    order = torch.cdist(out.pooler_output, tower.merger(seen[0])).argmin(-1)
    assert order.unique().shape == order.shape
    return units[order]


@torch.no_grad()
def project(model, family, rows):
    if family in tiny.LLAVA:
        return model.model.multi_modal_projector(rows)
    return model.model.visual.merger(rows.view(-1, model.config.vision_config.hidden_size))


def by_hand(family, scenario, decisions, attention="sdpa"):
    """The rows that should stand in the sequence, from W: before the projector where the decision says so."""
    model = tiny.pristine(family, attention)
    return [
        [
            features.mixed(r.matrix())
            if r.projected
            else Encoded(project(model, family, r.matrix() @ rows), features.mixed(r.matrix()).planes)
            for (rows, features), r in zip(found, row, strict=True)
        ]
        for found, row in zip(encoded(family, scenario, attention), decisions, strict=True)
    ]


def run(family, samples, method, attention="sdpa", policy="original"):
    model = tiny.subject(family, attention)
    with tokensieve.attach(model, method, positions=policy) as sieve:
        out = model.generate(**tiny.collate(family, samples), max_new_tokens=STEPS, **tiny.GREEDY)
        return torch.stack(out.logits, 1), out.sequences[:, -STEPS:], sieve.last


def assert_as_by_hand(spec, family, scenario, attention, policy, deviation):
    """Laws 2 and 5 of every sample of a batch; what the batch gave."""
    samples = tiny.scenario(family, scenario)
    logits, tokens, decisions = run(family, samples, spec, attention, policy)
    rows = by_hand(family, scenario, decisions, attention)
    for i, s in enumerate(samples):
        for image, r in zip(s.images, decisions[i], strict=True):
            assert r.total == image.tokens == len(r.source)
            assert bool((r.kept.diff() > 0).all())
            assert torch.equal((r.matrix() != 0).sum(-1), r.counts)
        kept, answer = [r.kept for r in decisions[i]], tokens[i].tolist()
        pristine = tiny.pristine(family, attention)
        hand = reference.logits(pristine, family, s, kept, rows[i], policy, answer[: STEPS - 1])
        assert deviation("from the hand reference (law 2)", logits[i], hand) <= NOISE
    return logits, tokens, decisions


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("spec", SPECS)
def test_oracle_and_batch(spec, family, deviation):
    logits, tokens, decisions = assert_as_by_hand(spec, family, "ragged", "sdpa", "original", deviation)
    for i, s in enumerate(tiny.scenario(family, "ragged")):
        own_logits, own_tokens, own = run(family, [s], spec)
        assert [r.kept.tolist() for r in own[0]] == [r.kept.tolist() for r in decisions[i]]
        assert deviation("of a batch row from its own run (law 3)", logits[i], own_logits[0]) <= NOISE
        assert own_tokens[0].tolist() == tokens[i].tolist()


@pytest.mark.parametrize(("attention", "policy"), OTHER_WAYS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("spec", METHODS)
def test_eager_attention_and_contiguous_positions(spec, family, attention, policy, deviation):
    """Several images per sample, and rows without any; the choice does not depend on the attention kernel."""
    logits, tokens, decisions = assert_as_by_hand(spec, family, "mixed", attention, policy, deviation)
    usual = run(family, tiny.scenario(family, "mixed"), spec)[2]
    assert [[r.kept.tolist() for r in row] for row in decisions] == [[r.kept.tolist() for r in row] for row in usual]
    s = tiny.scenario(family, "mixed")[0]
    own_logits, own_tokens, _ = run(family, [s], spec, attention, policy)
    assert deviation("of a batch row from its own run (law 3)", logits[0], own_logits[0]) <= NOISE
    assert own_tokens[0].tolist() == tokens[0].tolist()


@pytest.mark.parametrize("family", ["llava-clip", "qwen2.5-vl"])
@pytest.mark.parametrize("spec", ["prumerge", "visionzip(keep=9)", "setok-cluster(threshold=0.9)"])
def test_several_images_beams_and_replay(spec, family):
    samples = tiny.scenario(family, "mixed")
    logits, tokens, decisions = run(family, samples, spec)
    rows = by_hand(family, "mixed", decisions)
    for i, s in enumerate(samples):
        kept, answer = [r.kept for r in decisions[i]], tokens[i].tolist()
        hand = reference.logits(tiny.pristine(family), family, s, kept, rows[i], "original", answer[: STEPS - 1])
        assert (logits[i] - hand).abs().max() <= NOISE
    again = [[Reduction.from_json(r.to_json()) for r in row] for row in decisions]
    assert torch.equal(run(family, samples, again)[0], logits)

    model, one = tiny.subject(family), [samples[0]]
    beams = {"num_beams": 3, "do_sample": False, "max_new_tokens": STEPS}
    with tokensieve.attach(model, spec):
        together = model.generate(**tiny.collate(family, samples), **beams)[0, -STEPS:]
        alone = model.generate(**tiny.collate(family, one), **beams)[0, -STEPS:]
    assert together.tolist() == alone.tolist()


def test_adaptive_methods_keep_different_numbers_in_one_batch():
    family = "llava-clip"
    samples = tiny.scenario(family, "ragged")
    for spec in ("prumerge", "prumerge+"):
        *_, decisions = run(family, samples, spec)
        assert len({row[0].slots for row in decisions}) > 1, spec


@pytest.mark.parametrize("policy", ["original", "contiguous"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_identity(family, attention, policy):
    """Keeping all changes no bit, and what is attached leaves no trace."""
    model, inputs = tiny.subject(family, attention), tiny.collate(family, tiny.scenario(family, "mixed"))
    before = tiny.footprint(model)
    with torch.no_grad():
        plain = model(**inputs).logits
        for spec in METHODS:
            if "keep" in tokensieve.parse(spec)[0].info.parameters:
                with tokensieve.attach(model, spec.split("(")[0], keep=1.0, positions=policy) as sieve:
                    assert torch.equal(model(**inputs).logits, plain), spec
                assert all(r.whole for row in sieve.last for r in row)
            with tokensieve.attach(model, spec, positions=policy):
                assert model(**inputs).logits.shape[1] < plain.shape[1]
            assert tiny.footprint(model) == before, spec
        assert torch.equal(model(**inputs).logits, plain)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("first", ["downsample(keep=0.6)"])
def test_after_a_smaller_image(family, first):
    """The tower saw a smaller image: evidence and merges are about its tokens."""
    samples = tiny.scenario(family, "ragged")
    for spec in ("visionzip(keep=4)", "prumerge(keep=4)", "scope(keep=4)", "mmtok(keep=4)", "fopru(keep=4)"):
        logits, _, decisions = run(family, samples, f"{first} + {spec}")
        assert all(r.slots == 4 for row in decisions for r in row)
        own, _, own_decisions = run(family, samples[:1], f"{first} + {spec}")
        assert own_decisions[0][0].kept.tolist() == decisions[0][0].kept.tolist()
        assert (own[0] - logits[0]).abs().max() <= NOISE


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("first", ["visionzip(keep=9)", "prumerge+", "par(keep=9, threshold=0.3)"])
def test_before_a_decoder_stage(family, first):
    samples, spec = tiny.scenario(family, "ragged"), f"{first} + fastv(layer=1, keep=3)"
    logits, _, decisions = run(family, samples, spec)
    for i, s in enumerate(samples):
        own, _, own_decisions = run(family, [s], spec)
        assert decisions[i][0].slots <= 3
        assert own_decisions[0][0].kept.tolist() == decisions[i][0].kept.tolist()
        assert (own[0] - logits[i]).abs().max() <= NOISE


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_refusals(family):
    model = tiny.subject(family)
    before = tiny.footprint(model)
    for spec, reason in (
        ("cdpruner(space='joint')", "no parameter 'space'"),
        ("prumerge+(keep=4, top=3)", "either keep, or top"),
        ("visionzip(contextual=1.0)", "share"),
        ("visionzip(combine='sum')", "combine must be"),
        ("visionzip(keep=None)", "keep must be"),
        ("vispruner(step=0)", "step"),
        ("par(route=0)", "route"),
    ):
        with pytest.raises(ValueError, match=reason):
            tokensieve.attach(model, spec)
    assert tiny.footprint(model) == before


# -- the evidence ----------------------------------------------------------------------------------------------------


def seen(registry, family, samples, needs):
    """What a method that needs ``needs`` is given, per group of equal images."""
    from dataclasses import dataclass

    given: list[ConnectorTokens] = []

    @registry.register("spy", paper="test", needs=needs)
    @dataclass(frozen=True)
    class Spy(tokensieve.Method):
        """Look, and keep all but the last."""

        def reduce(self, image: ConnectorTokens) -> Reduction:
            given.append(image)
            return image.keep(torch.arange(image.total - 1).expand(len(image.features), -1))

    with torch.no_grad(), tokensieve.attach(tiny.subject(family), "spy"):
        tiny.subject(family)(**tiny.collate(family, samples))
    return given


def test_clip_evidence_is_what_an_eager_tower_computes(registry):
    family, (s, *_) = "llava-clip", tiny.scenario("llava-clip", "ragged")
    needs = tokensieve.Needs(
        cls_attention=-2,
        cls_attention_single_head=-1,
        attention_received=-2,
        encoder_keys=slice(-2, None),
        patches=True,
    )
    (image,) = seen(registry, family, [s], needs)
    tower = tiny.pristine(family, "eager").model.vision_tower
    with torch.no_grad():
        out = tower(s.images[0].pixels[None], output_attentions=True, output_hidden_states=True)
    attention = out.attentions[-2][0].mean(0)
    torch.testing.assert_close(image.cls_attention[-2][0], attention[0, 1:])
    torch.testing.assert_close(image.attention_received[-2][0], attention.mean(0)[1:])
    torch.testing.assert_close(image.patches[0], out.hidden_states[-2][0, 1:])
    last = tower.encoder.layers[-1]
    with torch.no_grad():
        rows = last.layer_norm1(out.hidden_states[-2][0])
        query, key = last.self_attn.q_proj(rows), last.self_attn.k_proj(rows)
    torch.testing.assert_close(image.encoder_keys[-1][0].flatten(1), key[1:])
    wide = (query[0] @ key.T / query.shape[-1] ** 0.5).softmax(-1)[1:]
    torch.testing.assert_close(image.cls_attention_single_head[-1][0], wide)
    assert image.notes == ()


@pytest.mark.parametrize("family", ["llava-siglip", "qwen2.5-vl", "qwen3-vl"])
def test_towers_without_cls_say_what_stands_in(registry, family):
    samples = tiny.scenario(family, "single")
    needs = tokensieve.Needs(cls_attention=0, attention_received=0, patches=True)
    (image,) = seen(registry, family, samples, needs)
    assert any("no [CLS] token" in note for note in image.notes)
    torch.testing.assert_close(image.cls_attention[0], image.attention_received[0])
    torch.testing.assert_close(image.patches[0], encoded(family, "single")[0][0][0])
    (image,) = seen_again(registry, family, samples)
    assert image.notes == (), "attention received is what was asked for: no substitute"


def seen_again(registry, family, samples):
    registry._registry.pop("spy")
    return seen(registry, family, samples, tokensieve.Needs(attention_received=-1))


def test_cdpruner_says_that_the_joint_space_is_missing():
    family = "llava-clip"
    *_, decisions = run(family, tiny.scenario(family, "single"), "cdpruner(keep=5)")
    assert any("no CLIP text encoder" in note for note in decisions[0][0].notes)


def test_notes_and_projection_survive_composition():
    first = Reduction.identity(6)
    second = replace(Reduction(6, torch.tensor([0, 3])), projected=False, notes=("a",))
    assert second.after(first).projected is False
    third = Reduction(2, torch.tensor([1]))
    assert third.after(second).projected is False
    assert third.after(second).notes == ("a",)
