"""The laws of tokens that leave earlier caches; that greedy steps are those by hand is in ``test_decoder.py``."""

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import pytest
import torch

import tokensieve
from tests.laws.test_decoder import DecoderCell
from tests.methods.decoder.runs import by_hand_run
from tests.support import families, models, prompts
from tests.support.oracle import NOISE
from tokensieve.methods import DecoderMethod
from tokensieve.methods.registry import find

LAYER, STEPS = 3, 4
SPEC = f"glimpse-prune(layer={LAYER}, weights='random', keep=0.4)"


@cache
@torch.no_grad()
def prefilled(family, attention, kind, compact):
    """The cache and the decisions of a prefill, with and without compaction."""
    cls = find("glimpse-prune")
    cls.leaves_caches = compact
    try:
        model = models.tiny_model(family, attention)
        with tokensieve.attach(model, SPEC) as sieve:
            out = model(**prompts.collate(family, prompts.batch(family, kind)), use_cache=True)
    finally:
        cls.leaves_caches = True
    return out.past_key_values, sieve.last


@pytest.mark.parametrize(("attention", "kind"), [("sdpa", "mixed"), ("eager", "ragged"), ("sdpa", "two-images")])
@pytest.mark.parametrize("family", families.DEEP)
def test_every_cache_holds_what_is_left(family, attention, kind):
    """The columns of the layers before are those of the whole cache, gathered by hand, and no others are held."""
    samples = prompts.batch(family, kind)
    short, decisions = prefilled(family, attention, kind, True)
    whole, same = prefilled(family, attention, kind, False)
    width, total = max(len(sample.ids) for sample in samples), 0
    for row, (sample, images, of_row) in enumerate(zip(samples, decisions, same, strict=True)):
        assert [i.kept.tolist() for i in images] == [i.kept.tolist() for i in of_row]
        dropped = set()
        columns = [c for c, i in enumerate(sample.ids) if i in (families.IMAGE, families.VIDEO)]
        for image in images:
            own, columns = columns[: image.total], columns[image.total :]
            dropped |= {own[i] for i in range(image.total) if i not in image.kept.tolist()}
        stay = [c + width - len(sample.ids) for c in range(len(sample.ids)) if c not in dropped]
        total = max(total, len(stay))
        for number in range(LAYER):
            for part in ("keys", "values"):
                held, before = (getattr(cache.layers[number], part)[row] for cache in (short, whole))
                assert torch.equal(held[:, -len(stay) :], before[:, stay])
    assert [layer.keys.shape[-2] for layer in short.layers] == [total] * families.DEPTH

    def size(kv):
        return sum(x.nbytes for layer in kv.layers for x in (layer.keys, layer.values))

    expected = LAYER * width + (families.DEPTH - LAYER) * total
    assert size(short) * expected == size(whole) * families.DEPTH * total
    assert size(short) < size(whole) or total == width
    assert short.get_seq_length() == width, "as the caller counts"


@pytest.mark.parametrize("family", families.DEEP)
@torch.no_grad()
def test_other_ways_to_decode(family):
    """Beams, and several columns in one step, give what each sample gives alone."""
    model, samples = models.tiny_model(family), prompts.batch(family, "ragged")
    beams = {"num_beams": 2, "max_new_tokens": STEPS, "do_sample": False}
    with tokensieve.attach(model, SPEC):
        together = model.generate(**prompts.collate(family, samples), **beams)[:, -STEPS:]
        alone = [model.generate(**prompts.collate(family, [sample]), **beams)[0, -STEPS:] for sample in samples]
    assert torch.equal(together, torch.stack(alone))


@pytest.mark.parametrize("policy", ["original", "contiguous"])
@pytest.mark.parametrize("family", families.DEEP)
@torch.no_grad()
def test_a_second_question_on_the_cache(family, policy, deviation):
    """Text that follows on a short cache, several tokens at once and padded, is as by hand."""
    model, samples = models.tiny_model(family), prompts.batch(family, "ragged")
    with tokensieve.attach(model, SPEC, positions=policy) as sieve:
        answers, logits = prompts.second_question(model, family, samples)
        decisions = sieve.last
    for row in range(len(samples)):

        def decide(layer, sequence, kept=decisions[row]):
            replayed = [(image.matrix(), image.kept.tolist()) for image in kept]
            return replayed if layer.number == LAYER else None

        by_hand = by_hand_run(SPEC, family, "ragged", policy, row, answers[row], decide)[0][-2:]
        assert deviation("of the second turn from the layers by hand", logits[row], by_hand) <= NOISE


@torch.no_grad()
def test_without_the_method_the_cache_is_refused():
    family = families.DEEP[0]
    model, inputs = models.tiny_model(family), prompts.collate(family, prompts.batch(family, "single"))
    with tokensieve.attach(model, SPEC):
        cache = model(**inputs, use_cache=True).past_key_values
    step = {"input_ids": torch.tensor([[7]]), "past_key_values": cache}
    with tokensieve.attach(model, "full"), pytest.raises(tokensieve.Refusal, match="continue with the decoder method"):
        model(**step)


def test_windows_are_refused():
    with pytest.raises(tokensieve.Refusal, match="needs full attention in every layer"):
        tokensieve.attach(models.tiny_model("gemma3"), "glimpse-prune(layer=2, weights='random')")


@pytest.mark.parametrize("family", families.DEEP)
def test_tokens_that_leave_twice(family, registry, deviation):
    """Every cache holds what is left after the last layer in which tokens leave, and greedy steps are those by hand."""

    @tokensieve.register("halves", paper="none", stage="decoder")
    @dataclass(frozen=True)
    class Halves(DecoderMethod):
        """Keep every second token, twice."""

        layers: tuple[int, ...] = (1, 3)
        leaves_caches: ClassVar = True

        def reduce(self, image):
            return image.keep(torch.arange(0, image.total, 2).expand(len(image.features), -1))

    cell = DecoderCell("halves", family, "sdpa", "ragged", "original", replayed=True)
    for row, (logits, sequence) in enumerate(cell.by_hand):
        assert [image.kept.tolist() for image in cell.sieve.last[row]] == sequence.kept
        assert deviation("from the layer loop by hand (law 2)", cell.logits[row], logits) <= NOISE
    assert len(set(cell.held)) == 1
    with pytest.raises(tokensieve.Refusal, match="leave earlier caches more than once"):
        tokensieve.attach(models.tiny_model(family), "halves", positions="contiguous")
