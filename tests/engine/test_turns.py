"""reselect=True: a later turn on a cache equals the whole conversation as a fresh prompt; the encoder runs once."""

import copy
import gc
import weakref

import pytest
import torch
from transformers import DynamicCache

import tokensieve
from tests.support import crossmodal, families, models, prompts
from tests.support.oracle import NOISE, noise

CONNECTOR, INSIDE, BOTH = (
    "trsm(keep=5)",
    "fastv(layer=2, keep=5)",
    "divprune(keep=9) + sparsevlm(layers=(1, 2), counts=(6, 4))",
)
SPECS = (CONNECTOR, "mmtok(keep=5)", INSIDE, BOTH)
FAMILIES = ("llava-clip", "qwen2.5-vl", "qwen3-vl")
each_family = pytest.mark.parametrize("family", FAMILIES)
each_policy = pytest.mark.parametrize("policy", ["original", "contiguous"])
each_spec = pytest.mark.parametrize("spec", SPECS)
TEXT = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")


def followed(inputs, sequences, words):
    """Return the text of a conversation that goes on with an answer and new words `[B, n]`."""
    ids = torch.cat([sequences, words], 1)
    added = torch.ones(len(ids), ids.shape[1] - inputs["input_ids"].shape[1], dtype=torch.long)
    out = {"input_ids": ids, "attention_mask": torch.cat([inputs["attention_mask"], added], 1)}
    for name in TEXT[2:]:
        if name in inputs:
            out[name] = torch.cat([inputs[name], 0 * added.to(inputs[name].dtype)], 1)
    return out


def question(rows, first, count):
    return torch.arange(first, first + count).expand(rows, -1)


def pictures(inputs):
    return {name: value for name, value in inputs.items() if name not in TEXT}


def kept(sieve):
    return [[decision.kept.tolist() for decision in row] for row in sieve.last]


def held(cache):
    return [tuple(layer.keys.shape) for layer in cache.layers if getattr(layer, "keys", None) is not None]


def converse(model, inputs, spec, turns=3, **options):
    """Return (turn on the cache, fresh prompt) of the second and later turns: output, kept tokens, cache lengths."""
    pairs, choices = [], set()
    with tokensieve.attach(model, spec, reselect=True, **options) as sieve:
        out = model.generate(**inputs, max_new_tokens=3, **prompts.GREEDY)
        choices.add(str(kept(sieve)))
        text = {name: inputs[name] for name in TEXT if name in inputs}
        for number in range(1, turns):
            text = followed(text, out.sequences, question(len(out.sequences), 10 + 9 * number, 3 + number))
            cache = out.past_key_values
            out = model.generate(**text, past_key_values=cache, max_new_tokens=3, **prompts.GREEDY)
            assert out.past_key_values is cache
            choices.add(str(kept(sieve)))
            again = kept(sieve), held(cache), cache.get_seq_length()
            fresh = model.generate(**text, **pictures(inputs), max_new_tokens=3, **prompts.GREEDY)
            new = kept(sieve), held(fresh.past_key_values), fresh.past_key_values.get_seq_length()
            pairs.append(((out, *again), (fresh, *new)))
    assert len(choices) > 1, "other words choose other tokens"
    return pairs


def check(pairs, deviation, allowed=NOISE):
    for (out, *rest), (fresh, *expected) in pairs:
        assert rest == expected, "kept tokens, columns in each layer, columns as the caller counts"
        assert torch.equal(out.sequences, fresh.sequences)
        assert deviation("of a turn decided anew", torch.stack(out.logits), torch.stack(fresh.logits)) <= allowed


@each_spec
@each_policy
@each_family
def test_later_turns_equal_a_fresh_prompt(spec, family, policy, deviation):
    inputs = prompts.collate(family, prompts.batch(family, "ragged"))
    check(converse(models.tiny_model(family), inputs, spec, positions=policy), deviation)


@pytest.mark.parametrize("family", ["llava-clip", "qwen3-vl"])
@pytest.mark.parametrize("options", [{"repair": "size"}, {"repair": "restore"}, {"separators": "none"}])
def test_with_other_options(options, family, deviation):
    inputs = prompts.collate(family, prompts.batch(family, "two-images"))
    check(converse(models.tiny_model(family), inputs, CONNECTOR, **options), deviation)


