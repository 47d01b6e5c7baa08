"""The laws of fusion: identity, rows on their own, reproducible, counts by the rule, nothing left behind."""

import gc

import pytest
import torch
from transformers import ViltForMaskedLM

import tokensieve
from tests.support.crossmodal import (
    HOSTS,
    MODELS,
    SPEC,
    WORDS,
    alone,
    batch,
    bridgetower,
    logits,
    meter,
    meter_pairs,
    meter_retrieval,
    vilt,
    vilt_pairs,
    vilt_retrieval,
)
from tests.support.models import hooks
from tokensieve.ops import attention, epsilon_attention, mask_bias

RELEVANCES = ("mean_head", "first_head", "key_key", "query_key")


@pytest.mark.parametrize("host", HOSTS)
def test_identity(host):
    model, inputs = MODELS[host](), batch()
    plain = logits(model, inputs)
    with tokensieve.attach(model, "pumer(layers=(1,), prune=0, merge=0, merge_text=0)"):
        assert torch.equal(logits(model, inputs), plain)
    with tokensieve.attach(model, SPEC[host]):
        assert not torch.equal(logits(model, inputs), plain)
    assert torch.equal(logits(model, inputs), plain)
    assert hooks(model) == 0


@pytest.mark.parametrize("relevance", RELEVANCES)
@pytest.mark.parametrize("host", HOSTS)
def test_a_row_does_not_know_its_batch(host, relevance, deviation):
    model, inputs = MODELS[host](), batch()
    with tokensieve.attach(model, SPEC[host], relevance=relevance) as sieve:
        together, decisions = logits(model, inputs), sieve.last
        for row, (decision,) in enumerate(decisions):
            own = logits(model, alone(inputs, row))
            assert deviation("fusion: batch", own[0], together[row]) < 1e-5
            assert torch.equal(sieve.last[0][0].source, decision.source)


def test_padded_images_on_their_own(deviation):
    model, inputs = vilt(), batch()
    mask = torch.ones(3, 32, 32, dtype=torch.long)
    mask[1, 24:], mask[2, :, 16:] = 0, 0
    inputs["pixel_values"] = inputs["pixel_values"] * mask[:, None]
    with tokensieve.attach(model, SPEC["vilt"]) as sieve:
        together, decisions = logits(model, {**inputs, "pixel_mask": mask}), sieve.last
        for row, (height, width) in enumerate([(32, 32), (24, 32), (32, 16)]):
            one = alone(inputs, row)
            one["pixel_values"] = one["pixel_values"][..., :height, :width]
            one["pixel_mask"] = mask[row : row + 1, :height, :width]
            assert deviation("fusion: batch", logits(model, one)[0], together[row]) < 1e-5
            assert sieve.last[0][0].slots == decisions[row][0].slots


def test_random_patch_order_does_not_matter():
    model, inputs = vilt(), batch(rows=2)
    with tokensieve.attach(model, SPEC["vilt"]):
        assert torch.equal(logits(model, inputs, seed=1), logits(model, inputs, seed=2))
    torch.manual_seed(5)
    model(**inputs)
    after = torch.rand(1)
    with tokensieve.attach(model, SPEC["vilt"]):
        torch.manual_seed(5)
        model(**inputs)
        assert torch.equal(torch.rand(1), after)  # the random generator is used as before


