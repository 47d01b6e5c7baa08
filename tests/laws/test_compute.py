"""The laws of methods that do less work on visual rows, against attention and MLP written out by hand.

The hand reference is the authors' simulation: weights on visual keys are set to zero after the softmax, and neurons of
visual rows after their projections. It runs one sample at a time, and without a cache.
"""

from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

import tokensieve
from tests.support import families, models, oracle, prompts
from tests.support.oracle import NOISE
from tokensieve.engine.decoder.compute import places_of
from tokensieve.engine.handoff import ImageReduction
from tokensieve.measure.resources import count_flops
from tokensieve.models import TokenLayout
from tokensieve.reduction import Reduction

STEPS, DEPTH = 4, families.DEPTH
OFF = "yopo(window=None, cut=None, mlp=1.0)"
SPECS = {"yopo": (5, 4, 0.5), "yopo(window=3, cut=2, mlp=0.25)": (3, 2, 0.25), OFF: (None, DEPTH, 1.0)}
SPEC = "yopo(window=3, cut=2, mlp=0.25)"


@pytest.fixture
def heads(tmp_path):
    """Return a file of heads in which the first two heads of layers 1 and 3 are cut."""
    mask = np.ones((DEPTH, 4), dtype=bool)
    mask[[1, 3], :2] = False
    np.save(tmp_path / "heads.npy", mask)
    return str(tmp_path / "heads.npy")


@cache
@torch.no_grad()
def run(family, attention, kind, spec=SPEC, row=None):
    """Greedy steps with the method attached: logits `[row, step, vocabulary]`, tokens, sieve."""
    model, samples = models.tiny_model(family, attention), prompts.batch(family, kind)
    samples = samples if row is None else [samples[row]]
    with tokensieve.attach(model, spec) as sieve:
        out = model.generate(**prompts.collate(family, samples), max_new_tokens=STEPS, **prompts.GREEDY)
    return torch.stack(out.logits, 1), out.sequences[:, -STEPS:], sieve


def visible(sequence, window) -> Tensor:
    """Return which keys each row sees, `[L, L]` bool."""
    length = len(sequence.rows)
    sees = torch.ones(length, length).tril().bool()
    for rows, kept, grid in zip(sequence.images, sequence.kept, sequence.grids, strict=True):
        for query, i in zip(rows, kept, strict=True):
            for key, j in zip(rows, kept, strict=True):
                if window is not None and i // (grid[0] * grid[1]) == j // (grid[0] * grid[1]):
                    (y, x), (v, u) = divmod(i, grid[1]), divmod(j, grid[1])
                    sees[query, key] = max(abs(y - v), abs(x - u)) <= (window - 1) / 2
    return sees