@pytest.mark.parametrize("spec", [CONNECTOR, INSIDE])
@each_family
def test_eager_attention(spec, family, deviation):
    inputs = prompts.collate(family, prompts.batch(family, "two-images"))
    check(converse(models.tiny_model(family, "eager"), inputs, spec, turns=2), deviation)


@pytest.mark.parametrize("family", ["llava-next", "paligemma", "gemma3", "qwen3.5", "internvl"])
def test_other_families(family, deviation):
    """Newlines, positions from 1, sliding windows, linear attention and tiles."""
    model, inputs = models.tiny_model(family), prompts.collate(family, prompts.batch(family, "ragged"))
    check(converse(model, inputs, CONNECTOR), deviation, noise(family))


def test_an_encoder_method_before_it(deviation):
    family = "llava-clip"
    inputs = prompts.collate(family, prompts.batch(family, "ragged"))
    check(converse(models.tiny_model(family), inputs, "downsample(keep=0.5) + trsm(keep=3)"), deviation)


@pytest.mark.parametrize("family", ["qwen2.5-vl", "qwen3-vl", "llava-onevision-frames"])
def test_videos(family, deviation):
    inputs = prompts.collate(family, prompts.batch(family, "ragged-videos"))
    check(converse(models.tiny_model(family), inputs, CONNECTOR), deviation, noise(family))


@pytest.mark.parametrize("spec", [CONNECTOR, INSIDE])
@each_family
def test_questions_of_different_lengths_in_a_batch(spec, family, deviation):
    """Padding stands between the turns; each row equals its own fresh prompt."""
    model, samples = models.tiny_model(family), prompts.batch(family, "ragged")
    inputs, lengths, width = prompts.collate(family, samples), (2, 6, 4), 6
    with tokensieve.attach(model, spec, reselect=True) as sieve:
        first = model.generate(**inputs, max_new_tokens=3, **prompts.GREEDY)
        words = [question(1, 20 + 7 * row, count) for row, count in enumerate(lengths)]
        padded = torch.cat([torch.nn.functional.pad(row, (width - row.shape[1], 0)) for row in words])
        text = followed(inputs, first.sequences, padded)
        for row, count in enumerate(lengths):
            text["attention_mask"][row, -width : -count or None] = 0
        out = model.generate(**text, past_key_values=first.past_key_values, max_new_tokens=4, **prompts.GREEDY)
        decided = kept(sieve)
        for row, sample in enumerate(samples):
            single = prompts.collate(family, [sample])
            answer = torch.cat([single["input_ids"], first.sequences[row : row + 1, -3:]], 1)
            alone = followed(single, answer, words[row])
            fresh = model.generate(**alone, **pictures(single), max_new_tokens=4, **prompts.GREEDY)
            assert kept(sieve)[0] == decided[row]
            got = torch.stack(out.logits)[:, row]
            assert deviation("of a ragged later turn", got, torch.stack(fresh.logits)[:, 0]) <= NOISE


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("spec", [CONNECTOR, INSIDE])
@each_family
@torch.no_grad()
def test_a_plain_forward_returns_the_new_columns(spec, family, masked, deviation):
    model, inputs = models.tiny_model(family), prompts.collate(family, prompts.batch(family, "two-images"))
    words = question(1, 30, 6)
    whole = followed(inputs, inputs["input_ids"], words)
    given = {} if masked else {"attention_mask": None}
    with tokensieve.attach(model, spec, reselect=True) as sieve:
        cache = model(**{**inputs, **given}).past_key_values
        turn = {"input_ids": words, "attention_mask": whole["attention_mask"], **given}
        one = model(**turn, past_key_values=copy.deepcopy(cache), logits_to_keep=1).logits
        logits, decided = model(**turn, past_key_values=cache).logits, kept(sieve)
        fresh = model(**{**whole, **pictures(inputs), **given}).logits
        assert decided == kept(sieve)
    assert deviation("of a plain forward", logits, fresh[:, -6:]) <= NOISE
    assert one.shape[1] == 1


