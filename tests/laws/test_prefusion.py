"""The laws of rows that blocks change at the LLM's entry, against the LLM's own forward on these blocks, by hand."""

import copy
import re
from functools import cache

import pytest
import torch
from torch import nn

import tokensieve
from tests.laws.test_side_blocks import shaken
from tests.support import models, oracle, prompts
from tests.support.oracle import NOISE, Encoded
from tokensieve import Refusal

SPEC = "llava-mini(keep=4, blocks=2, weights='random')"
FAMILIES = ("llava-clip", "llava-siglip", "qwen2.5-vl")
each_family = pytest.mark.parametrize("family", FAMILIES)


@cache
def net_of(family, spec=SPEC):
    """A net whose blocks are no longer copies."""
    with tokensieve.attach(models.tiny_model(family), spec) as sieve:
        return shaken(sieve.nets["connector"])


def attached(family, attention="sdpa", spec=SPEC, **options):
    sieve = tokensieve.attach(models.tiny_model(family, attention), spec, **options)
    sieve.nets["connector"].load_state_dict(net_of(family, spec).state_dict())
    return sieve


def inputs(family, kind="mixed"):
    return prompts.collate(family, prompts.batch(family, kind))


@torch.no_grad()
def by_hand(family, sample, kept, answer, policy="original", spec=SPEC):
    """The logits of the unmodified LLM, fed with rows of one prompt that the blocks have changed."""
    model, net = models.unhooked(family), net_of(family, spec)
    blocks = copy.deepcopy(oracle.language_model(model))
    blocks.layers, blocks.norm = nn.ModuleList(list(net.prefusion_layers)), nn.Identity()
    mixed = [
        net.compressor(oracle.unprojected(model, family, image)[None], image.grid)[0][0] for image in sample.images
    ]
    slots = [Encoded(oracle.project(model, family, rows), []) for rows in mixed]
    sequence = oracle.enter(model, family, sample, kept, slots, answer, policy)
    text = (sequence.image_of < 0) & (torch.arange(len(sequence.rows)) < sequence.prompt)
    changed, of_text = sequence.rows.clone(), []
    for number, tokens in enumerate(oracle.encode(model, family, sample)):
        visual = sequence.image_of == number
        joined = torch.cat([tokens.rows, sequence.rows[visual], sequence.rows[text]])
        passed = blocks(inputs_embeds=joined[None], use_cache=False).last_hidden_state[0, len(tokens.rows) :]
        changed[visual], rows = passed.split([int(visual.sum()), int(text.sum())])
        of_text.append(rows)
    if of_text:
        changed[text] = torch.stack(of_text).mean(0)
    sequence.rows = changed
    return oracle.forward(model, family, sequence)[-1 - len(answer) :]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("policy", ["original", "contiguous"])
@each_family
@torch.no_grad()
def test_prompts_and_steps_are_as_by_hand(family, policy, attention, deviation):
    """In a padded batch with none, one and several images; each row is its own run."""
    samples = prompts.batch(family, "mixed")
    with attached(family, attention, positions=policy) as sieve:
        out = sieve.model.generate(**inputs(family), max_new_tokens=3, **prompts.GREEDY)
        decisions, logits = sieve.last, torch.stack(out.logits, 1)
        single = sieve.model.generate(**prompts.collate(family, samples[:1]), max_new_tokens=3, **prompts.GREEDY)
    assert deviation("of a row from its own run", logits[0], torch.stack(single.logits, 1)[0]) <= NOISE
    for sample, of_row, row, answer in zip(samples, decisions, logits, out.sequences[:, -3:].tolist(), strict=True):
        kept = [decision.kept.tolist() for decision in of_row]
        assert all(len(tokens) == 4 for tokens in kept)
        assert deviation("from the hand reference", row, by_hand(family, sample, kept, answer[:-1], policy)) <= NOISE


