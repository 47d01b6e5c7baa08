"""Repaired attention: RESTORE's biases by hand, kernels without a float mask, later turns, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import tokensieve
from tests.engine.test_attach import FLASH
from tests.support import families, models, oracle, prompts
from tests.support.crossmodal import vilt
from tests.support.oracle import NOISE
from tokensieve import Reduction, Refusal
from tokensieve.engine.repair import augmented
from tokensieve.engine.sizes import carried_sizes
from tokensieve.reduction import Mixing

STEPS = 3
REPAIRS = ("size", "restore")


def generated(model, inputs, steps: int = STEPS):
    out = model.generate(**inputs, max_new_tokens=steps, **prompts.GREEDY)
    return torch.stack(out.logits, 1), out


@torch.no_grad()
def restored_by_hand(family: str, sample, decisions, answer: list[int]) -> torch.Tensor:
    """Return the logits of prompt and answer, layer by layer, with the biases of the paper and the authors' code.

    The first layer has N/K at every visual key, the others have the groups' sizes. A query of the prompt also has
    log(2 − c), c the mean cosine of the angle between two positions; one of the answer does not.
    """
    model = models.unhooked(family, "eager")
    encoded = oracle.encode(model, family, sample)
    encoded = [image.mixed(decision.matrix()) for image, decision in zip(encoded, decisions, strict=True)]
    sequence = oracle.enter(model, family, sample, [r.kept for r in decisions], encoded, answer)
    decoder, length = oracle.language_model(model), len(sequence.rows)
    sizes, uniform = torch.ones(length), torch.ones(length)
    for columns, decision in zip(sequence.images, decisions, strict=True):
        sizes[columns] = decision.counts.float()
        uniform[columns] = decision.total / decision.slots
    cos, sin = decoder.rotary_emb(sequence.rows[None], oracle.axes(family, sequence))
    half = cos.shape[-1] // 2
    angle = torch.atan2(sin[0, :, :half], cos[0, :, :half])
    distance = (2 - (angle[:, None] - angle[None]).cos().mean(-1)).log()
    distance[sequence.prompt :] = 0
    causal = torch.zeros(length, length).masked_fill(torch.ones(length, length).triu(1).bool(), -1e30)
    rows = sequence.rows[None]
    for number, layer in enumerate(decoder.layers):
        mask = causal + distance + (uniform if number == 0 else sizes).log()
        rows = layer(rows, attention_mask=mask[None, None], position_embeddings=(cos, sin), use_cache=False)
        if number < len(sequence.planes):
            rows[0] += sequence.planes[number]
    return model.lm_head(decoder.norm(rows)[0])[-1 - len(answer) :]


def merging(tokens: int) -> Reduction:
    """Return a decision that averages groups of several sizes, at their first tokens."""
    slot = torch.arange(tokens) ** 2 % 7  # 0, 1, 2 and 4: groups that are interleaved
    first, slot, counts = slot.unique(return_inverse=True, return_counts=True)
    anchors = torch.stack([(slot == number).nonzero()[0, 0] for number in range(len(first))])
    anchors, order = anchors.sort()
    return Reduction(tokens, anchors, Mixing(order.argsort()[slot], torch.arange(tokens), 1 / counts[slot].float()))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llava-clip", "qwen2.5-vl", "qwen3-vl"])
def test_restore_is_the_paper_by_hand(family, attention, deviation):
    """In prefill and decoding, with merged tokens at the medians of their groups, in a ragged batch."""
    model, samples = models.tiny_model(family, attention), prompts.batch(family, "ragged")
    decisions = [[merging(image.tokens) for image in s.images] for s in samples]
    with tokensieve.attach(model, decisions, repair="restore") as sieve:
        logits, out = generated(model, prompts.collate(family, samples))
    for row, sample in enumerate(samples):
        for before, after in zip(decisions[row], sieve.last[row], strict=True):
            medians = [group[(len(group) - 1) // 2] for group in groups(before)]
            assert after.kept.tolist() == sorted(medians)
            assert {tuple(group) for group in groups(after)} == {tuple(group) for group in groups(before)}
        answer = out.sequences[row, -STEPS:-1].tolist()
        expected = restored_by_hand(family, sample, sieve.last[row], answer)
        assert deviation("of RESTORE by hand", logits[row], expected) <= NOISE


def groups(decision: Reduction) -> list[list[int]]:
    return [(decision.source == slot).nonzero().flatten().tolist() for slot in range(decision.slots)]


def test_sizes_of_dropped_merged_and_shared_tokens():
    """A dropped token counts for the kept one with the largest cosine; a token in two slots is shared by weight."""
    rows = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 5.0], [-1.0, 0.2]])
    pruned = Reduction(5, torch.tensor([0, 2]))
    assert carried_sizes(torch.ones(5), pruned, rows).tolist() == [2, 3]
    newline = torch.tensor([False, False, True, False, False])  # it stays, and no token counts for it
    assert carried_sizes(torch.ones(5), pruned, rows, newline).tolist() == [4, 1]
    slot, source, weight = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, 2]), torch.tensor([0.5, 0.3, 0.1, 0.9])
    shared = Reduction(5, torch.tensor([0, 2]), Mixing(slot, source, weight))
    before = torch.tensor([1.0, 4.0, 1.0, 2.0, 2.0])
    assert carried_sizes(before, shared, rows).tolist() == pytest.approx([1 + 3, 1 + 1 + 2 + 2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_augmented_channels_equal_a_float_mask(dtype, deviation):
    """Grouped keys, a scaling that is not a power of two, and a bias as of 2,000 tokens."""
    query, key, value = (torch.randn(2, heads, 9, 24, dtype=dtype) for heads in (4, 2, 2))
    bias = torch.tensor([1.0, 3.0, 2000.0, 7.0, 1.0, 9.0, 64.0, 1.0, 2.0]).log().repeat(2, 1)
    scaling = 24**-0.5
    more = augmented(query, key, value, bias, scaling)
    assert all(rows.shape[-1] == 32 for rows in more)
    out = scaled_dot_product_attention(*(x.double() for x in more), scale=scaling, enable_gqa=True, is_causal=True)
    causal = torch.zeros(9, 9).masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf)
    mask = (bias[:, None, None] + causal).double()
    exact = [x.double() for x in (query, key, value)]
    expected = scaled_dot_product_attention(*exact, attn_mask=mask, scale=scaling, enable_gqa=True)
    assert deviation("of augmented channels", out[..., :24], expected) <= (1e-6 if dtype == torch.float32 else 1e-3)
    assert bool((out[..., 24:] == 0).all())


@pytest.mark.parametrize(
    "spec", ["divprune(keep=6)", "fastv(layer=1, keep=4)", "divprune(keep=9)+fastv(layer=1,keep=3)"]
)
@pytest.mark.parametrize("family", ["llava-clip", "qwen3-vl"])
def test_flash_kernels_are_augmented(family, spec, monkeypatch, deviation):
    """A kernel that takes no mask of queries and keys gives what the mask gives, and all is undone afterwards."""
    model, inputs = models.tiny_model(family), prompts.collate(family, prompts.batch(family, "ragged"))
    with tokensieve.attach(model, spec, repair="size"):
        expected, _ = generated(model, inputs)
    with tokensieve.attach(model, spec):
        without, _ = generated(model, inputs)
    monkeypatch.setattr(model.model.language_model.config, "_attn_implementation_internal", FLASH)
    before = models.footprint(model)
    with tokensieve.attach(model, spec, repair="size"):
        got, _ = generated(model, inputs)
    assert models.footprint(model) == before
    assert deviation("of augmented kernels", got, expected) <= NOISE
    assert (without - expected).abs().max() > 0.1


@pytest.mark.parametrize("repair", REPAIRS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llava-clip", "qwen3-vl"])
def test_a_layer_run_for_its_attention_is_repaired(family, attention, repair, deviation):
    """``pyramiddrop`` runs layer 1 once more, and ``fastv(layer=2)`` reads it as it runs: both see one attention."""
    model, inputs = models.tiny_model(family, attention), prompts.collate(family, prompts.batch(family, "ragged"))
    scores = []
    for method in ("pyramiddrop(layers=(1,), keep=2)", "fastv(layer=2, keep=2)"):
        with tokensieve.attach(model, f"divprune(keep=4) + {method}", repair=repair) as sieve:
            generated(model, inputs, 1)
        scores.append(torch.cat([decision.inside[0].scores for row in sieve._images for decision in row]))
    assert deviation("of the attention of a layer run twice", *scores) <= 1e-6


@pytest.mark.parametrize("layers", ["(1,)", "(1, 2)"])
def test_a_gradient_is_that_of_repaired_attention(layers, monkeypatch, deviation):
    """In the mask and in augmented channels alike, under inference mode, too; without the repair it is another one."""
    family = "qwen3-vl"
    model, inputs = models.tiny_model(family), prompts.collate(family, prompts.batch(family, "ragged"))
    spec = f"divprune(keep=6) + trio(layers={layers}, keep=2, similar=1.0)"

    def gradients(repair):
        with tokensieve.attach(model, spec, repair=repair) as sieve, torch.inference_mode():
            model(**inputs)
        return torch.cat([stage.scores for row in sieve._images for image in row for stage in image.inside])

    expected, without = gradients("size"), gradients(None)
    monkeypatch.setattr(model.model.language_model.config, "_attn_implementation_internal", FLASH)
    scale = expected.abs().max()
    assert deviation("of a gradient in augmented channels", gradients("size") / scale, expected / scale) <= NOISE
    assert (without - expected).abs().max() / scale > 1e-3


@pytest.mark.parametrize("repair", REPAIRS)
@pytest.mark.parametrize("spec", ["divprune(keep=1.0)", "fastv(layer=1, keep=1.0)", "full"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_keeping_all_changes_no_bit(attention, spec, repair):
    family = "qwen2.5-vl"
    model, inputs = models.tiny_model(family, attention), prompts.collate(family, prompts.batch(family, "ragged"))
    expected, _ = generated(model, inputs)
    before = models.footprint(model)
    with tokensieve.attach(model, spec, repair=repair):
        got, _ = generated(model, inputs)
    assert torch.equal(got, expected)
    assert models.footprint(model) == before


@pytest.mark.parametrize("repair", REPAIRS)
@pytest.mark.parametrize("family", families.CORE)
def test_each_row_is_its_own_run(family, repair, deviation):
    """Rows with other images, or with an image that is kept whole, do not change a row's bias."""
    model, samples = models.tiny_model(family), prompts.batch(family, "one-and-two")
    with tokensieve.attach(
        model, "visionzip(keep=14)" if family == "llava-clip" else "divprune(keep=14)", repair=repair
    ):
        batch, _ = generated(model, prompts.collate(family, samples))
        for row, sample in enumerate(samples):
            single, _ = generated(model, prompts.collate(family, [sample]))
            assert deviation("of a repaired row from its own run", batch[row], single[0]) <= NOISE


