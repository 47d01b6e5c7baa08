"""Tokens leave inside LLMs whose blocks do not share one causal mask: windows, both directions, several rotaries.

Which tokens leave is fixed, so that the hand reference decides for itself; prompts are longer than the windows of 20.
"""

from dataclasses import dataclass

import pytest
import torch
from transformers import DynamicCache

import tokensieve
from tests.engine.test_attach import FLASH
from tests.families.test_matrix import collate, each_kernel
from tests.support import families, models, oracle, prompts
from tests.support.oracle import NOISE
from tokensieve.engine.prompt.user_text import UserTextFinder
from tokensieve.methods import DecoderMethod, DecoderNeeds
from tokensieve.models import family_of
from tokensieve.models.family import Family
from tokensieve.models.versions import before_5_23

NAMES = ("gemma3", "paligemma", "aya-vision", "cohere2-vision")
WINDOWS = ("gemma3", "aya-vision", "cohere2-vision")
each_name = pytest.mark.parametrize("name", NAMES)
each_policy = pytest.mark.parametrize("policy", ["original", "contiguous"])


@dataclass(frozen=True)
class Halves(DecoderMethod):
    """Keep every second token at each stage."""

    layers: tuple = (1, 2)

    def reduce(self, image):
        return image.keep(torch.arange(0, image.total, 2).expand(len(image.features), -1))


@pytest.fixture(autouse=True)
def halves(registry):
    tokensieve.register("halves", paper="none", stage="decoder", needs=DecoderNeeds())(Halves)


@pytest.fixture
def more(monkeypatch):
    """Models that are no family of their own: PaliGemma 2 (no SDPA), and windows in every layer."""
    gemma2 = {"sliding_window": 20, "layer_types": families.GEMMA3_LAYERS, "query_pre_attn_scalar": 16, "head_dim": 16}
    gemma2 |= {"attn_logit_softcapping": 2.0, "final_logit_softcapping": None}
    paligemma2 = families.like("paligemma", "paligemma2", llm=families.text("gemma2", **gemma2))
    windows = families.text("mistral", head_dim=16, sliding_window=20)
    for family in (paligemma2, families.like("mistral3", "mistral3-windows", llm=windows)):
        monkeypatch.setitem(families.FAMILIES, family.name, family)


def halved(sample, layers):
    """Return the tokens of each image that are left before each of ``layers``."""
    return {
        layer: [range(0, image.tokens, 2**stage) for image in sample.images] for stage, layer in enumerate(layers, 1)
    }


def assert_as_by_hand(name, attention, layers, policy, deviation, steps=12):
    """Enough steps, and a second turn, for tokens to slide out of the windows."""
    samples, inputs = prompts.batch(name, "one-and-two"), collate(name, "one-and-two")
    with tokensieve.attach(models.tiny_model(name, attention), [Halves(layers)], positions=policy) as sieve:
        out = sieve.model.generate(**inputs, max_new_tokens=steps, **prompts.GREEDY)
        turn = {"input_ids": torch.cat([out.sequences, torch.tensor([[11, 12, 13]] * 3)], 1)}
        turn["attention_mask"] = (turn["input_ids"] != families.PAD).long()
        more = sieve.model.generate(**turn, past_key_values=out.past_key_values, max_new_tokens=3, **prompts.GREEDY)
    got = torch.stack([*out.logits, *more.logits], 1)
    for i, sample in enumerate(samples):
        answer = more.sequences[i, inputs["input_ids"].shape[1] :].tolist()[:-1]
        model, stages = models.unhooked(name, attention), halved(sample, layers)
        by_hand = oracle.logits_inside(model, name, sample, stages, answer, policy=policy)
        by_hand = torch.cat([by_hand[:steps], by_hand[-3:]])
        worst = deviation("inside LLMs with masks of their own (laws 2 to 4)", got[i], by_hand)
        assert worst <= 2 * oracle.noise(name)  # three times the matrix's steps


@each_policy
@pytest.mark.parametrize("layers", [(1, 2), (2,)])
@each_kernel
@each_name
def test_stages_in_layers_of_several_kinds(name, attention, layers, policy, deviation):
    assert_as_by_hand(name, attention, layers, policy, deviation)


@each_policy
@pytest.mark.parametrize(
    ("name", "attention"), [("paligemma2", "eager"), ("mistral3-windows", "eager"), ("mistral3-windows", "sdpa")]
)
def test_stages_in_other_llms_with_windows(more, name, attention, policy, deviation):
    assert_as_by_hand(name, attention, (1, 2), policy, deviation, steps=6)


@pytest.mark.parametrize("kind", ["beams", "no cache", "no mask", "a cache without windows"])
@each_name
def test_other_calls(name, kind, deviation):
    (sample,), inputs = prompts.batch(name, "single"), collate(name, "single")
    call = {"max_new_tokens": 4, **prompts.GREEDY}
    call |= {"num_beams": 3, "output_scores": True} if kind == "beams" else {"use_cache": kind != "no cache"}
    if kind == "no mask":
        del inputs["attention_mask"]
    if kind == "a cache without windows":
        call["past_key_values"] = DynamicCache()
    with tokensieve.attach(models.tiny_model(name), [Halves()]) as sieve:
        out = sieve.model.generate(**inputs, **call)
    answer = out.sequences[0, -4:].tolist()
    by_hand = oracle.logits_inside(models.unhooked(name), name, sample, halved(sample, (1, 2)), answer[:-1])
    if kind == "beams":
        score = by_hand.log_softmax(-1)[range(4), answer].sum() / 4
        assert deviation("of a beam's score (law 4)", out.sequences_scores[0], score) <= NOISE
    else:
        assert deviation("of other calls", torch.cat(out.logits), by_hand) <= NOISE


