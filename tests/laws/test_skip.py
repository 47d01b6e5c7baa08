"""The laws of methods whose tokens skip layers, against a loop over the layers by hand.

The hand reference runs the parts of each layer of the unmodified LLM on the rows that take part, one sample at a time
and without a cache, and writes the results back into the whole sequence.
"""

from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from math import cos, pi

import pytest
import torch
from torch import Tensor

import tokensieve
from tests.support import families, models, oracle, prompts
from tests.support.oracle import NOISE
from tokensieve.methods import DecoderNeeds, ModelShape
from tokensieve.methods.skip import SkipMethod
from tokensieve.tokens import DecoderTokens

STEPS, SPEC, FRAMES = 4, "p-mod(weights='random')", "videollm-mod(weights='random')"
BEHIND = f"divprune(keep=7) + {SPEC}"
DEPTH = families.DEPTH


def draw_routers(sieve) -> None:
    """Give the routers weights that rank tokens and whose factors differ."""
    generator = torch.Generator().manual_seed(5)
    for weight in sieve.nets["decoder"].parameters():
        weight.data = torch.randn(weight.shape, generator=generator) * 0.03


@cache
@torch.no_grad()
def run(family, attention, kind, policy="original", spec=SPEC, row=None):
    """Greedy steps with the method attached: logits `[row, step, vocabulary]`, tokens, cache, sieve."""
    model, samples = models.tiny_model(family, attention), prompts.batch(family, kind)
    samples = samples if row is None else [samples[row]]
    with tokensieve.attach(model, spec, positions=policy) as sieve:
        draw_routers(sieve)
        out = model.generate(**prompts.collate(family, samples), max_new_tokens=STEPS, **prompts.GREEDY)
    return torch.stack(out.logits, 1), out.sequences[:, -STEPS:], out.past_key_values, sieve


def counts_of(tokens: int, spec: str = SPEC) -> list[int]:
    """The tokens of an image that each of six layers processes, by the paper's schedule."""
    if spec == FRAMES:
        return [round(0.2 * tokens) if layer % 2 else tokens for layer in range(DEPTH)]
    shares = [cos(layer * pi / (DEPTH - 1)) / 2 + 0.5 for layer in range(DEPTH)]
    return [tokens if share > 0.85 else max(1, int(tokens * max(share, 0.15))) for share in shares]


def choose(net, rows: Tensor, images: list[list[int]], layer: int, spec: str) -> tuple[list[int], Tensor]:
    """Return the rows of `[L, D]` that take part in a layer, and the factors `[L]`, by hand."""
    taking, factors = set(range(len(rows))), torch.ones(len(rows))
    for image in images:
        count = counts_of(len(image), spec)[layer]
        if count == len(image):
            continue
        router = net[str(layer)]
        scores = rows[image] @ router.weight[0] + router.bias[0]
        best = sorted(range(len(image)), key=lambda i: -float(scores[i].detach()))[:count]
        taking -= {column for number, column in enumerate(image) if number not in best}
        of_image = 1 + scores if spec == FRAMES else 1 + 0.2 * torch.tanh(scores)
        factors = factors.index_put((torch.tensor(image),), of_image)
    return sorted(taking), factors


def by_hand(family, sample, net, answer, policy="original", kept=None, spec=SPEC) -> Tensor:
    """Logits after the prompt and each token of the answer; differentiable."""
    model = models.unhooked(family)
    kept = kept or oracle.everything(sample)
    encoded = [
        oracle.Encoded(e.rows[k], [plane[k] for plane in e.planes])
        for e, k in zip(oracle.encode(model, family, sample), kept, strict=True)
    ]
    sequence = oracle.enter(model, family, sample, kept, encoded, answer, policy)
    decoder, rows, images = oracle.language_model(model), sequence.rows, sequence.images
    for number, layer in enumerate(decoder.layers):
        taking, factors = choose(net, rows, images, number, spec)
        places = sequence.positions[:, taking]
        if policy == "contiguous" and len(taking) < len(rows):
            places = torch.arange(len(taking)).expand_as(places)
        places = places[:, None] if families.family(family).axes == 3 else places
        attended = rows[taking] + oracle.Layer(decoder, number, rows[taking], places).attended[0]
        added = layer.mlp(layer.post_attention_layernorm(attended))
        if spec == FRAMES:  # the factor scales what the whole layer adds, and the other rows stay as they are
            output = rows[taking] + factors[taking, None] * (attended + added - rows[taking])
            rows = rows.index_put((torch.tensor(taking),), output)
        else:
            output = attended + factors[taking, None] * added
            rows = (rows * factors[:, None]).index_put((torch.tensor(taking),), output)
        if number < len(sequence.planes):
            rows = rows + sequence.planes[number]
    return model.lm_head(decoder.norm(rows))[sequence.prompt - 1 :]


