"""Every registered decoder method runs with its defaults, and options of single methods."""

import pytest
import torch

import tokensieve
from tests.support import families, models, prompts
from tests.support.methods import small_spec
from tokensieve import parse
from tokensieve.methods import TrainedMethod
from tokensieve.methods.registry import find
from tokensieve.methods.skip import SkipMethod
from tokensieve.tokens import DecoderTokens, DecoderUserText

REDUCES = ("vtw", "pool-decoder", "sparsevlm-rank")  # drop tokens of any image, as do methods with a budget
NAMES = [info.name for info in tokensieve.list_methods() if info.stage == "decoder"]


@pytest.mark.parametrize("family", families.DEEP)
@pytest.mark.parametrize("name", NAMES)
def test_defaults(name, family):
    model, samples = models.tiny_model(family), prompts.batch(family, "ragged")
    trained = issubclass(find(name), TrainedMethod)  # shipped weights fit another model
    spec = small_spec(find(name).info) if trained else name
    with tokensieve.attach(model, spec) as sieve, torch.no_grad():
        logits = model(**prompts.collate(family, samples)).logits
    assert logits.isfinite().all()
    if issubclass(find(name), SkipMethod):  # its tokens return behind each layer
        assert all(decision.whole for row in sieve.last for decision in row)
        assert all(min(row[0]) < max(row[0]) for row in sieve.tokens)
        return
    if name in REDUCES or parse(spec)[0].budget is not None:
        assert all(row[0].slots < row[0].total for row in sieve.last)
    for row in sieve.tokens:
        assert row[0] == sorted(row[0], reverse=True)


def last_row(total=12, heads=2):
    """Return one image with the attention of the last token."""
    return DecoderTokens(torch.randn(1, total, 4), attention=torch.rand(1, heads, 1, total))


def test_illava_favours_either_end():
    image = last_row()
    scores = image.attention.mean((1, 2))[0]
    for favour, heaviest in ((False, scores.argmin()), (True, scores.topk(5).indices[-1])):
        (decision,) = parse(f"illava-llm(keep=5, favour_attended={favour})")[0](image)
        merged = int((decision.counts > 1).nonzero())
        assert decision.matrix()[merged].argmax() == heaviest


def test_dart_with_few_words_has_its_pivots_twice():
    """A prompt of two words in a batch with one of six: both keep what they would keep alone."""
    generator = torch.Generator().manual_seed(0)
    features, keys = torch.randn(2, 20, 8, generator=generator), torch.randn(2, 20, 8, generator=generator)
    text, text_keys = torch.randn(2, 6, 8, generator=generator), torch.randn(2, 6, 8, generator=generator)
    mask = torch.tensor([[True] * 2 + [False] * 4, [True] * 6])
    (dart,) = parse("dart(keep=9)")
    both = dart(DecoderTokens(features, user_text=DecoderUserText(text, mask, keys=text_keys), keys=keys))
    for i, words in enumerate((2, 6)):
        own = DecoderUserText(text[i : i + 1, :words], mask[i : i + 1, :words], keys=text_keys[i : i + 1, :words])
        one = dart(DecoderTokens(features[i : i + 1], user_text=own, keys=keys[i : i + 1]))
        assert torch.equal(one[0].kept, both[i].kept)
        assert both[i].slots == 9


def test_pool_decoder_drops_or_averages_an_incomplete_window():
    image = DecoderTokens(torch.randn(1, 11, 4))
    averaged, dropped = (
        parse(f"pool-decoder(stride=4, incomplete='{what}')")[0](image)[0] for what in ("average", "drop")
    )
    assert averaged.slots == 3
    assert (averaged.source >= 0).all()
    assert dropped.slots == 2
    assert dropped.source.tolist() == [0] * 4 + [1] * 4 + [-1] * 3


def test_a_word_that_is_like_the_others_still_rates():
    """With a single word no share is above the mean: then all words rate, instead of none."""
    word = DecoderUserText(
        torch.randn(1, 1, 4), torch.ones(1, 1, dtype=torch.bool), input_embeddings=torch.randn(1, 1, 4)
    )
    image = DecoderTokens(
        torch.randn(1, 10, 4),
        user_text=word,
        attention=torch.rand(1, 2, 1, 10),
        input_embeddings=torch.randn(1, 10, 4),
    )
    (decision,) = parse("sparsevlm(layers=(2,), counts=(3,), recycle=0.0)")[0](image)
    assert decision.kept.tolist() == image.attention.mean((1, 2))[0].topk(3).indices.sort().values.tolist()