def attended(layer: oracle.Layer, sees: Tensor, counting: Tensor) -> Tensor:
    """Return attention's output `[L, D]`; ``counting`` `[H, 1, L]` multiplies its weights after the softmax."""
    decoder_layer, (cos, sin) = layer.decoder.layers[layer.number], layer.rotary
    module, rows = decoder_layer.self_attn, decoder_layer.input_layernorm(layer.rows)

    def heads(projection, norm=None, rotate=True):
        x = projection(rows).view(len(rows), -1, module.head_dim)
        x = (x if norm is None else norm(x)).transpose(0, 1)
        a, b = x.chunk(2, -1)
        x = x * cos + torch.cat([-b, a], -1) * sin if rotate else x
        return x.repeat_interleave(4 // len(x), 0)

    query, key = (
        heads(module.q_proj, getattr(module, "q_norm", None)),
        heads(module.k_proj, getattr(module, "k_norm", None)),
    )
    scores = query @ key.transpose(-1, -2) / module.head_dim**0.5
    weights = scores.masked_fill(~sees, -torch.inf).softmax(-1) * counting
    return module.o_proj((weights @ heads(module.v_proj, rotate=False)).transpose(0, 1).flatten(1))


def by_hand(family, sample, answer, settings, cut_heads=(), kept=None) -> Tensor:
    """Logits after the prompt and each token of the answer; differentiable."""
    window, cut, share = settings
    model, kept = models.unhooked(family), kept or oracle.everything(sample)
    encoded = [
        oracle.Encoded(e.rows[k], [plane[k] for plane in e.planes])
        for e, k in zip(oracle.encode(model, family, sample), kept, strict=True)
    ]
    sequence = oracle.enter(model, family, sample, kept, encoded, answer)
    decoder, rows, visual = oracle.language_model(model), sequence.rows, sequence.image_of >= 0
    sees = visible(sequence, window)
    for number, layer in enumerate(decoder.layers):
        counting = torch.ones(4, 1, len(rows))
        counting[[head for n, head in cut_heads if n == number]] = (~visual).float()
        if number >= cut:
            counting = counting * ~visual
        after = rows + attended(oracle.Layer(decoder, number, rows, oracle.axes(family, sequence)), sees, counting)
        normed, mlp = layer.post_attention_layernorm(after), layer.mlp
        gate, up = mlp.gate_proj(normed), mlp.up_proj(normed)
        cut_neurons = visual[:, None] & (torch.arange(gate.shape[-1]) >= int(gate.shape[-1] * share))
        hidden = mlp.act_fn(gate.masked_fill(cut_neurons, 0)) * up.masked_fill(cut_neurons, 0)
        rows = after + mlp.down_proj(hidden)
        if number < len(sequence.planes):
            rows = rows + sequence.planes[number]
    return model.lm_head(decoder.norm(rows))[sequence.prompt - 1 :]


WAYS = [("sdpa", "mixed", "yopo"), ("eager", "two-images", SPEC), ("sdpa", "ragged", SPEC), ("eager", "mixed", OFF)]


@pytest.mark.parametrize(("attention", "kind", "spec"), WAYS)
@pytest.mark.parametrize("family", families.DEEP)
@torch.no_grad()
def test_oracle(family, attention, kind, spec, deviation):
    """Law 2: the logits of every greedy step, those behind the prefill too, are those of the layers by hand."""
    logits, answers, sieve = run(family, attention, kind, spec)
    for row, sample in enumerate(prompts.batch(family, kind)):
        hand = by_hand(family, sample, answers[row, :-1].tolist(), SPECS[spec])
        assert deviation("from the layers by hand (law 2)", logits[row], hand) <= NOISE
        assert all(decision.whole and not decision.notes for decision in sieve.last[row])
        assert sieve.tokens[row] == [[image.tokens] * DEPTH for image in sample.images], "no token leaves"


@pytest.mark.parametrize("family", families.DEEP)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_single_heads(family, attention, heads, deviation):
    logits, answers, _ = run(family, attention, "two-images", f"yopo(heads={heads!r}, window=None, cut=None, mlp=1.0)")
    (sample,), cut = prompts.batch(family, "two-images"), [(1, 0), (1, 1), (3, 0), (3, 1)]
    hand = by_hand(family, sample, answers[0, :-1].tolist(), SPECS[OFF], cut)
    assert deviation("from the layers by hand (law 2)", logits[0], hand) <= NOISE
    assert not torch.allclose(logits[0, 0], run(family, attention, "two-images", OFF)[0][0, 0], atol=NOISE)


@pytest.mark.parametrize("family", families.DEEP)
@torch.no_grad()
def test_behind_a_connector_method(family, deviation):
    """A token that stays keeps its place on the image's grid."""
    logits, answers, sieve = run(family, "sdpa", "two-images", f"divprune(keep=7) + {SPEC}")
    (sample,), (entered,) = prompts.batch(family, "two-images"), sieve.entered
    kept = [decision.kept.tolist() for decision in entered]
    hand = by_hand(family, sample, answers[0, :-1].tolist(), SPECS[SPEC], kept=kept)
    assert deviation("from the layers by hand (law 2)", logits[0], hand) <= NOISE
    assert sieve.tokens == [[[7] * DEPTH] * 2]


@pytest.mark.parametrize("family", families.DEEP)
def test_a_row_of_a_batch_is_its_own_run(family, deviation):
    """Law 3."""
    logits, answers, _ = run(family, "sdpa", "mixed", "yopo")
    for row in range(len(logits)):
        own_logits, own_answers, _ = run(family, "sdpa", "mixed", "yopo", row=row)
        assert deviation("of a batch row from its own run (law 3)", logits[row], own_logits[0]) <= NOISE
        assert torch.equal(own_answers[0], answers[row])


@pytest.mark.parametrize("family", ["qwen2.5-vl", "qwen3-vl"])
@torch.no_grad()
def test_frames_of_a_video(family, deviation):
    """Each frame is a grid by itself; pairs of frames stay causal."""
    logits, answers, _ = run(family, "sdpa", "video")
    (sample,) = prompts.batch(family, "video")
    hand = by_hand(family, sample, answers[0, :-1].tolist(), SPECS[SPEC])
    assert deviation("from the layers by hand (law 2)", logits[0], hand) <= NOISE


@pytest.mark.parametrize("family", families.DEEP)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_identity_and_detach(family, attention):
    """Law 1: with every part off, no bit changes; detaching restores the model."""
    model = models.tiny_model(family, attention)
    inputs = prompts.collate(family, prompts.batch(family, "mixed"))
    state = {name: weight.clone() for name, weight in model.state_dict().items()}
    plain, footprint = model(**inputs).logits, models.footprint(model)
    with tokensieve.attach(model, OFF):
        assert torch.equal(model(**inputs).logits, plain)
    with tokensieve.attach(model, SPEC) as sieve:
        assert model.state_dict().keys() == state.keys()
        assert not torch.equal(model(**inputs).logits[:, -1], plain[:, -1])
        with sieve.paused():
            assert torch.equal(model(**inputs).logits, plain)
    assert models.footprint(model) == footprint
    assert torch.equal(model(**inputs).logits, plain)
    assert all(torch.equal(weight, state[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("family", families.DEEP)
@torch.no_grad()
def test_a_second_question_on_the_cache(family, deviation):
    """Text that follows on the cache, several tokens at once, is as in one prompt."""
    model, (sample,) = models.tiny_model(family), prompts.batch(family, "single")
    with tokensieve.attach(model, SPEC):
        (answer,), (logits,) = prompts.second_question(model, family, [sample])
    hand = by_hand(family, sample, answer, SPECS[SPEC])[-2:]
    assert deviation("of the second turn from the layers by hand", logits, hand) <= NOISE


@torch.no_grad()
def test_the_narrow_mlp_saves_its_work():
    """Half the neurons of V visual rows: 3 products of `[V, D]` and `[D, I / 2]` less in each layer."""
    family = families.DEEP[0]
    model, (sample,) = models.tiny_model(family), prompts.batch(family, "single")
    inputs, mlp = prompts.collate(family, [sample]), oracle.language_model(model).layers[0].mlp
    full = count_flops(lambda: model(**inputs))
    with tokensieve.attach(model, "yopo(window=None)"):
        saved = full - count_flops(lambda: model(**inputs))
    assert saved == DEPTH * 3 * 2 * sample.images[0].tokens * mlp.gate_proj.weight.numel() // 2


def test_gradients_are_those_of_the_hand_reference():
    family = families.DEEP[1]
    model, (sample,) = models.tiny_model(family), prompts.batch(family, "single")
    weight = oracle.language_model(model).layers[0].mlp.gate_proj.weight
    inputs = prompts.collate(family, [sample])
    labels = inputs["input_ids"].where(torch.arange(len(sample.ids)) >= len(sample.ids) - 1, -100)
    with tokensieve.attach(model, "yopo"):
        loss = model(**inputs, labels=labels, use_cache=False).loss
        (found,) = torch.autograd.grad(loss, weight)
    own = oracle.language_model(models.unhooked(family)).layers[0].mlp.gate_proj.weight
    logits = by_hand(family, prompts.Sample(sample.ids[:-1], sample.images), sample.ids[-1:], SPECS["yopo"])
    expected = torch.nn.functional.cross_entropy(logits[:1], labels[0, -1:])
    assert abs(loss.item() - expected.item()) <= NOISE
    torch.testing.assert_close(found, torch.autograd.grad(expected, own)[0], atol=1e-4, rtol=1e-4)
    assert bool(found.any())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "yopo", "repair": "size"}, "attach one of the two"),
        ({"method": "yopo(window=4)"}, "window must be an odd number"),
        ({"method": "yopo(window=-1)"}, "window must be an odd number"),
        ({"method": "yopo(cut=6)"}, "cut must be one of layers 0 to 5"),
        ({"method": "yopo(cut=1.5)"}, "cut must be one of layers 0 to 5"),
        ({"method": "yopo(mlp=2.0)"}, "mlp must be a share"),
        ({"method": "yopo(heads='no-such-file.npy')"}, "no NumPy file of heads"),
    ],
)
def test_refused_at_attach(options, words):
    model = models.tiny_model(families.DEEP[0])
    footprint = models.footprint(model)
    with pytest.raises(tokensieve.Refusal, match=words):
        tokensieve.attach(model, **options)
    assert models.footprint(model) == footprint