WAYS = [("sdpa", "mixed"), ("eager", "two-images")]


@pytest.mark.parametrize("policy", ["original", "contiguous"])
@pytest.mark.parametrize(("attention", "kind"), WAYS)
@pytest.mark.parametrize("family", families.DEEP)
def test_oracle(family, attention, kind, policy, deviation):
    """Law 2: the logits of every greedy step are those of the layers by hand."""
    logits, answers, _, sieve = run(family, attention, kind, policy)
    for row, sample in enumerate(prompts.batch(family, kind)):
        with torch.no_grad():
            hand = by_hand(family, sample, sieve.nets["decoder"], answers[row, :-1].tolist(), policy)
        assert deviation("from the layers by hand (law 2)", logits[row], hand) <= NOISE
        assert hand.argmax(-1).tolist() == answers[row].tolist()
        assert all(decision.whole for decision in sieve.last[row]), "no token leaves for good"


@pytest.mark.parametrize("family", families.DEEP)
def test_oracle_where_the_whole_layer_is_scaled(family, deviation):
    logits, answers, _, sieve = run(family, "sdpa", "mixed", spec=FRAMES)
    for row, sample in enumerate(prompts.batch(family, "mixed")):
        with torch.no_grad():
            hand = by_hand(family, sample, sieve.nets["decoder"], answers[row, :-1].tolist(), spec=FRAMES)
        assert deviation("from the layers by hand (law 2)", logits[row], hand) <= NOISE
        assert sieve.tokens[row] == [counts_of(image.tokens, FRAMES) for image in sample.images]


@pytest.mark.parametrize("family", families.DEEP)
def test_behind_a_connector_method(family, deviation):
    logits, answers, _, sieve = run(family, "sdpa", "two-images", spec=BEHIND)
    (sample,), (entered,) = prompts.batch(family, "two-images"), sieve.entered
    kept = [decision.kept.tolist() for decision in entered]
    with torch.no_grad():
        hand = by_hand(family, sample, sieve.nets["decoder"], answers[0, :-1].tolist(), kept=kept)
    assert deviation("from the layers by hand (law 2)", logits[0], hand) <= NOISE
    assert [decision.kept.tolist() for decision in sieve.last[0]] == kept
    assert sieve.tokens == [[counts_of(7)] * 2]


@pytest.mark.parametrize("family", families.DEEP)
def test_a_row_of_a_batch_is_its_own_run(family, deviation):
    """Law 3."""
    logits, answers, _, sieve = run(family, "sdpa", "mixed")
    for row in range(len(logits)):
        own_logits, own_answers, _, own = run(family, "sdpa", "mixed", row=row)
        assert deviation("of a batch row from its own run (law 3)", logits[row], own_logits[0]) <= NOISE
        assert torch.equal(own_answers[0], answers[row])
        assert (own.tokens or [[]])[0] == sieve.tokens[row]


@pytest.mark.parametrize("family", families.DEEP)
def test_tokens_and_cache_columns_of_each_layer(family):
    """Law 6: each layer processes, and its cache holds, the tokens that take part in it."""
    _, _, cache, sieve = run(family, "sdpa", "mixed")
    samples, widest = prompts.batch(family, "mixed"), [0] * DEPTH
    for sample, tokens in zip(samples, sieve.tokens, strict=True):
        assert tokens == [counts_of(image.tokens) for image in sample.images]
        visual = sum(image.tokens for image in sample.images)
        widest = [max(w, len(sample.ids) - visual + sum(n[i] for n in tokens)) for i, w in enumerate(widest)]
    assert [layer.keys.shape[-2] for layer in cache.layers] == [n + STEPS - 1 for n in widest]
    assert cache.get_seq_length() == max(len(sample.ids) for sample in samples) + STEPS - 1, "as the caller counts"