def test_the_encoder_runs_once_and_the_features_go_with_the_cache():
    family = "qwen3-vl"
    model, inputs = models.tiny_model(family), prompts.collate(family, prompts.batch(family, "two-images"))
    calls = []
    counter = model.model.visual.register_forward_hook(lambda *_: calls.append(1))
    with tokensieve.attach(model, CONNECTOR, reselect=True):
        out = model.generate(**inputs, max_new_tokens=3, **prompts.GREEDY)
        text = followed(inputs, out.sequences, question(1, 30, 4))
        cache = model.generate(**text, past_key_values=out.past_key_values, **prompts.GREEDY, max_new_tokens=2)
        cache = cache.past_key_values
    counter.remove()
    assert len(calls) == 1
    conversation = cache._tokensieve_cache_info.conversation
    assert copy.deepcopy(cache)._tokensieve_cache_info.conversation is conversation, (
        "a copied cache shares the features"
    )
    tokens = int((inputs["input_ids"] == families.IMAGE).sum())
    assert conversation.nbytes == tokens * (1 + 3) * 64 * 4, "features and three deepstack planes, float32"
    features = weakref.ref(conversation.prompt["mm_encoder_outputs"]["image"].pooler_output[0])
    del cache, conversation, out, text
    gc.collect()
    assert features() is None


@pytest.mark.parametrize("spec", ["divprune(keep=5)", "pool-decoder(layer=1, stride=3)", "vtw(layer=1)", "full"])
def test_a_method_that_reads_no_words_continues_on_its_cache(spec, deviation):
    family = "llava-clip"
    model, inputs = models.tiny_model(family), prompts.collate(family, prompts.batch(family, "ragged"))
    outs = []
    for reselect in (False, True):
        with tokensieve.attach(model, spec, reselect=reselect):
            first = model.generate(**inputs, max_new_tokens=3, **prompts.GREEDY)
            info = getattr(first.past_key_values, "_tokensieve_cache_info", None)
            assert getattr(info, "conversation", None) is None
            text = followed(inputs, first.sequences, question(3, 20, 4))
            outs.append(
                model.generate(**text, past_key_values=first.past_key_values, max_new_tokens=3, **prompts.GREEDY)
            )
    assert all(torch.equal(a, b) for a, b in zip(outs[0].logits, outs[1].logits, strict=True))


def test_a_conversation_without_an_image_passes_through():
    family = "llava-clip"
    model, inputs = models.tiny_model(family), prompts.collate(family, prompts.batch(family, "mixed")[2:3])
    outs = []
    for attached in (False, True):
        sieve = tokensieve.attach(model, CONNECTOR, reselect=True) if attached else None
        first = model.generate(**inputs, max_new_tokens=3, **prompts.GREEDY)
        text = followed(inputs, first.sequences, question(1, 20, 4))
        outs.append(model.generate(**text, past_key_values=first.past_key_values, max_new_tokens=3, **prompts.GREEDY))
        if sieve is not None:
            sieve.detach()
    assert all(torch.equal(a, b) for a, b in zip(outs[0].logits, outs[1].logits, strict=True))


# -- refusals -------------------------------------------------------------------------------------------------------


def crop(cache):
    cache.crop(-2)


def compress(cache):
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, ::2], layer.values[:, :, ::2]


def select(cache):
    cache.batch_select_indices(torch.tensor([0]))


def offload(cache):
    cache.offloading = True


SPOILED = {
    crop: r"the cache counts 35 columns where the conversation has 37: one that was cropped or compressed",
    compress: "the cache counts .* columns where the conversation has 37: one that was cropped or compressed",
    select: "the rows of this cache were moved, as in beam search",
    offload: "does not refill an offloaded cache",
}


@pytest.mark.parametrize("spoil", SPOILED)
def test_a_changed_cache_is_refused(spoil):
    family = "llava-clip"
    model, inputs = models.tiny_model(family), prompts.collate(family, prompts.batch(family, "single"))
    with tokensieve.attach(model, CONNECTOR, reselect=True):
        first = model.generate(**inputs, max_new_tokens=3, **prompts.GREEDY)
        spoil(first.past_key_values)
        with pytest.raises(tokensieve.Refusal, match=SPOILED[spoil]):
            model(input_ids=question(1, 20, 4), past_key_values=first.past_key_values)


