"""The laws of a learned query beside the prompt, against a prompt to which its row was really appended."""

import pytest
import torch

import tokensieve
from tests.support import families, models, oracle, prompts
from tokensieve.methods.registry import find

LAYER, NOISE = 3, 2e-5
SPEC = f"glimpse-prune(layer={LAYER}, weights='random')"


@pytest.fixture
def received(monkeypatch):
    """What the method receives, per group of equal images, with the predictor's logits."""
    cls, images = find("glimpse-prune"), []
    original = cls.logits

    def logits(self, image):
        images.append((image, original(self, image)))
        return images[-1][1]

    monkeypatch.setattr(cls, "logits", logits)
    return images


def appended(family, sample, net, kept=None):
    """Attention logits of the row to itself and all columns, `[H, L + 1]`, by hand; and the columns of each image."""
    model = models.unhooked(family)
    kept = kept or oracle.everything(sample)
    encoded = [
        oracle.Encoded(e.rows[k], [plane[k] for plane in e.planes])
        for e, k in zip(oracle.encode(model, family, sample), kept, strict=True)
    ]
    sequence = oracle.enter(model, family, sample, kept, encoded, [])
    decoder = oracle.language_model(model)
    # the last row is the query's
    positions = torch.cat([sequence.positions, sequence.positions[:, -1:] + 1], 1)
    positions = positions[:, None] if families.family(family).axes == 3 else positions
    hidden = torch.cat([sequence.rows, torch.zeros_like(sequence.rows[:1])])[None]
    length = hidden.shape[1]
    mask = torch.zeros(1, 1, length, length).masked_fill(torch.ones(length, length).triu(1).bool(), -1e30)
    for number, layer in enumerate(decoder.layers[:LAYER]):
        row = net.le_proj(net.learnable_embeddings[number, 0])
        row = net.le_norm.weight * row / (row.square().mean() + decoder.config.rms_norm_eps).sqrt()
        hidden = torch.cat([hidden[:, :-1], hidden[:, -1:] + row], 1)
        rope = decoder.rotary_emb(hidden, positions)
        if number == LAYER - 1:
            return scores(layer, hidden[0], rope), sequence.images
        hidden = layer(hidden, attention_mask=mask, position_ids=None, position_embeddings=rope)
        if number < len(sequence.planes):
            hidden = hidden + torch.cat([sequence.planes[number], torch.zeros(1, hidden.shape[-1])])
    raise AssertionError


