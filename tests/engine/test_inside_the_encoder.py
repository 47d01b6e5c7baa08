"""Inside the tower, beyond the laws: evidence behind a cut, other feature layers, shapes, costs, training, refusals."""

import re
import threading
from itertools import pairwise

import pytest
import torch

import tokensieve
from tests.methods.encoder.rules import ADAPTIVE, FAMILIES, RULES, tome
from tests.support import encoder_oracle, families, models, oracle, prompts
from tests.support.encoder_oracle import Rule
from tests.support.methods import evidence
from tests.support.oracle import NOISE
from tokensieve.measure import count_flops

each_family = pytest.mark.parametrize("family", FAMILIES)
EVERY = [0, 1, 2]


def forward(model, family, samples, spec, **more):
    with tokensieve.attach(model, spec) as sieve, torch.no_grad():
        logits = model(**prompts.collate(family, samples), **more).logits
        return logits, sieve.last


def largest(scores, k):
    return sorted(sorted(range(len(scores)), key=lambda i: -float(scores[i]))[:k])


# -- a connector method behind it -------------------------------------------------------------------------------------


def arrivals(rows, layer):
    """`[K, n]`: how what ``layer`` attends to makes up the tokens that are left, in raster order."""
    order = sorted(range(len(rows.places)), key=rows.places.__getitem__)
    made = torch.eye(len(rows.places))[order]
    for stage in sorted(rows.matrices, reverse=True):
        if stage >= layer:
            made = made @ rows.matrices[stage]
    return made


@pytest.mark.parametrize("first", ["tome(keep=12)", "illava-encoder(keep=0.4)", "adaptive"])
@each_family
def test_evidence_of_every_layer_is_about_the_tokens_that_are_left(family, first):
    """Attention adds up in merged tokens; keys and rows are their means. Layer 3 is behind the features."""
    spec = ADAPTIVE[family] if first == "adaptive" else first
    rule = RULES.get(spec) or Rule(tome([4, 5, 4]), EVERY, proportional=True)
    all_layers = dict.fromkeys(("cls_attention", "attention_received", "encoder_keys"), slice(None))
    needs = tokensieve.Needs(**all_layers, patches=True)

    samples, model = prompts.batch(family, "mixed"), models.unhooked(family)
    groups, decisions = evidence(models.tiny_model(family), prompts.collate(family, samples), needs, spec)
    images = {tuple(rows[0, :4].tolist()): (image, i) for image in groups for i, rows in enumerate(image.patches)}
    for s, row in zip(samples, decisions, strict=True):
        for shown, decision in zip(s.images, row, strict=True):
            with torch.no_grad():
                hand = encoder_oracle.run(model.model.vision_tower, shown.pixels, rule)
            x, special = hand.states[3][0][hand.specials :], hand.specials
            left = arrivals(hand, 3) @ x
            ((image, i),) = (v for k, v in images.items() if torch.allclose(torch.tensor(k), left[0, :4], atol=1e-4))
            torch.testing.assert_close(image.patches[i], left, atol=1e-4, rtol=1e-4)
            assert image.grid is None or len(left) == 25
            assert decision.slots == len(left) - 1
            for layer in range(4):
                made, attention = arrivals(hand, layer), hand.attention[layer].mean(0)
                received = attention.mean(0)[special:]
                from_cls = attention[0, 1:] if special else received
                sums = (made != 0).float()
                torch.testing.assert_close(image.attention_received[layer][i], sums @ received, atol=1e-5, rtol=1e-4)
                torch.testing.assert_close(image.cls_attention[layer][i], sums @ from_cls, atol=1e-5, rtol=1e-4)
                keys = hand.keys[layer][:, special:].transpose(0, 1).flatten(1)
                got = image.encoder_keys[layer][i].flatten(1)
                torch.testing.assert_close(got, made @ keys, atol=1e-4, rtol=1e-4)