@pytest.mark.parametrize(
    ("shape", "cut", "words"),
    [((DEPTH, 8), (), "this LLM has"), ((DEPTH, 4), (1,), "heads that share their values")],
)
def test_files_of_heads_that_do_not_fit(tmp_path, shape, cut, words):
    mask = np.ones(shape, dtype=bool)
    mask[2, list(cut)] = False
    np.save(tmp_path / "heads.npy", mask)
    with pytest.raises(tokensieve.Refusal, match=words):
        tokensieve.attach(models.tiny_model(families.DEEP[0]), f"yopo(heads={str(tmp_path / 'heads.npy')!r})")


def test_a_file_with_objects_is_refused(tmp_path):
    """Nothing in a file of heads is executed."""
    np.save(tmp_path / "heads.npy", np.array([print], dtype=object), allow_pickle=True)
    with pytest.raises(tokensieve.Refusal, match="no NumPy file of heads"):
        tokensieve.attach(models.tiny_model(families.DEEP[0]), f"yopo(heads={str(tmp_path / 'heads.npy')!r})")


def test_places_on_the_grids():
    """Each view is a grid by itself; separators stand in none; a token that stays keeps its place."""
    patches = torch.tensor([0, 1, 3, 4, 6, 7])
    layout = TokenLayout(9, ((1, 2), (2, 2)), line=torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2]), patch_index=patches)
    kept = Reduction(9, torch.tensor([1, 2, 4, 6]))
    places = places_of(ImageReduction(layout, kept, kept), tokensieve.parse("yopo")[0])
    assert places.tolist() == [[0, 0, 1], [-1, -1, -1], [1, 0, 1], [1, 1, 0]]


@pytest.mark.parametrize(
    ("family", "words"), [("glm4v", "MLPs of plain linear layers"), ("lighton-ocr", "images whose tokens form grids")]
)
@torch.no_grad()
def test_models_without_a_part_are_refused(family, words):
    model, inputs = models.tiny_model(family), prompts.collate(family, prompts.batch(family, "single"))
    with pytest.raises(tokensieve.Refusal, match=words), tokensieve.attach(model, SPEC):
        model(**inputs)
    with tokensieve.attach(model, "yopo(window=None, cut=1, mlp=1.0)"):
        assert model(**inputs).logits.isfinite().all()


def test_a_window_needs_an_explicit_mask(monkeypatch):
    model = models.tiny_model(families.DEEP[0])
    monkeypatch.setattr(model.model.language_model.config, "_attn_implementation_internal", "flash_attention_2")
    with pytest.raises(tokensieve.Refusal, match=r"sdpa or eager attention.*window=None leaves it out"):
        tokensieve.attach(model, "yopo")
    tokensieve.attach(model, "yopo(window=None)").detach()


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