@pytest.mark.skipif(before_5_23(), reason="refused: transformers runs hooks twice")
@each_name
def test_gradient_checkpointing_changes_nothing(name):
    norms = []
    for checkpointing in (False, True):
        model = models.build(name).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        with tokensieve.attach(model, "fastv(layer=2, keep=5)"):
            model(**collate(name, "one-and-two"), use_cache=False).logits[:, -1].logsumexp(-1).sum().backward()
        norms.append(sum(p.grad.norm().item() for p in model.parameters() if p.grad is not None))
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


# -- evidence -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("same_layer", [False, True])
@pytest.mark.parametrize("queries", ["last", "words"])
@pytest.mark.parametrize(
    ("name", "attention"),
    [*((name, kernel) for name in NAMES for kernel in ("sdpa", "eager")), ("paligemma2", "eager")],
)
def test_attention_rows_are_those_of_eager_attention(more, registry, name, attention, queries, same_layer, deviation):
    """Of both kinds of blocks, of the last prompt token and of the user's words, in a ragged batch."""
    rows = []

    needs = DecoderNeeds(attention=queries, same_layer=same_layer, user_text=True)

    @tokensieve.register("rows", paper="none", stage="decoder", needs=needs)
    @dataclass(frozen=True)
    class Rows(Halves):
        def reduce(self, image):
            rows.extend(zip(image.attention, image.user_text.mask, strict=True))
            return image.keep(torch.arange(image.total).expand(len(image.features), -1))

    samples = prompts.batch(name, "one-and-two")
    for layer in (1, 2):
        rows.clear()
        with tokensieve.attach(models.tiny_model(name, attention), [Rows((layer,))]) as sieve, torch.no_grad():
            sieve.model(**prompts.collate(name, samples))
        found = iter(rows)
        for sample in samples:
            eager = oracle.attention(models.unhooked(name, "eager"), name, sample, layer if same_layer else layer - 1)
            asked = UserTextFinder(sieve.model).columns(sample.ids) if queries == "words" else [len(sample.ids) - 1]
            for columns in oracle.image_columns(sample):
                got, real = next(found)
                got = got[:, real] if queries == "words" else got
                assert deviation("of attention rows", got, eager[:, asked][..., columns]) <= 1e-5


@pytest.mark.parametrize(
    "spec",
    [
        "pyramiddrop(layers=(1, 2), counts=(0.5, 0.25))",
        "sparsevlm(layers=(1, 2), counts=(0.5, 0.25))",
        "topv(layer=2, keep=4)",
        "dart(layer=1, keep=4, visual_pivots=2, text_pivots=2)",
        "divprune(keep=9) + illava-llm(layer=1, keep=4)",
    ],
)
@each_name
def test_methods_choose_in_a_batch_as_alone(name, spec, deviation):
    samples, model = prompts.batch(name, "one-and-two"), models.tiny_model(name)
    with tokensieve.attach(model, spec) as sieve:
        together = model.generate(**collate(name, "one-and-two"), max_new_tokens=3, **prompts.GREEDY)
        chosen = [[r.kept.tolist() for r in row] for row in sieve.last]
        for i, sample in enumerate(samples):
            alone = model.generate(**prompts.collate(name, [sample]), max_new_tokens=3, **prompts.GREEDY)
            assert [r.kept.tolist() for r in sieve.last[0]] == chosen[i]
            rows = [torch.stack(out.logits)[:, at] for out, at in ((together, i), (alone, 0))]
            assert deviation("of a row from its own run (law 3)", *rows) <= NOISE


# -- refusals -------------------------------------------------------------------------------------------------------


@each_name
def test_kernels_without_the_whole_mask_are_refused(name, monkeypatch):
    model = models.tiny_model(name)
    monkeypatch.setattr(model.model.language_model.config, "_attn_implementation_internal", FLASH)
    with pytest.raises(ValueError, match="methods need sdpa or eager attention; it runs flash_stand_in"):
        tokensieve.attach(model, "fastv(layer=1)")


@pytest.mark.parametrize("name", WINDOWS)
def test_a_method_that_goes_by_one_rotary_embedding(name):
    with pytest.raises(ValueError, match="goes by the rotary embedding; in this LLM, layers differ in it"):
        tokensieve.attach(models.tiny_model(name), "sparsevlm+(layers=(1, 2))")


@pytest.mark.parametrize("name", ["mistral3-windows"])
def test_an_unknown_llm_with_windows(more, name, monkeypatch, deviation):
    """Its masks are those that transformers makes for windows; they are known for any family."""
    monkeypatch.setattr(Family, "describes", lambda self, config: False)
    assert family_of(models.tiny_model(name)).untested
    assert_as_by_hand(name, "sdpa", (1, 2), "original", deviation, steps=6)