def test_two_stages_keep_the_tokens_with_the_largest_evidence(deviation):
    """tome, then vtc-cls: the ensemble of all layers, each in terms of the merged tokens; and the logits by hand."""
    family, k = "llava-clip", 4
    samples, model = prompts.batch(family, "mixed"), models.unhooked(family)
    logits, decisions = forward(models.tiny_model(family), family, samples, f"tome(keep=0.5) + vtc-cls(keep={k})")
    for i, s in enumerate(samples):
        kept, rows = [], []
        for shown, decision in zip(s.images, decisions[i], strict=True):
            with torch.no_grad():
                hand = encoder_oracle.run(model.model.vision_tower, shown.pixels, RULES["tome(keep=0.5)"])
                found, places, mixed = encoder_oracle.features(model, hand, 3)
            scores = sum(
                (arrivals(hand, layer) != 0).float() @ hand.attention[layer].mean(0)[0, 1:] for layer in range(3)
            )
            chosen = largest(scores, k)
            assert decision.kept.tolist() == [places[c] for c in chosen]
            torch.testing.assert_close(decision.matrix(), mixed[chosen], atol=1e-5, rtol=0)
            kept.append([places[c] for c in chosen])
            rows.append(oracle.Encoded(found[chosen], []))
        hand_logits = oracle.logits(model, family, s, kept, rows, [])
        assert deviation("from the hand reference (law 2)", logits[i, -1], hand_logits[-1]) <= NOISE


@pytest.mark.parametrize("first", ["tome(keep=12)", "illava-encoder(keep=12)", "adaptive"])
@each_family
def test_before_every_kind_of_method(family, first):
    """Rows of a batch equal their own runs; methods that need a grid say that there is none any more."""
    model, samples = models.tiny_model(family), prompts.batch(family, "ragged")
    first = ADAPTIVE[family] if first == "adaptive" else first
    then = ["visionzip(keep=4)", "prumerge", "fopru(keep=4)", "scope(keep=4)", "divprune(keep=4)", "trsm(keep=4)"]
    then += ["cls-knee"] if family == "llava-clip" else []
    for second in [*then, "fastv(layer=1, keep=3)", "visionzip(keep=6) + illava-llm(layer=2, keep=3)"]:
        logits, decisions = forward(model, family, samples, f"{first} + {second}")
        for i, s in enumerate(samples):
            own, own_decisions = forward(model, family, [s], f"{first} + {second}")
            assert own_decisions[0][0].kept.tolist() == decisions[i][0].kept.tolist(), second
            assert (own[0, -1] - logits[i, -1]).abs().max() <= NOISE, second
    with pytest.raises(ValueError, match="needs tokens on a grid"):
        forward(model, family, samples, f"{first} + pool(keep=4)")


# -- other features, shapes -------------------------------------------------------------------------------------------


def with_features(family, layer):
    model = models.build(family)
    if isinstance(layer, list):
        wide = torch.nn.Linear(32 * len(layer), 64)
        torch.nn.init.normal_(wide.weight, std=0.2)
        model.model.multi_modal_projector.linear_1 = wide
    model.config.vision_feature_layer = layer
    return model


@pytest.mark.parametrize(("layer", "used"), [(-1, 4), (1, 1), (3, 3), (-3, 2), ([1, -2], 3), ([-1, 2], 4)])
@each_family
def test_features_of_other_layers(family, layer, used, deviation):
    """The budget is met where the features come from; layers behind that lose nothing more."""
    model, (s,) = with_features(family, layer), prompts.batch(family, "two-images")
    counts = {4: [22, 19, 16, 13], 3: [21, 17, 13], 2: [19, 13], 1: [13]}[used]
    leave = [a - b for a, b in zip([25, *counts[:-1]], counts, strict=True)]
    logits, (decisions,) = forward(model, family, [s], "tome(keep=13)")
    rule, rows = Rule(tome(leave), list(range(used)), proportional=True), []
    for shown, decision in zip(s.images, decisions, strict=True):
        with torch.no_grad():
            hand = encoder_oracle.run(model.model.vision_tower, shown.pixels, rule)
            found = []
            for state in [layer] if isinstance(layer, int) else layer:
                x, places = hand.states[state]
                found.append(x[hand.specials :][[places.index(p) for p in sorted(hand.places)]])
            rows.append(oracle.Encoded(model.model.multi_modal_projector(torch.cat(found, -1)), []))
        assert decision.kept.tolist() == sorted(hand.places)
        assert decision.slots == 13
    kept = [r.kept for r in decisions]
    by = oracle.logits(model, family, s, kept, rows, [])
    assert deviation("from the hand reference (law 2)", logits[0, -1], by[-1]) <= NOISE