def test_a_later_turn_needs_the_repair():
    model, inputs = (
        models.tiny_model("llava-clip"),
        prompts.collate("llava-clip", prompts.batch("llava-clip", "single")),
    )
    with tokensieve.attach(model, "divprune(keep=4)", repair="size"):
        cache = model(**inputs).past_key_values
    new = torch.tensor([[7, 8]])
    mask = torch.ones(1, cache.get_seq_length() + 2, dtype=torch.long)
    with (
        tokensieve.attach(model, "divprune(keep=4)"),
        pytest.raises(Refusal, match="filled with repaired attention: continue with the same repair"),
    ):
        model(input_ids=new, attention_mask=mask, past_key_values=cache)


def test_refusals(monkeypatch, tmp_path):
    """One line each: another word, no LLM, linear attention, layers that differ, kernels that take no bias."""
    model = models.tiny_model("llava-clip")
    with pytest.raises(Refusal, match="repair must be None, 'size' or 'restore'; got 'both'"):
        tokensieve.attach(model, "divprune", repair="both")
    with pytest.raises(Refusal, match="acts in the LLM, which a cross-modal encoder does not have"):
        tokensieve.attach(vilt(), "pumer", repair="size")
    with pytest.raises(Refusal, match="most layers of its LLM use linear attention"):
        tokensieve.attach(models.tiny_model("qwen3.5"), "divprune", repair="size")
    with pytest.raises(Refusal, match="needs one rotary embedding in all layers"):
        tokensieve.attach(models.tiny_model("gemma3"), "divprune", repair="restore")
    file = tmp_path / "best.json"
    file.write_text(json.dumps({"tokensieve_spec": 1, "method": "divprune", "keep": 4, "repair": "size"}))
    with pytest.raises(Refusal, match="says repair='size'; got repair='restore'"):
        tokensieve.attach(model, str(file), repair="restore")
    with tokensieve.attach(model, str(file)) as sieve:
        generated(model, prompts.collate("llava-clip", prompts.batch("llava-clip", "single")), 1)
        assert [sizes.sum() for row in sieve.sizes for sizes in row] == [25]
    config = model.model.language_model.config
    for kernel, repair in (("flex_attention", "size"), (FLASH, "restore")):
        monkeypatch.setattr(config, "_attn_implementation_internal", kernel)
        before = models.footprint(model)
        with pytest.raises(Refusal, match=f"adds to attention scores, which {kernel} cannot: load the model with sdpa"):
            tokensieve.attach(model, "divprune", repair=repair)
        assert models.footprint(model) == before
        monkeypatch.undo()
    with tokensieve.attach(model, "divprune(keep=4)", repair="size"):
        monkeypatch.setattr(config, "_attn_implementation_internal", FLASH)
        with pytest.raises(Refusal, match="was attached to sdpa; the model now runs flash_stand_in"):
            generated(model, prompts.collate("llava-clip", prompts.batch("llava-clip", "single")), 1)