def scores(layer, rows, rope):
    """Scaled products of the last row's query with all keys, `[H, L]`, written out for Llama and Qwen."""
    module, rows, (cos, sin) = layer.self_attn, layer.input_layernorm(rows), rope

    def rotated(projection, norm):
        x = projection(rows).view(len(rows), -1, module.head_dim)
        x = (x if norm is None else norm(x)).transpose(0, 1)
        a, b = x.chunk(2, -1)
        return x * cos[0] + torch.cat([-b, a], -1) * sin[0]

    query = rotated(module.q_proj, getattr(module, "q_norm", None))[:, -1:]
    keys = rotated(module.k_proj, getattr(module, "k_norm", None))
    return (query @ keys.repeat_interleave(len(query) // len(keys), 0).mT)[:, 0] / module.head_dim**0.5


@pytest.mark.parametrize("read", ["logits", "log"])
@pytest.mark.parametrize(("attention", "kind"), [("sdpa", "mixed"), ("eager", "ragged")])
@pytest.mark.parametrize("family", families.DEEP)
@torch.no_grad()
def test_oracle(family, attention, kind, read, received, deviation):
    """Law 2: the attention of the query is that of a row behind the prompt; in a ragged batch, of each row alone."""
    model, samples = models.tiny_model(family, attention), prompts.batch(family, kind)
    with tokensieve.attach(model, SPEC, attention=read) as sieve:
        model(**prompts.collate(family, samples))
    calls = [(a, image.total) for image, _ in received for a in image.query_attention]
    for sample in samples:
        if not sample.images:
            continue
        by_hand, columns = appended(family, sample, sieve.nets["decoder"])
        by_hand = by_hand.log_softmax(-1) if read == "log" else by_hand
        for of_image in columns:
            rows = [a for a, total in calls if total == len(of_image)]
            nearest = min((a - by_hand[:, of_image]).abs().max() for a in rows)
            assert deviation("of the query's attention from an appended row (law 2)", nearest, 0 * nearest) <= NOISE
    assert len(calls) == sum(len(sample.images) for sample in samples)


@pytest.mark.parametrize("family", families.DEEP)
@torch.no_grad()
def test_behind_a_connector_method(family, received, deviation):
    """The query sees the tokens that are left, and the predictor the encoder states of the same ones."""
    model, (sample,) = models.tiny_model(family), prompts.batch(family, "single")
    with tokensieve.attach(model, f"divprune(keep=7) + {SPEC}") as sieve:
        model(**prompts.collate(family, [sample]))
    kept = sieve.entered[0][0].kept
    ((image, _),) = received
    by_hand, (columns,) = appended(family, sample, sieve.nets["decoder"], [kept.tolist()])
    assert deviation("behind a connector method", image.query_attention[0], by_hand[:, columns]) <= NOISE
    received.clear()
    with tokensieve.attach(model, SPEC):
        model(**prompts.collate(family, [sample]))
    ((whole, _),) = received
    assert len(whole.encoder_states) > 1
    for layer, states in whole.encoder_states.items():
        assert torch.equal(image.encoder_states[layer][0], states[0, kept])
    assert torch.equal(image.coordinates[0], whole.coordinates[0, kept])


@pytest.mark.parametrize("family", families.DEEP)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_identity_and_detach(family, attention):
    """Law 1: while all tokens stay, the query changes no bit; detaching leaves the model as it was."""
    model, inputs = models.tiny_model(family, attention), prompts.collate(family, prompts.batch(family, "mixed"))
    state, footprint = {name: w.clone() for name, w in model.state_dict().items()}, models.footprint(model)
    plain = model(**inputs, use_cache=True)
    with tokensieve.attach(model, SPEC, threshold=0.0) as sieve:
        same = model(**inputs, use_cache=True)
        assert all(decision.whole for row in sieve.last for decision in row)
        assert model.state_dict().keys() == state.keys()
    assert torch.equal(plain.logits, same.logits)
    for before, after in zip(plain.past_key_values.layers, same.past_key_values.layers, strict=True):
        assert torch.equal(before.keys, after.keys)
    assert models.footprint(model) == footprint
    assert all(torch.equal(w, state[name]) for name, w in model.state_dict().items())
    assert torch.equal(model(**inputs).logits, plain.logits)


@pytest.mark.parametrize("family", families.DEEP)
def test_gradients_reach_the_net_alone(family, received):
    """They pass through the frozen layers to the rows of all layers before the decision, and no weight gets one."""
    model, samples = models.tiny_model(family), prompts.batch(family, "ragged")
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    model.requires_grad_(False)
    try:
        with tokensieve.attach(model, SPEC) as sieve:
            net = sieve.nets["decoder"].requires_grad_(True).train()
            model(**prompts.collate(family, samples))
            assert all(decision.whole for row in sieve.last for decision in row), "nothing leaves in training"
        torch.stack([logits.square().sum() for _, logits in received]).sum().backward()
        reached = net.learnable_embeddings.grad.abs().sum((1, 2)) > 0
        assert reached.tolist() == [True] * LAYER + [False] * (families.DEPTH - LAYER)
        rest = {name for name, weight in net.named_parameters() if weight.grad is None or not weight.grad.any()}
        assert not rest, "weights of the net without a gradient"
        assert all(weight.grad is None for weight in model.parameters())
    finally:
        for weight in weights:
            weight.requires_grad_(True)


def test_refused():
    model = models.tiny_model(families.DEEP[0])
    refused = {
        "tokenpacker(weights='random')": "each read hidden states of layers of their own",
        "mqt(weights='random')": "each token; those that mqt.* makes have none",
        "tome": "reads hidden states of the vision encoder, in which tome.* acts",
    }
    for before, words in refused.items():
        with pytest.raises(tokensieve.Refusal, match=words):
            tokensieve.attach(model, f"{before} + {SPEC}")
    with pytest.raises(tokensieve.Refusal, match=r"no encoder layer in \(\)"):
        tokensieve.attach(model, f"{SPEC[:-1]}, levels=())")
    with pytest.raises(tokensieve.Refusal, match="repair='size' has a bias for each column"):
        tokensieve.attach(model, SPEC, repair="size")