@pytest.mark.parametrize("spec", RULES)
@each_family
def test_the_encoder_returns_its_native_shapes(family, spec):
    model, shown = models.tiny_model(family), prompts.batch(family, "two-images")[0].images
    pixels = torch.cat([image.pixels for image in shown])
    with tokensieve.attach(model, spec), torch.no_grad():
        out = model.model.get_image_features(pixels, output_hidden_states=True)
    last = models.unhooked(family).model.vision_tower.post_layernorm if family == "llava-siglip" else (lambda x: x)
    for i, image in enumerate(shown):
        with torch.no_grad():
            hand = encoder_oracle.run(models.unhooked(family).model.vision_tower, image.pixels, RULES[spec])
        states = [*out.hidden_states, out.last_hidden_state]
        expected = [*hand.states, (last(hand.states[-1][0]), hand.places)]
        for got, (x, places) in zip(states, expected, strict=True):
            full = torch.zeros(25 + hand.specials, x.shape[-1])
            full[: hand.specials] = x[: hand.specials]
            full[[p + hand.specials for p in places]] = x[hand.specials :]
            torch.testing.assert_close(got[i], full, atol=1e-4, rtol=1e-4)


# -- costs ------------------------------------------------------------------------------------------------------------


def layer_flops(family, before, after):
    """One layer of which attention sees ``before`` tokens and the MLP ``after``; 32 wide, MLP 64."""
    special = int(family == "llava-clip")
    n, m = before + special, after + special
    return 4 * 2 * n * 32 * 32 + 2 * 2 * n * n * 32 + 2 * 2 * m * 32 * 64


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@each_family
def test_later_layers_compute_less(family, attention):
    """FLOPs of the encode call fall by what the layers save, less the products that the matching itself needs."""
    model = models.tiny_model(family, attention)
    pixels = torch.cat([image.pixels for image in prompts.batch(family, "two-images")[0].images])

    def cost():
        with torch.no_grad():
            return count_flops(lambda: model.model.get_image_features(pixels))

    full, counts = cost(), [25, 18, 10, 5, 5]
    with tokensieve.attach(model, "tome(keep=5)"):
        reduced = cost()
    layers = [layer_flops(family, a, b) for a, b in pairwise(counts)]
    matching = sum(2 * (n // 2) * (n - n // 2) * 8 for n in counts[:3])
    head = 0
    if family == "llava-siglip":  # the pooling head projects keys and values of what is left, and attends
        head = (25 - 5) * 2 * 2 * 32 * 32 + (25 - 5) * 2 * 2 * 32
    saved = 4 * layer_flops(family, 25, 25) - sum(layers) - matching + head
    assert full - reduced == 2 * saved
    assert reduced < 0.7 * full


# -- training, threads ------------------------------------------------------------------------------------------------


@each_family
def test_gradients_are_those_by_hand(family, deviation):
    model, twin = models.build(family), models.build(family)
    (s,) = prompts.batch(family, "two-images")
    inputs = prompts.collate(family, [s])
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == families.IMAGE, -100)
    with tokensieve.attach(model, "tome(keep=5)") as sieve:
        model(**inputs, labels=labels).loss.backward()
        kept = [r.kept for r in sieve.last[0]]
    rows = [encoder_oracle.run(twin.model.vision_tower, i.pixels, RULES["tome(keep=5)"]) for i in s.images]
    rows = [encoder_oracle.encoded(twin, r, 3)[0] for r in rows]
    logits = oracle.forward(twin, family, oracle.enter(twin, family, s, kept, rows, []))
    target = labels[0, oracle.kept_columns(s, kept)]
    torch.nn.functional.cross_entropy(logits[:-1], target[1:]).backward()
    for name, parameter in model.model.vision_tower.encoder.layers.named_parameters():
        other = twin.model.vision_tower.encoder.layers.get_parameter(name)
        assert (parameter.grad is None) == (other.grad is None), name
        if parameter.grad is not None:
            assert deviation("of a gradient", parameter.grad, other.grad) <= 1e-4, name


def test_gradient_checkpointing_of_the_encoder_is_refused():
    model = models.build("llava-clip").train()
    inputs = prompts.collate("llava-clip", prompts.batch("llava-clip", "single"))
    model.gradient_checkpointing_enable()  # the name in every supported release
    with (
        tokensieve.attach(model, "tome(keep=5)"),
        pytest.raises(ValueError, match="gradient checkpointing runs layers"),
    ):
        model(**inputs)


@each_family
def test_two_threads(family):
    model = models.tiny_model(family)
    jobs = [prompts.collate(family, prompts.batch(family, name)) for name in ("two-images", "ragged")]
    got = {}
    with tokensieve.attach(model, "tome(keep=9) + vtc-cls(keep=5)"), torch.no_grad():
        expected = [model(**job).logits for job in jobs]

        def work(thread):
            for turn in range(4):
                job = (thread + turn) % 2
                with torch.no_grad():
                    got[thread, turn] = torch.equal(model(**jobs[job]).logits, expected[job])

        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        [t.start() for t in threads]
        [t.join() for t in threads]
    assert len(got) == 8
    assert all(got.values())


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", families.CORE_QWEN)
@pytest.mark.parametrize("spec", ["tome(keep=5)", "illava-encoder + illava-llm", "mustdrop-encoder"])
def test_packed_encoders_are_refused(family, spec):
    model = models.tiny_model(family)
    before = models.footprint(model)
    with pytest.raises(ValueError, match=r"not supported in Qwen.*: its patches run packed"):
        tokensieve.attach(model, spec)
    assert models.footprint(model) == before


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("illava-encoder(layers=(1, 3))", "layers 0 to 2 of this vision encoder, those that the features come from"),
        ("illava-encoder(layers=(2, 1))", "in ascending order; got [2, 1]"),
        ("mustdrop-encoder(layer=-1)", "layers 0 to 2 of this vision encoder"),
        ("mustdrop-encoder(window=1)", "window must be a whole number of patches >= 2; got 1"),
        ("tome(keep=0)", "keep must be a whole number"),
        ("tome + illava-encoder", "two methods of the same stage cannot be combined"),
        ("tome(inflection=2.0)", "inflection must be in [-1, 1]; got 2.0"),
        ("tome(r=-1)", "r must be a whole number >= 0; got -1"),
    ],
)
@each_family
def test_refusals_when_attaching(family, spec, reason):
    model = models.tiny_model(family)
    before = models.footprint(model)
    with pytest.raises(ValueError, match=re.escape(reason)):
        tokensieve.attach(model, spec)
    assert models.footprint(model) == before