@each_family
@torch.no_grad()
def test_the_text_is_changed(family):
    """With the same rows of the image, other blocks have other logits."""
    with attached(family) as sieve:
        logits = sieve.model(**inputs(family, "single")).logits
        sieve.nets["connector"].prefusion_layers[0].mlp.down_proj.weight += 0.1
        assert (sieve.model(**inputs(family, "single")).logits - logits).abs().max() > 0.01


@pytest.mark.parametrize("family", ["llava-clip", "qwen2.5-vl"])
@torch.no_grad()
def test_later_words_enter_unchanged_or_with_the_whole_conversation(family, deviation):
    samples, later = prompts.batch(family, "ragged"), torch.tensor([[7, 9, 11]] * len(prompts.batch(family, "ragged")))
    first, second = inputs(family, "ragged"), {}
    for reselect in (False, True):
        with attached(family, reselect=reselect) as sieve:
            out = sieve.model.generate(**first, max_new_tokens=2, **prompts.GREEDY)
            ids = torch.cat([out.sequences, later], 1)
            added = len(later[0]) + 2
            mask = torch.cat([first["attention_mask"], torch.ones(len(ids), added, dtype=torch.long)], 1)
            types = {n: torch.cat([x, x.new_zeros(len(ids), added)], 1) for n, x in first.items() if "type" in n}
            turn = {"input_ids": ids, "attention_mask": mask, **types}
            more = {**turn, "past_key_values": out.past_key_values, "max_new_tokens": 1}
            second[reselect] = sieve.model.generate(**more, **prompts.GREEDY).logits[0]
            if not reselect:
                kept = [[d.kept.tolist() for d in row] for row in sieve.last]
                answers = ids[:, -added:].tolist()
            fresh = sieve.model.generate(**{**first, **turn}, max_new_tokens=1, **prompts.GREEDY).logits[0]
    assert deviation("of a conversation that is decided anew", second[True], fresh) <= NOISE
    assert (second[False] - fresh).abs().max() > 0.01
    for row, sample in enumerate(samples):
        expected = by_hand(family, sample, kept[row], answers[row])[-1]
        assert deviation("of later words on the cache", second[False][row], expected) <= NOISE


@each_family
def test_labelled_columns_stay_and_gradients_reach_the_net_alone(family, deviation):
    model, (sample,) = models.build(family).requires_grad_(False), prompts.batch(family, "single")
    batch = prompts.collate(family, [sample])
    length = batch["input_ids"].shape[1]
    with tokensieve.attach(model, SPEC) as sieve:
        net = sieve.nets["connector"]
        net.load_state_dict(net_of(family).state_dict())
        with torch.no_grad():
            out = model.generate(**batch, max_new_tokens=3, **prompts.GREEDY)
        net.train().requires_grad_(True)
        whole = {n: torch.cat([x, x.new_zeros(1, 3)], 1) for n, x in batch.items() if "type" in n}
        whole |= {"input_ids": out.sequences, "attention_mask": torch.ones_like(out.sequences)}
        labels = out.sequences.masked_fill(torch.arange(length + 3) < length, -100)
        answered = model(**{**batch, **whole}, labels=labels, use_cache=False)
        answered.loss.backward()
    generated = torch.stack(out.logits, 1)[0]
    assert deviation("of an answer with labels", answered.logits[0, -4:-1], generated) <= NOISE
    without = [name for name, weights in net.named_parameters() if weights.grad is None or not weights.grad.any()]
    # attention does not change when all keys move by the same vector
    assert all("k_proj.bias" in name for name in without), without
    assert all(weight.grad is None for weight in model.parameters())


