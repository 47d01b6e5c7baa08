"""The laws of registers, which are learned rows behind each image, against a wider prompt by hand.

The hand reference runs the unmodified LLM on the prompt, the visual tokens, the rows of the net and the text. No column
leaves it: from a layer on, a mask hides the columns of the image, but not those of its registers.
"""

from functools import cache

import pytest
import torch
from torch import Tensor

import tokensieve
from tests.support import families, models, oracle, prompts

STEPS, LAYER, NOISE = 4, 2, 2e-5
SPEC = f"victor(layer={LAYER}, keep=0.2, weights='random')"
BEHIND = f"divprune(keep=7) + victor(layer={LAYER}, keep=3, weights='random')"


@cache
@torch.no_grad()
def run(family, attention, kind, policy="original", spec=SPEC, row=None):
    """Greedy steps with the method attached: logits `[row, step, vocabulary]`, tokens, cache, sieve."""
    model, samples = models.tiny_model(family, attention), prompts.batch(family, kind)
    samples = samples if row is None else [samples[row]]
    with tokensieve.attach(model, spec, positions=policy) as sieve:
        out = model.generate(**prompts.collate(family, samples), max_new_tokens=STEPS, **prompts.GREEDY)
    return torch.stack(out.logits, 1), out.sequences[:, -STEPS:], out.past_key_values, sieve


def rows_of(sieve) -> Tensor:
    return sieve.nets["decoder"].rows


def widened(sequence: oracle.Sequence, rows: list[Tensor]) -> tuple[oracle.Sequence, Tensor]:
    """Insert rows `[R, D]` behind each image, by hand; returns the sequence and `[L]` bool, True on visual tokens."""
    parts = {name: [] for name in ("rows", "planes", "positions", "visual")}
    shift, start, at = 0, 0, {image[-1]: number for number, image in enumerate(sequence.images) if image}
    for column in range(len(sequence.rows)):
        parts["rows"].append(sequence.rows[column][None])
        parts["planes"].append(sequence.planes[:, column : column + 1])
        parts["positions"].append(sequence.positions[:, column : column + 1] + shift)
        parts["visual"].append(sequence.image_of[column][None] >= 0)
        if column not in at:
            continue
        added = rows[at[column]]
        last = int(sequence.places[at[column]].max()) + shift
        numbered = torch.arange(last + 1, last + 1 + len(added)).expand(len(sequence.positions), -1)
        parts["rows"].append(added)
        parts["planes"].append(sequence.planes.new_zeros(len(sequence.planes), *added.shape))
        parts["positions"].append(numbered)
        parts["visual"].append(torch.zeros(len(added), dtype=torch.bool))
        shift, start = shift + len(added), start + len(added)
    joined = {name: torch.cat(of_name, int(name in ("planes", "positions"))) for name, of_name in parts.items()}
    sequence.rows, sequence.planes, sequence.positions = joined["rows"], joined["planes"], joined["positions"]
    sequence.prompt += shift
    return sequence, joined["visual"]


def hidden_run(family, sample, rows, answer, policy="original", kept=None) -> Tensor:
    """Logits after the prompt and each token of the answer, by hand; differentiable."""
    model = models.unhooked(family)
    kept = kept or oracle.everything(sample)
    encoded = [
        oracle.Encoded(e.rows[k], [plane[k] for plane in e.planes])
        for e, k in zip(oracle.encode(model, family, sample), kept, strict=True)
    ]
    sequence = oracle.enter(model, family, sample, kept, encoded, answer)
    # the registers follow the image's last token, whether a method before the LLM has dropped it or not
    numbered = oracle.positions(family, sample)[0]
    sequence.places = [numbered[:, columns] for columns in oracle.image_columns(sample)]
    sequence, visual = widened(sequence, rows)
    decoder, length = oracle.language_model(model), len(visual)
    future = torch.ones(length, length).triu(1).bool()
    hidden, stay = sequence.rows[None], ~visual
    changed = any(map(len, rows))
    for number, layer in enumerate(decoder.layers):
        blocked = future | (visual & (number >= LAYER) & changed)
        positions = sequence.positions
        if policy == "contiguous" and changed:
            present = stay if number >= LAYER else torch.ones_like(stay)
            positions = (present.long().cumsum(0) - 1).expand_as(positions)
        positions = positions[:, None] if families.family(family).axes == 3 else positions
        hidden = layer(
            hidden,
            attention_mask=torch.zeros(1, 1, length, length).masked_fill(blocked, -1e30),
            position_ids=positions[:1] if positions.ndim == 2 else positions[0],
            position_embeddings=decoder.rotary_emb(hidden, positions),
        )
        if number < len(sequence.planes):
            hidden = hidden + sequence.planes[number] * (visual & ((number < LAYER) | (not changed)))[:, None]
    return model.lm_head(decoder.norm(hidden)[0])[sequence.prompt - 1 :]


WAYS = [("sdpa", "ragged"), ("sdpa", "mixed"), ("eager", "two-images"), ("eager", "mixed")]