@each_family
def test_refusals_when_called(family, monkeypatch):
    model, samples = models.tiny_model(family), prompts.batch(family, "ragged")
    for spec, more, reason in (
        ("tome(keep=3)", {}, "3 of 25 tokens are out of reach: 3 layers"),
        ("mustdrop-encoder(window=6)", {}, "needs tokens on a grid of at least a window; got (5, 5)"),
        ("tome(keep=9)", {"vision_feature_layer": -1}, "this call takes its features from layer 3"),
    ):
        with pytest.raises(ValueError, match=re.escape(reason)):
            forward(model, family, samples, spec, **more)
    tower = model.model.vision_tower
    monkeypatch.setattr(tower.config, "_attn_implementation_internal", "flash_attention_2")
    for spec in ("tome(keep=9)", "mustdrop-encoder"):
        with pytest.raises(ValueError, match="adds to attention scores, which flash_attention_2 cannot"):
            forward(model, family, samples, spec)
    monkeypatch.undo()
    forward(model, family, samples, "tome(keep=9)")


@each_family
def test_a_call_that_fails_on_its_way_leaves_nothing_behind(family):
    model, samples = models.tiny_model(family), prompts.batch(family, "ragged")
    tower, inputs = model.model.vision_tower, prompts.collate(family, samples)
    with torch.no_grad():
        plain = tower(inputs["pixel_values"]).last_hidden_state
        with tokensieve.attach(model, "tome(keep=9)"):
            expected = model(**inputs).logits
            broken = tower.encoder.layers[1].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model(**inputs)
            broken.remove()
            assert torch.equal(tower(inputs["pixel_values"]).last_hidden_state, plain), "a direct call is not reduced"
            assert torch.equal(model(**inputs).logits, expected)


@pytest.mark.parametrize("method", ["hiprune", "vscan"])
def test_a_method_for_grids_refuses_tokens_that_form_none(method):
    model = models.tiny_model("llava-clip")
    with (
        tokensieve.attach(model, f"tome(keep=0.7) + {method}(keep=5)"),
        pytest.raises(tokensieve.Refusal, match=f"{method} needs tokens on a grid; these 18 tokens have none"),
    ):
        model(**prompts.collate("llava-clip", prompts.batch("llava-clip", "single")))