def test_counts_follow_the_rule():
    model, inputs = vilt(), batch(rows=2, ragged=False)
    with tokensieve.attach(model, SPEC["vilt"]) as sieve, torch.no_grad():
        hidden = model(**inputs, output_hidden_states=True).hidden_states
    text, image, lengths = 11, 17, []
    for layer in range(6):
        lengths.append(text + image)
        if layer in (1, 3):
            left = image - round(0.2 * image)
            image = left - min(round(0.3 * image), (left - 1) // 2)
            text -= min(round(0.25 * text), (text - 1) // 2)
    assert [rows.shape[1] for rows in hidden] == lengths
    assert [decision.slots for (decision,) in sieve.last] == [image, image]


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("merge", [0, 0.3])
def test_one_image_token_is_left(host, merge):
    model, inputs = MODELS[host](), batch()
    with tokensieve.attach(model, "pumer", layers=(0, 1), prune=0.97, merge=merge) as sieve:
        assert logits(model, inputs).isfinite().all()
        assert [decision.kept.tolist() for (decision,) in sieve.last] == [[0]] * 3


def test_shares_of_no_token():
    """By default each share acts alone; in the authors' code merging depends on pruning, and the other way round."""
    inputs = batch(rows=2, ragged=False)
    expected = {  # of 17 image tokens: with official_rounding and without
        ("vilt", 0.02, 0.3): (17, 12),
        ("vilt", 0.1, 0.3): (10, 10),
        ("vilt", 0.1, 0.02): (15, 15),
        ("meter", 0.0, 0.3): (17, 12),
        ("meter", 0.02, 0.3): (12, 12),
        ("meter", 0.1, 0.02): (17, 15),
    }
    for (host, prune, merge), slots in expected.items():
        model = MODELS[host]()
        for official, count in zip((True, False), slots, strict=True):
            spec = f"pumer(layers=(1,), prune={prune}, merge={merge}, official_rounding={official})"
            with tokensieve.attach(model, spec) as sieve:
                logits(model, inputs)
            assert [decision.slots for (decision,) in sieve.last] == [count, count], (host, prune, merge, official)


@pytest.mark.parametrize("host", ["meter", "bridgetower"])
def test_co_attention_has_the_authors_softmax(host):
    """With a sharp padded key the ε matters; ViLT and METER also run against the authors' own numbers."""
    model, inputs, outputs = MODELS[host](), batch(rows=2), {}
    heads = getattr(model, host).cross_modal_text_layers[0].attention.self
    with tokensieve.attach(model, SPEC[host], official_padding=True), torch.no_grad():
        heads.query.weight *= 20
        for name in ("query", "key", "value", ""):
            module = heads.get_submodule(name)
            module.register_forward_hook(lambda module, args, output, name=name: outputs.update({name: output}))
        logits(model, inputs)
    query, key, value = (outputs[n].unflatten(-1, (4, -1)).transpose(1, 2) for n in ("query", "key", "value"))
    bias = mask_bias(inputs["attention_mask"], torch.float32, queries=WORDS)
    output = outputs[""] if host == "meter" else outputs[""][0]
    expected, plain = (softmax(query, key, bias) @ value for softmax in (epsilon_attention, attention))
    assert torch.allclose(output, expected.transpose(1, 2).flatten(2), atol=1e-5)
    assert not torch.allclose(expected, plain, atol=1e-3)


@pytest.mark.parametrize("host", HOSTS)
def test_attention_learns_with_the_authors_padding(host):
    model, inputs = MODELS[host](), batch(rows=2)
    with tokensieve.attach(model.train(), SPEC[host], official_padding=True):
        model(**inputs).logits.sum().backward()
    layers = model.vilt.encoder.layer if host == "vilt" else getattr(model, host).cross_modal_text_layers
    attention = layers[0].attention
    for part in ("query", "key"):
        gradient = getattr(getattr(attention, "attention", None) or attention.self, part).weight.grad
        assert gradient is not None
        assert gradient.abs().sum() > 0


@pytest.mark.parametrize("weights", ["equal", "size"])
@pytest.mark.parametrize("host", HOSTS)
def test_conservation(host, weights):
    model, inputs = MODELS[host](), batch()
    with tokensieve.attach(model, SPEC[host], weights=weights) as sieve:
        logits(model, inputs)
    for (decision,) in sieve.last:
        assert torch.equal(decision.kept, decision.kept.unique())
        assert decision.kept[0] == 0  # the image's [CLS] stays
        assert torch.allclose(decision.weight_sums, torch.ones(decision.slots))
        dropped = int((decision.source < 0).sum())
        assert int(decision.counts.sum()) + dropped == decision.total == 17
        if weights == "size":  # every original token counts the same in its slot
            shares = decision.matrix()
            assert torch.allclose(shares[shares > 0], (1 / decision.counts)[(shares > 0).nonzero()[:, 0]])


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("host", HOSTS)
def test_the_authors_habits_one_by_one(host, padding, order):
    model, inputs = MODELS[host](), batch()
    habits = {"official_order": order, "official_padding": padding}
    with tokensieve.attach(model, SPEC[host], **habits):
        reduced = logits(model, inputs)
        assert reduced.isfinite().all()
        alike = [torch.allclose(logits(model, alone(inputs, row))[0], reduced[row], atol=1e-4) for row in (0, 2)]
    assert alike[0]  # it has no padding
    assert alike[1] != padding


def test_meter_as_the_authors_mask_it():
    model, inputs = meter(own_key_visible=True), batch()
    with tokensieve.attach(model, SPEC["meter"], official_padding=True):
        assert logits(model, inputs).isfinite().all()
    with tokensieve.attach(model, "pumer(layers=(0, 2), prune=0.2, merge=0.3, merge_text=0)") as sieve:
        assert logits(model, inputs).isfinite().all()
        assert sieve.last[0][0].slots == 4


def test_positional_arguments():
    inputs = batch()
    for model in (meter().meter, bridgetower().bridgetower):
        kind = model.config.model_type
        given = (inputs["input_ids"], inputs["attention_mask"])
        more = {"pixel_values": inputs["pixel_values"]}
        with tokensieve.attach(model, SPEC[kind]), torch.no_grad():
            named = model(input_ids=given[0], attention_mask=given[1], **more).pooler_output
            assert torch.equal(model(*given, **more).pooler_output, named)


@pytest.mark.parametrize("host", HOSTS)
def test_bfloat16(host):
    model = MODELS[host]().bfloat16()
    inputs = batch()
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    with tokensieve.attach(model, SPEC[host]):
        reduced = logits(model, inputs)
    assert reduced.dtype == torch.bfloat16
    assert reduced.isfinite().all()


@pytest.mark.parametrize(
    ("make", "images"), [(vilt_pairs, 2), (meter_pairs, 2), (vilt_retrieval, 1), (meter_retrieval, 1)]
)
def test_other_heads(make, images):
    model, inputs = make(), batch(rows=2, images=images)
    plain = logits(model, inputs)
    with tokensieve.attach(model, "pumer(layers=(0, 1))") as sieve:
        reduced = logits(model, inputs)
        assert reduced.shape == plain.shape
        assert not torch.allclose(reduced, plain)
        assert [len(row) for row in sieve.last] == [images, images]
    assert torch.equal(logits(model, inputs), plain)


@pytest.mark.parametrize("host", HOSTS)
def test_gradients_pass_through_merges(host):
    model, inputs = MODELS[host](), batch(rows=2)
    with tokensieve.attach(model.train(), SPEC[host]):
        model(**inputs).logits.sum().backward()
    name = next(n for n, _ in model.named_parameters() if "patch_embedding" in n)
    gradient = model.get_parameter(name).grad
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0


def test_meter_saves_and_loads(tmp_path):
    from transformers import AutoConfig, AutoModel, AutoModelForVisualQuestionAnswering

    model, inputs = meter(), batch(rows=1)
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).text_config.vocab_size == 50
    loaded = AutoModelForVisualQuestionAnswering.from_pretrained(tmp_path)
    assert torch.allclose(logits(loaded, inputs), logits(model, inputs), atol=1e-6)
    assert type(AutoModel.from_pretrained(tmp_path)).__name__ == "MeterModel"


@pytest.mark.parametrize("share", ["prune", "merge", "merge_text"])
@pytest.mark.parametrize("value", [-0.1, 1.0, 1.5])
def test_shares_out_of_range(share, value):
    with pytest.raises(ValueError, match=rf"{share} must be a share in \[0, 1\); got {value}"):
        tokensieve.parse("pumer", **{share: value})


@pytest.mark.parametrize("share", ["prune", "merge", "merge_text"])
@pytest.mark.parametrize("value", ["half", True])
def test_shares_that_are_no_numbers(share, value):
    with pytest.raises(ValueError, match=f"{share} must be a number; got {value!r}"):
        tokensieve.parse("pumer", **{share: value})


@pytest.mark.parametrize("layers", [(2, 1), (1, 1), (-1,)])
def test_layers_that_are_none(layers):
    with pytest.raises(ValueError, match="layers must be layer numbers"):
        tokensieve.parse("pumer", layers=layers)


@pytest.mark.parametrize("layers", [3, (0.5,)])
def test_layers_that_are_no_numbers(layers):
    with pytest.raises(ValueError, match="layers must be a tuple, each item a whole number"):
        tokensieve.parse("pumer", layers=layers)


@pytest.mark.parametrize(("make", "depth"), [(vilt, 5), (meter, 3), (bridgetower, 3)])
def test_layers_that_do_not_exist(make, depth):
    model = make()
    with pytest.raises(ValueError, match=rf"0 to {depth - 1}; got layers=\(2, 9\)"):
        tokensieve.attach(model, "pumer(layers=(2, 9))")
    assert hooks(model) == 0
    tokensieve.attach(model, "pumer(layers=(1,))").detach()


@pytest.mark.parametrize("host", HOSTS)
def test_no_text(host):
    model, inputs = MODELS[host](), batch(rows=2, ragged=False)
    padded = {**inputs, "attention_mask": torch.tensor([[1] * 11, [0] * 11])}
    empty = {**inputs, "input_ids": inputs["input_ids"][:, :0], "attention_mask": inputs["attention_mask"][:, :0]}
    with tokensieve.attach(model, SPEC[host]):
        for bad, row in ((padded, 1), (empty, 0)):
            with pytest.raises(ValueError, match=f"sample {row} has no text"):
                logits(model, bad)
        assert logits(model, inputs).isfinite().all()  # a refusal leaves nothing behind


def test_impossible_prompts_and_models_are_refused():
    words = vilt(ViltForMaskedLM)
    with pytest.raises(ValueError, match="reads every text token"):
        tokensieve.attach(words, SPEC["vilt"])
    with tokensieve.attach(words, "pumer(layers=(1,), merge_text=0)"):
        assert logits(words, batch(rows=2)).shape[:2] == (2, 11)
    model = vilt()
    with pytest.raises(ValueError, match="acts alone"):
        tokensieve.attach(model, "vtc-cls + pumer")
    with pytest.raises(ValueError, match="no positions"):
        tokensieve.attach(model, SPEC["vilt"], positions="contiguous")
    with tokensieve.attach(model, SPEC["vilt"]), pytest.raises(ValueError, match="attached to this model already"):
        tokensieve.attach(model, "pumer")
    forgotten = vilt()
    tokensieve.attach(forgotten, SPEC["vilt"])  # the hooks keep what the caller did not
    gc.collect()
    with pytest.raises(ValueError, match="attached to this model already"):
        tokensieve.attach(forgotten, "pumer")
    model.gradient_checkpointing_enable()
    model.train()
    with tokensieve.attach(model, SPEC["vilt"]), pytest.raises(ValueError, match="gradient checkpointing"):
        model(**batch(rows=1))


def test_only_cross_modal_encoders():
    from tests.support.families import CORE
    from tests.support.models import build

    with pytest.raises(ValueError, match="no cross-modal encoder; supported: vilt, meter, bridgetower"):
        tokensieve.attach(build(CORE[0]), "pumer")