@each_family
@torch.no_grad()
def test_the_model_stays_as_it_was(family):
    model, batch = models.tiny_model(family, "sdpa"), inputs(family)
    before, state = models.footprint(model), {name: rows.clone() for name, rows in model.state_dict().items()}
    whole = model(**batch).logits
    with tokensieve.attach(model, "llava-mini(keep=1.0, weights='random')"):
        assert torch.equal(model(**batch).logits, whole)
    with attached(family) as sieve:
        assert not torch.equal(model(**batch).logits[:, -1], whole[:, -1])
        assert state.keys() == model.state_dict().keys()
        with sieve.paused():
            assert torch.equal(model(**batch).logits, whole)
        assert not {id(p) for p in sieve.nets["connector"].parameters()} & {id(p) for p in model.parameters()}
    assert models.footprint(model) == before
    assert torch.equal(model(**batch).logits, whole)
    assert all(torch.equal(rows, state[name]) for name, rows in model.state_dict().items())


@torch.no_grad()
def test_several_answers_and_the_precision_of_the_model():
    model, batch = models.build("llava-clip").to(torch.bfloat16), inputs("llava-clip", "ragged")
    batch = {name: rows.bfloat16() if rows.is_floating_point() else rows for name, rows in batch.items()}
    with tokensieve.attach(model, SPEC) as sieve:
        assert model(**batch).logits.isfinite().all()
        assert {w.dtype for w in sieve.nets["connector"].prefusion_layers.parameters()} == {torch.bfloat16}
    with attached("llava-clip") as sieve:
        batch = inputs("llava-clip", "single")
        one = sieve.model.generate(**batch, max_new_tokens=3, **prompts.GREEDY)
        beams = sieve.model.generate(**batch, max_new_tokens=3, **{**prompts.GREEDY, "num_beams": 2})
        torch.testing.assert_close(beams.logits[0][1], one.logits[0][0], atol=NOISE, rtol=0)


def turn_with_image(sieve, batch):
    out = sieve.model(**batch, use_cache=True)
    mask = torch.cat([batch["attention_mask"]] * 2, 1)
    sieve.model(**{**batch, "attention_mask": mask}, past_key_values=out.past_key_values)


REFUSED = {
    "first turn only": turn_with_image,
    "candidates of assisted decoding": lambda sieve, batch: sieve.model(**batch, logits_to_keep=3),
    "in prefill chunks|encode them with the method attached": lambda sieve, batch: sieve.model.generate(
        **batch, max_new_tokens=2, prefill_chunk_size=8
    ),
}


@pytest.mark.parametrize("message", REFUSED)
@torch.no_grad()
def test_calls_that_would_change_other_text_are_refused(message):
    with attached("llava-clip") as sieve, pytest.raises(Refusal, match=message) as caught:
        REFUSED[message](sieve, inputs("llava-clip", "single"))
    assert "\n" not in str(caught.value)


@torch.no_grad()
def test_a_decision_is_not_replayed():
    """The changed text is no part of it."""
    batch = inputs("llava-clip", "single")
    with attached("llava-clip") as sieve:
        sieve.model(**batch)
    with (
        tokensieve.attach(models.tiny_model("llava-clip"), sieve.last) as replay,
        pytest.raises(Refusal, match="the rows of this decision were made by a net, for rows of width 64; got none"),
    ):
        replay.model(**batch)


@pytest.mark.parametrize(
    ("family", "spec", "message"),
    [
        ("qwen3-vl", SPEC, "the net of llava-mini makes the rows that enter the LLM, and none for its later layers"),
        ("gemma3", SPEC, "llava-mini runs blocks with rotary embeddings and full_attention in every layer"),
        ("llava-clip", f"{SPEC} + victor(keep=4, weights='random')", "registers of victor"),
        ("llava-clip", "llava-mini(keep=3, weights='random')", "keeps a square number of tokens, such as 1 or 4"),
        ("llava-clip", "llava-mini(keep=0.25, weights='random')", "has one number of tokens for all images"),
        ("llava-clip", "llava-mini", "llava-mini has no bundled weights"),
    ],
)
def test_refusals_leave_no_hook(family, spec, message):
    model = models.tiny_model(family)
    before = models.footprint(model)
    with pytest.raises(Refusal, match=re.escape(message)) as caught:
        tokensieve.attach(model, spec)
    assert "\n" not in str(caught.value)
    assert models.footprint(model) == before