@pytest.mark.parametrize("family", families.DEEP)
@pytest.mark.parametrize("policy", ["original", "contiguous"])
@torch.no_grad()
def test_a_second_question_on_the_cache(family, policy, deviation):
    """Text that follows on the cache, several tokens at once and padded, is as in one prompt."""
    model, samples = models.tiny_model(family), prompts.batch(family, "ragged")
    with tokensieve.attach(model, SPEC, positions=policy) as sieve:
        draw_routers(sieve)
        answers, logits = prompts.second_question(model, family, samples)
    for row, sample in enumerate(samples):
        hand = by_hand(family, sample, sieve.nets["decoder"], answers[row], policy)[-2:]
        assert deviation("of the second turn from the layers by hand", logits[row], hand) <= NOISE


@dataclass(frozen=True)
class Everyone(SkipMethod):
    """All tokens take part in layers 2 and 4, with factors that are 1."""

    def layer_numbers(self, depth):
        return [2, 4]

    def factors(self, scores):
        return 1 + scores

    def reduce(self, image):
        tokens = torch.arange(image.total).expand(len(image.features), -1)
        return image.keep(tokens, self.score(image))


@dataclass(frozen=True)
class Everyone2(Everyone):
    """The same, with factors that scale the whole layer."""

    scales = "layer"