def test_a_conversation_that_went_on_without_it_is_refused():
    family = "llava-clip"
    model, inputs = models.tiny_model(family), prompts.collate(family, prompts.batch(family, "single"))
    with tokensieve.attach(model, CONNECTOR, reselect=True):
        cache = model.generate(**inputs, max_new_tokens=3, **prompts.GREEDY).past_key_values
    with tokensieve.attach(model, CONNECTOR):
        model(input_ids=question(1, 20, 4), past_key_values=cache)
    refused = pytest.raises(tokensieve.Refusal, match="or continued without reselect=True")
    with tokensieve.attach(model, CONNECTOR, reselect=True), refused:
        model(input_ids=question(1, 20, 4), past_key_values=cache)


def test_beam_search_is_refused_in_a_later_turn_only():
    family = "llava-clip"
    model, inputs = models.tiny_model(family), prompts.collate(family, prompts.batch(family, "single"))
    beams = {"num_beams": 2, "do_sample": False, "return_dict_in_generate": True}
    with tokensieve.attach(model, CONNECTOR, reselect=True):
        out = model.generate(**inputs, **beams, max_new_tokens=4)
        with pytest.raises(tokensieve.Refusal, match="the rows of this cache were moved, as in beam search"):
            model(input_ids=question(2, 20, 4), past_key_values=out.past_key_values)


@torch.no_grad()
def test_a_turn_that_cannot_be_decided_anew_is_refused_and_leaves_the_cache():
    family = "llava-clip"
    model, inputs = models.tiny_model(family), prompts.collate(family, prompts.batch(family, "single"))
    turn = {"input_ids": question(1, 20, 4)}
    embeds = {"inputs_embeds": torch.zeros(1, 4, 64)}
    with tokensieve.attach(model, CONNECTOR):
        without = model(**inputs).past_key_values
    with tokensieve.attach(model, CONNECTOR, reselect=True):
        cache = model(**inputs).past_key_values
        columns, shapes = cache.get_seq_length(), held(cache)
        for arguments, reason in (
            ({**turn, "labels": turn["input_ids"]}, "takes no labels"),
            (embeds, "needs the input_ids of a new turn"),
            ({**turn, "logits_to_keep": 3}, "takes the candidates of assisted decoding for a new turn"),
            ({**turn, "attention_mask": torch.ones(1, 4)}, rf"must cover the {columns} columns in the cache and the 4"),
            (inputs, "new images on a filled cache: with reselect=True, give the whole conversation"),
        ):
            with pytest.raises(tokensieve.Refusal, match=reason):
                model(**arguments, past_key_values=cache)
        with pytest.raises(tokensieve.Refusal, match="this cache was filled without reselect=True"):
            model(**turn, past_key_values=without)
        failing = model.lm_head.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(**turn, past_key_values=cache)
        failing.remove()
        assert (cache.get_seq_length(), held(cache)) == (columns, shapes), "as it was"
        logits = model(**turn, past_key_values=cache).logits
    with tokensieve.attach(model, "trsm(keep=6)", reselect=True):
        with pytest.raises(tokensieve.Refusal, match=r"begun with trsm\(keep=5.* is attached: begin a new one"):
            model(**turn, past_key_values=cache)
        assert logits.shape[1] == 4


def test_bad_values_and_models_without_conversations():
    with pytest.raises(tokensieve.Refusal, match="reselect must be True or False; got 'yes'"):
        tokensieve.attach(models.tiny_model("llava-clip"), CONNECTOR, reselect="yes")
    with pytest.raises(tokensieve.Refusal, match="reselect=True is for conversations"):
        tokensieve.attach(crossmodal.vilt(), "pumer(layers=(1,))", reselect=True)


def test_a_cache_object_may_be_given_empty():
    family = "llava-clip"
    model, inputs = models.tiny_model(family), prompts.collate(family, prompts.batch(family, "single"))
    cache = DynamicCache(config=model.config.text_config)
    with tokensieve.attach(model, CONNECTOR, reselect=True):
        model.generate(**inputs, max_new_tokens=2, past_key_values=cache)
        assert cache._tokensieve_cache_info.conversation is not None
        cache.reset()
        text = prompts.collate(family, prompts.batch(family, "mixed")[2:3])
        model.generate(**text, max_new_tokens=2, past_key_values=cache)
        assert not hasattr(cache, "_tokensieve_cache_info"), "the conversation is over"