@pytest.mark.parametrize("policy", ["original", "contiguous"])
@pytest.mark.parametrize(("attention", "kind"), WAYS)
@pytest.mark.parametrize("family", families.DEEP)
def test_oracle(family, attention, kind, policy, deviation):
    """Law 2: the logits of every greedy step are those of the wider prompt by hand."""
    logits, answers, _, sieve = run(family, attention, kind, policy)
    for row, sample in enumerate(prompts.batch(family, kind)):
        rows = [rows_of(sieve)[: round(0.2 * image.tokens)] for image in sample.images]
        with torch.no_grad():
            by_hand = hidden_run(family, sample, rows, answers[row, :-1].tolist(), policy)
        assert deviation("from the wider prompt by hand (law 2)", logits[row], by_hand) <= NOISE
        assert by_hand.argmax(-1).tolist() == answers[row].tolist()


@pytest.mark.parametrize("family", families.DEEP)
def test_behind_a_connector_method(family, deviation):
    """The registers stand behind the tokens that enter the LLM, with the ids that follow the whole image's."""
    logits, answers, _, sieve = run(family, "sdpa", "two-images", spec=BEHIND)
    (sample,), (entered,) = prompts.batch(family, "two-images"), sieve.entered
    rows, kept = [rows_of(sieve)[:3]] * 2, [decision.kept.tolist() for decision in entered]
    with torch.no_grad():
        by_hand = hidden_run(family, sample, rows, answers[0, :-1].tolist(), kept=kept)
    assert deviation("from the wider prompt by hand (law 2)", logits[0], by_hand) <= NOISE
    assert [decision.added for decision in sieve.last[0]] == [3, 3]
    assert all(not decision.kept.numel() and decision.slots == 3 for decision in sieve.last[0])


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
    """Law 6: the counts that users see are the columns that layers compute on, registers among them."""
    _, _, cache, sieve = run(family, "sdpa", "mixed")
    samples, widest = prompts.batch(family, "mixed"), [0] * families.DEPTH
    for sample, tokens in zip(samples, sieve.tokens, strict=True):
        expected = [(image.tokens, round(0.2 * image.tokens)) for image in sample.images]
        assert tokens == [[n + r] * LAYER + [r] * (families.DEPTH - LAYER) for n, r in expected]
        gained = [sum(of_image[layer] for of_image in tokens) for layer in range(families.DEPTH)]
        visual = sum(image.tokens for image in sample.images)
        widest = [max(w, len(sample.ids) - visual + n) for w, n in zip(widest, gained, strict=True)]
    assert [layer.keys.shape[-2] for layer in cache.layers] == [n + STEPS - 1 for n in widest]
    assert cache.get_seq_length() == max(len(sample.ids) for sample in samples) + STEPS - 1, "as the caller counts"


@pytest.mark.parametrize("family", families.DEEP)
@pytest.mark.parametrize("policy", ["original", "contiguous"])
@torch.no_grad()
def test_a_second_question_on_the_cache(family, policy, deviation):
    """Text that follows on a cache with registers, several tokens at once and padded, is as in one prompt."""
    model, samples = models.tiny_model(family), prompts.batch(family, "ragged")
    with tokensieve.attach(model, SPEC, positions=policy):
        answers, logits = prompts.second_question(model, family, samples)
    sieve = run(family, "sdpa", "ragged", policy)[3]
    for row, sample in enumerate(samples):
        rows = [rows_of(sieve)[: round(0.2 * image.tokens)] for image in sample.images]
        by_hand = hidden_run(family, sample, rows, answers[row], policy)[-2:]
        assert deviation("of the second turn from the wider prompt by hand", logits[row], by_hand) <= NOISE