@pytest.mark.parametrize("family", families.DEEP)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_identity_and_detach(registry, family, attention):
    """Law 1: with all tokens taking part and routers of zeros, no bit changes; detaching restores the model."""
    for name, cls in (("everyone", Everyone), ("everyone-2", Everyone2)):
        tokensieve.register(name, paper="none", stage="decoder", trained=True)(cls)
    model = models.tiny_model(family, attention)
    inputs = prompts.collate(family, prompts.batch(family, "mixed"))
    state = {name: weight.clone() for name, weight in model.state_dict().items()}
    with torch.no_grad():
        plain = model(**inputs).logits
        footprint = models.footprint(model)
        for spec in ("everyone(weights='random')", "everyone-2(weights='random')", f"{FRAMES[:-1]}, keep=1.0)"):
            with tokensieve.attach(model, spec):
                assert torch.equal(model(**inputs).logits, plain), spec
        with tokensieve.attach(model, SPEC) as sieve:
            assert model.state_dict().keys() == state.keys()
            assert not torch.equal(model(**inputs).logits[:, -1], plain[:, -1])
            with sieve.paused():
                assert torch.equal(model(**inputs).logits, plain)
        assert models.footprint(model) == footprint
        assert torch.equal(model(**inputs).logits, plain)
    assert all(torch.equal(weight, state[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("family", families.DEEP)
def test_gradients_reach_the_routers_alone(family):
    """They are those of the layers by hand; no weight of the model has one. Labels are taken as they are."""
    model, (sample,) = models.tiny_model(family), prompts.batch(family, "single")
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    model.requires_grad_(False)
    try:
        with tokensieve.attach(model, SPEC) as sieve:
            draw_routers(sieve)
            net = sieve.nets["decoder"].requires_grad_(True)
            inputs = prompts.collate(family, [sample])
            labels = inputs["input_ids"].where(torch.arange(inputs["input_ids"].shape[1]) >= len(sample.ids) - 1, -100)
            loss = model(**inputs, labels=labels, use_cache=False).loss
            loss.backward()
        found = {name: weight.grad.clone() for name, weight in net.named_parameters() if weight.grad is not None}
        net.zero_grad()
        logits = by_hand(family, prompts.Sample(sample.ids[:-1], sample.images), net, sample.ids[-1:])
        expected = torch.nn.functional.cross_entropy(logits[:1], labels[0, -1:])
        assert abs(loss.item() - expected.item()) <= NOISE
        expected.backward()
        assert found.keys() == {f"{layer}.{part}" for layer in (2, 3, 4, 5) for part in ("weight", "bias")}
        for name, weight in net.named_parameters():
            if name in found:
                assert torch.allclose(found[name], weight.grad, atol=1e-4), name
                assert name.startswith("5") or bool(found[name].any()), name
        assert all(weight.grad is None for weight in model.parameters())
    finally:
        for weight in weights:
            weight.requires_grad_(True)


@pytest.mark.parametrize("family", families.DEEP)
@torch.no_grad()
def test_other_ways_to_decode(family):
    """Several columns in one step, and beams: as greedy steps, and as each sample in a run of its own."""
    model, samples = models.tiny_model(family), prompts.batch(family, "ragged")
    beams = {"num_beams": 2, "max_new_tokens": STEPS, "do_sample": False}
    with tokensieve.attach(model, SPEC) as sieve:
        draw_routers(sieve)
        looked_up = model.generate(
            **prompts.collate(family, samples[:1]), max_new_tokens=STEPS, prompt_lookup_num_tokens=2, do_sample=False
        )
        assert looked_up[0, -STEPS:].tolist() == run(family, "sdpa", "ragged")[1][0].tolist()
        together = model.generate(**prompts.collate(family, samples), **beams)[:, -STEPS:]
        alone = [model.generate(**prompts.collate(family, [sample]), **beams)[0, -STEPS:] for sample in samples]
    assert torch.equal(together, torch.stack(alone))


def test_each_frame_has_its_share():
    """Of a video, equally many tokens of each frame take part, those with its largest weights."""
    (method,) = tokensieve.parse(FRAMES)
    net = method.make_net(ModelShape("any", 4, 2))
    torch.nn.init.ones_(net["1"].weight)
    rows = torch.randn(1, 20, 4, generator=torch.Generator().manual_seed(2))
    kept = method(DecoderTokens(rows, frames=2, net=net, layer=1, budget=4))[0].kept
    weights = rows[0].sum(-1)
    best = [(weights[start : start + 10].topk(2).indices + start).sort().values for start in (0, 10)]
    assert kept.tolist() == torch.cat(best).tolist()


def test_an_average_over_the_layers():
    """The largest shift whose average is within the one that is asked for; a connector's average counts the layers."""
    (method,) = tokensieve.parse("p-mod(average=0.4)")
    for depth in (6, 32, 40):
        shares = method.shares(depth)
        assert shares[0] == 1
        assert 0.4 - 0.15 / depth - 0.85 / depth <= sum(shares) / depth <= 0.4
        assert all(later <= earlier for earlier, later in pairwise(shares))
    paper = tokensieve.parse("p-mod")[0].shares(32)
    assert [layer for layer, share in enumerate(paper) if share < 1] == list(range(8, 32))
    spec = f"divprune(keep='layers:10') + {SPEC}"
    (layers,) = run(families.DEEP[0], "sdpa", "single", spec=spec)[3].tokens[0]
    assert layers == counts_of(layers[0])
    assert sum(layers) / DEPTH <= 10 < sum(counts_of(layers[0] + 1)) / DEPTH


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": SPEC, "repair": "size"}, "return behind each layer"),
        ({"method": "p-mod(weights='random', average=0.1)"}, r"out of reach; reachable: 0\.2917 to 1"),
        ({"method": "p-mod(weights='random', shift=2.0)"}, "no token skips a layer"),
        ({"method": "p-mod"}, "no bundled weights"),
        ({"method": "videollm-mod(weights='random', step=0)"}, "step must be at least 1"),
        ({"method": "curious(weights='random')"}, "read their hidden states and nothing more"),
    ],
)
def test_refused_at_attach(registry, options, words):
    needs = DecoderNeeds(attention="last")
    tokensieve.register("curious", paper="none", stage="decoder", needs=needs, trained=True)(Everyone)
    model = models.tiny_model(families.DEEP[0])
    before = models.footprint(model)
    with pytest.raises(tokensieve.Refusal, match=words):
        tokensieve.attach(model, **options)
    assert models.footprint(model) == before


@pytest.mark.parametrize("spec", [SPEC, FRAMES])
@torch.no_grad()
def test_tiles_with_separators(spec):
    """Greedy steps after an image of tiles are those of the whole sequence at once, and counts hold its separators."""
    family = "llava-next"
    model, (sample, *_) = models.tiny_model(family), prompts.batch(family, "single")
    with tokensieve.attach(model, spec) as sieve:
        draw_routers(sieve)
        out = model.generate(**prompts.collate(family, [sample]), max_new_tokens=3, **prompts.GREEDY)
        longer = prompts.Sample([*sample.ids, *out.sequences[0, -3:-1].tolist()], sample.images)
        at_once = model(**prompts.collate(family, [longer])).logits[0, -3:]
        assert torch.allclose(torch.cat(out.logits), at_once, atol=NOISE)
        (layers,) = sieve.tokens[0]
    assert max(layers) == sample.images[0].tokens
    assert min(layers) < max(layers)


@torch.no_grad()
def test_layers_that_run_twice_are_refused():
    model = models.tiny_model("llava-clip")
    inputs = prompts.collate("llava-clip", prompts.batch("llava-clip", "single"))
    model.gradient_checkpointing_enable()
    try:
        with tokensieve.attach(model.train(), SPEC), pytest.raises(tokensieve.Refusal, match="checkpointing runs"):
            model(**inputs)
    finally:
        model.eval().gradient_checkpointing_disable()