@pytest.mark.parametrize("family", families.DEEP)
def test_identity_and_detach(family, deviation):
    """Law 1: where the budget covers the image, nothing is added; detaching restores the model bit for bit."""
    model, inputs = models.tiny_model(family), prompts.collate(family, prompts.batch(family, "mixed"))
    state = {name: weight.clone() for name, weight in model.state_dict().items()}
    with torch.no_grad():
        plain = model(**inputs).logits
        footprint = models.footprint(model)
        with tokensieve.attach(model, "victor(keep=1.0, weights='random')") as sieve:
            assert deviation("of the whole image (law 1)", model(**inputs).logits, plain) == 0
            assert all(decision.whole for row in sieve.last for decision in row)
        with tokensieve.attach(model, SPEC):
            assert model.state_dict().keys() == state.keys()
            assert not torch.equal(model(**inputs).logits[:, -1], plain[:, -1])
        assert models.footprint(model) == footprint
        assert torch.equal(model(**inputs).logits, plain)
    assert all(torch.equal(weight, state[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("family", families.DEEP)
def test_gradients_reach_the_registers_alone(family):
    """They are those of the wider prompt by hand; no weight of the model has one."""
    model, (sample,) = models.tiny_model(family), prompts.batch(family, "single")
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    model.requires_grad_(False)
    try:
        with tokensieve.attach(model, SPEC) as sieve:
            rows = rows_of(sieve).requires_grad_(True)
            model(**prompts.collate(family, [sample]), use_cache=False).logits[0, -1].logsumexp(-1).backward()
            count = sieve.last[0][0].added
        by_hand = rows.detach()[:count].clone().requires_grad_(True)
        hidden_run(family, sample, [by_hand], [])[-1].logsumexp(-1).backward()
        assert torch.allclose(rows.grad[:count], by_hand.grad, atol=1e-4)
        assert bool((rows.grad[:count].abs().sum(-1) > 0).all())
        assert not rows.grad[count:].any()
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
    with tokensieve.attach(model, SPEC):
        looked_up = model.generate(
            **prompts.collate(family, samples[:1]), max_new_tokens=STEPS, prompt_lookup_num_tokens=2, do_sample=False
        )
        assert looked_up[0, -STEPS:].tolist() == run(family, "sdpa", "ragged")[1][0].tolist()
        together = model.generate(**prompts.collate(family, samples), **beams)[:, -STEPS:]
        alone = [model.generate(**prompts.collate(family, [sample]), **beams)[0, -STEPS:] for sample in samples]
    assert torch.equal(together, torch.stack(alone))


def test_an_average_over_the_layers_counts_the_registers():
    """A connector method's average is solved for with the registers that pass the first layers."""
    family = families.DEEP[0]
    spec = f"divprune(keep='layers:10') + victor(layer={LAYER}, keep=6, weights='random')"
    (layers,) = run(family, "sdpa", "single", spec=spec)[3].tokens[0]
    assert layers == [12 + 6] * LAYER + [6] * (families.DEPTH - LAYER)  # (2 · 18 + 4 · 6) / 6 = 10


def test_training_steps_draw_nested_sets():
    """A step in training mode lets the first rows take part, as many as it draws; evaluation lets all."""
    model, inputs = (
        models.tiny_model(families.DEEP[0]),
        prompts.collate(families.DEEP[0], prompts.batch(families.DEEP[0], "two-images")),
    )
    torch.manual_seed(0)
    counts = set()
    with torch.no_grad(), tokensieve.attach(model, "victor(layer=2, keep=16, weights='random')") as sieve:
        sieve.nets["decoder"].train()
        for _ in range(12):
            model(**inputs)
            (images,) = sieve.last
            assert images[0].added == images[1].added
            counts.add(images[0].added)
        sieve.nets["decoder"].eval()
        model(**inputs)
        assert [image.added for image in sieve.last[0]] == [16, 16]
    assert min(counts) >= 1
    assert max(counts) <= 16
    assert len(counts) > 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "victor(keep=0, weights='random')"}, "keep must be"),
        ({"method": "victor(keep='layers:8', weights='random')"}, "no parameter 'average'"),
        ({"method": SPEC, "repair": "size"}, "registers"),
        ({"method": SPEC, "budget_scope": "sample"}, "adds registers to each image"),
        ({"method": f"trsm(keep=9) + {SPEC}", "reselect": True}, "has added registers"),
        ({"method": "victor(layer=0, weights='random')"}, "layers 1 to 5"),
    ],
)
def test_refused_at_attach(options, words):
    with pytest.raises(tokensieve.Refusal, match=words):
        tokensieve.attach(models.tiny_model(families.DEEP[0]), **options)


@torch.no_grad()
def test_refused_in_a_prefill():
    """More registers than the net has; a replay; a video."""
    family = families.DEEP[1]
    model, inputs = models.tiny_model(family), prompts.collate(family, prompts.batch(family, "single"))
    with tokensieve.attach(model, SPEC) as sieve:
        model(**inputs)
        decisions = sieve.last
        sieve.nets["decoder"].rows.data = rows_of(sieve)[:2]
        with pytest.raises(tokensieve.Refusal, match="have 2 registers"):
            model(**inputs)
    with pytest.raises(tokensieve.Refusal, match="registers are rows of a net"):
        tokensieve.attach(model, decisions)
    clip = prompts.collate(family, prompts.batch(family, "video"))
    with tokensieve.attach(model, SPEC), pytest.raises(tokensieve.Refusal, match="videos are not supported"):
        model(**clip)


def test_decisions_are_stored_with_their_registers(tmp_path):
    decision = run(families.DEEP[0], "sdpa", "mixed")[3].last[0][0]
    decision.save(tmp_path / "decision.safetensors")
    for read in (tokensieve.Reduction.from_json(decision.to_json()),
                 tokensieve.Reduction.load(tmp_path / "decision.safetensors")):  # fmt: skip
        assert (read.added, read.slots, read.total) == (5, 5, 25)
    assert decision.source.tolist() == [-1] * 25
    assert decision.matrix().shape == (5, 25)
    assert not decision.matrix().any()
    assert decision.counts.tolist() == [0] * 5
    assert "5 registers" in repr(decision)
