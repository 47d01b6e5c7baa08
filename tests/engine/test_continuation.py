"""Law 4: later turns on the returned cache, beams, sampling, no cache, plain forwards and decoding by hand."""

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM

import tokensieve
from tests.laws.test_connector import resized
from tests.support import families, models, oracle, prompts
from tests.support.oracle import NOISE

SPECS = ("vtc-cls(keep=13)", "pool(keep=0.3)", "downsample(keep=0.5) + divprune(keep=5)")
each_family = pytest.mark.parametrize("family", families.CORE)
each_policy = pytest.mark.parametrize("policy", ["original", "contiguous"])
each_batch = pytest.mark.parametrize("kind", ["ragged", "two-images", "mixed"])
each_spec = pytest.mark.parametrize("spec", SPECS)


def longer(inputs, sequences, extra=0):
    """The same prompt with what was answered, and ``extra`` new words, appended; without the images."""
    rows, added = len(sequences), sequences.shape[1] - inputs["input_ids"].shape[1]
    words = torch.arange(11, 11 + extra).expand(rows, -1)
    ones = torch.ones(rows, added + extra, dtype=torch.long)
    out = {
        "input_ids": torch.cat([sequences, words], 1),
        "attention_mask": torch.cat([inputs["attention_mask"], ones], 1),
    }
    if "mm_token_type_ids" in inputs:
        out["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], 0 * ones.int()], 1)
    return out


def images(inputs):
    return {k: v for k, v in inputs.items() if k in ("pixel_values", "image_grid_thw")}


@each_spec
@each_policy
@each_batch
@each_family
def test_a_second_turn_on_the_cache_equals_the_one_shot_run(spec, family, kind, policy, deviation):
    model, samples = models.tiny_model(family), prompts.batch(family, kind)
    inputs, cache = prompts.collate(family, samples), DynamicCache(config=models.tiny_model(family).config.text_config)
    # trsm reads all text, so its one-shot decision would see more words: methods that do not read the prompt only
    with tokensieve.attach(model, spec, positions=policy) as sieve:
        first = model.generate(**inputs, max_new_tokens=3, past_key_values=cache, **prompts.GREEDY)
        decided = [[r.kept for r in row] for row in sieve.last]
        held, seen = cache.layers[0].keys.shape[-2], cache.get_seq_length()
        turn = longer(inputs, first.sequences, extra=5)
        second = model.generate(**turn, max_new_tokens=4, past_key_values=cache, **prompts.GREEDY)
        again = model.generate(**turn, **images(inputs), max_new_tokens=4, **prompts.GREEDY)
    lengths = [len(oracle.kept_columns(s, kept)) for s, kept in zip(samples, decided, strict=True)]
    width = inputs["input_ids"].shape[1]
    assert (held, seen) == (max(lengths) + 2, width + 2), "columns held, and columns as the caller counts them"
    assert cache.layers[-1].keys.shape[-2] == max(lengths) + 3 + 5 + 3
    assert deviation("of a second turn (law 4)", torch.stack(second.logits), torch.stack(again.logits)) <= NOISE
    assert torch.equal(second.sequences, again.sequences)


@each_policy
@each_family
def test_generation_goes_on_where_it_stopped(family, policy, deviation):
    model = models.tiny_model(family)
    inputs = prompts.collate(family, prompts.batch(family, "mixed"))
    with tokensieve.attach(model, "divprune", keep=5, positions=policy):
        whole = model.generate(**inputs, max_new_tokens=7, **prompts.GREEDY)
        part = model.generate(**inputs, max_new_tokens=3, **prompts.GREEDY)
        rest = model.generate(
            **longer(inputs, part.sequences), past_key_values=part.past_key_values, max_new_tokens=4, **prompts.GREEDY
        )
    assert torch.equal(rest.sequences, whole.sequences)
    assert deviation("of generation resumed (law 4)", torch.stack(rest.logits), torch.stack(whole.logits[3:])) <= NOISE


@pytest.mark.parametrize("spec", ["divprune(keep=5)", "divprune(keep=9) + fastv(keep=0.5, layer=1)"])
def test_a_cache_from_a_tuple_is_continued_as_any_other(spec):
    """With return_dict=False the cache is an entry of the tuple."""
    model, samples = models.tiny_model("llava-clip"), prompts.batch("llava-clip", "ragged")
    inputs = prompts.collate("llava-clip", samples)
    turn = longer(inputs, inputs["input_ids"], extra=2)
    turn["input_ids"] = turn["input_ids"][:, -2:]
    with torch.no_grad(), tokensieve.attach(model, spec):
        expected = model(**turn, past_key_values=model(**inputs).past_key_values).logits
        _, cache, *_ = model(**inputs, return_dict=False)
        assert torch.equal(model(**turn, past_key_values=cache).logits, expected)


def test_positions_of_a_step_may_lack_the_plain_ids():
    model = models.tiny_model("qwen2.5-vl")
    inputs = prompts.collate("qwen2.5-vl", prompts.batch("qwen2.5-vl", "ragged"))
    turn = longer(inputs, inputs["input_ids"], extra=1)
    turn["input_ids"] = turn["input_ids"][:, -1:]
    del turn["mm_token_type_ids"]

    def step(axes):
        cache = model(**inputs).past_key_values
        positions = torch.full((axes, len(inputs["input_ids"]), 1), cache.get_seq_length())
        return model(**turn, position_ids=positions, past_key_values=cache).logits

    with torch.no_grad(), tokensieve.attach(model, "divprune(keep=5)", positions="contiguous"):
        assert torch.equal(step(3), step(4))


@each_policy
@pytest.mark.parametrize("kind", ["ragged", "mixed"])
@each_family
def test_beams_of_a_batch_are_those_of_each_row(family, kind, policy):
    model, samples = models.tiny_model(family), prompts.batch(family, kind)
    beams = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 5, "do_sample": False}
    with tokensieve.attach(model, "vtc-cls", keep=5, positions=policy) as sieve:
        together = model.generate(**prompts.collate(family, samples), **beams)[:, -5:]
        assert [len(row) for row in sieve.last] == [len(s.images) for s in samples]
        decided = [[r.kept.tolist() for r in row] for row in sieve.last]
        model.generate(**prompts.collate(family, samples), max_new_tokens=1)
        assert decided == [[r.kept.tolist() for r in row] for row in sieve.last], "expansion must not mix images up"
        for i, s in enumerate(samples):
            if s.images:
                own = model.generate(**prompts.collate(family, [s]), **beams)[:, -5:]
                assert together[2 * i : 2 * i + 2].tolist() == own.tolist()
                assert [r.kept.tolist() for r in sieve.last[0]] == decided[i]


def test_beams_are_those_of_the_language_model_fed_by_hand():
    """transformers' own beam search over the hand-merged embeddings."""
    family = "llava-clip"
    model, unhooked, (s,) = models.tiny_model(family), models.unhooked(family), prompts.batch(family, "two-images")
    language = LlamaForCausalLM(model.config.text_config).eval()
    language.model, language.lm_head = unhooked.model.language_model, unhooked.lm_head
    language.generation_config = unhooked.generation_config
    beams = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 6, "do_sample": False}
    with tokensieve.attach(model, "divprune", keep=5, positions="contiguous") as sieve:
        got = model.generate(**prompts.collate(family, [s]), **beams)[:, -6:]
        kept = [r.kept for r in sieve.last[0]]
    features = [oracle.encode_image(unhooked, family, image).rows[k] for image, k in zip(s.images, kept, strict=True)]
    ids = torch.tensor(s.ids)[oracle.kept_columns(s, kept)]
    embeds = unhooked.get_input_embeddings()(ids)
    embeds = embeds.masked_scatter((ids == families.IMAGE)[:, None], torch.cat(features))[None]
    assert got.tolist() == language.generate(inputs_embeds=embeds, **beams).tolist()


@each_policy
@each_family
def test_sampling_with_two_returns(family, policy):
    """Same seed, same draws: two returns of a batch are those of the prompts given twice."""
    model, samples = models.tiny_model(family), prompts.batch(family, "mixed")
    twice = [s for s in samples for _ in range(2)]
    draw = {"do_sample": True, "max_new_tokens": 5, "top_k": 0}
    with tokensieve.attach(model, "vtc-cls", keep=5, positions=policy) as sieve:
        torch.manual_seed(7)
        returned = model.generate(**prompts.collate(family, samples), num_return_sequences=2, **draw)
        assert len(sieve.last) == len(samples)
        torch.manual_seed(7)
        repeated = model.generate(**prompts.collate(family, twice), **draw)
    assert torch.equal(returned, repeated)
    assert not torch.equal(returned[0::2], returned[1::2])


@each_policy
@each_family
def test_without_a_cache(family, policy, deviation):
    model, inputs = models.tiny_model(family), prompts.collate(family, prompts.batch(family, "mixed"))
    with tokensieve.attach(model, "uniform", keep=0.3, positions=policy):
        cached = model.generate(**inputs, max_new_tokens=4, **prompts.GREEDY)
        fresh = model.generate(**inputs, max_new_tokens=4, use_cache=False, **prompts.GREEDY)
    assert torch.equal(cached.sequences, fresh.sequences)
    assert deviation("without a cache (law 4)", torch.stack(cached.logits), torch.stack(fresh.logits)) <= NOISE


@each_spec
@each_policy
@pytest.mark.parametrize("use_cache", [True, False])
@each_family
def test_a_plain_forward_equals_the_hand_reference(spec, family, policy, use_cache, deviation):
    """Every position's logits, not only the last; without padding the mask may be left out."""
    model, (s,) = models.tiny_model(family), prompts.batch(family, "two-images")
    inputs = prompts.collate(family, [s])
    for dropped in ((), ("attention_mask",)):
        given = {k: v for k, v in inputs.items() if k not in dropped}
        with torch.no_grad(), tokensieve.attach(model, spec, positions=policy) as sieve:
            got = model(**given, use_cache=use_cache).logits[0]
        by_hand = by_hand_logits(family, s, sieve.last[0], spec, policy)
        assert deviation("of a plain forward", got, by_hand) <= NOISE


def by_hand_logits(family, s, decisions, spec, policy):
    model, (first, *_) = models.unhooked(family), tokensieve.parse(spec)
    rows = [oracle.reduced(family, "sdpa", i, r, resized(first, i)) for i, r in zip(s.images, decisions, strict=True)]
    with torch.no_grad():
        sequence = oracle.enter(model, family, s, [r.kept for r in decisions], rows, [], policy)
        return oracle.forward(model, family, sequence)


@pytest.mark.parametrize("masked", [True, False])
@each_policy
@each_family
def test_decoding_by_hand(family, policy, masked, deviation):
    """A plain forward, then one token at a time on its cache, as people write it."""
    model, samples = models.tiny_model(family), prompts.batch(family, "ragged" if masked else "two-images")
    inputs = prompts.collate(family, samples)
    if family in families.CORE_QWEN and (masked or policy == "contiguous"):
        pytest.skip("transformers' Qwen cannot decode by hand with a mask; contiguous is refused (see test_refusals)")
    with torch.no_grad(), tokensieve.attach(model, "divprune", keep=5, positions=policy):
        auto = model.generate(**inputs, max_new_tokens=5, **prompts.GREEDY)
        mask, given = inputs["attention_mask"], {k: v for k, v in inputs.items() if masked or k != "attention_mask"}
        out, steps = model(**given), []
        for _ in range(5):
            steps.append(out.logits[:, -1])
            mask = torch.cat([mask, torch.ones(len(mask), 1, dtype=torch.long)], 1)
            step = {"attention_mask": mask} if masked else {}
            token = steps[-1].argmax(-1, keepdim=True)
            out = model(input_ids=token, past_key_values=out.past_key_values, **step)
    assert deviation("of decoding by hand (law 4)", torch.stack(steps), torch.stack(auto.logits)) <= NOISE


@each_family
def test_text_only_calls_pass_through(family):
    """Between two prompts with images, a prompt without any is the unhooked model's."""
    model, text = models.tiny_model(family), prompts.batch(family, "mixed")[2:3]
    inputs = prompts.collate(family, text)
    expected = models.unhooked(family).generate(**inputs, max_new_tokens=4, **prompts.GREEDY)
    with tokensieve.attach(model, "vtc-cls", keep=5, positions="contiguous"):
        model.generate(**prompts.collate(family, prompts.batch(family, "mixed")), max_new_tokens=2)
        got = model.generate(**inputs, max_new_tokens=4, **prompts.GREEDY)
    assert all(torch.equal(a, b) for a, b in zip(got.logits, expected.logits, strict=True))


@each_family
def test_a_cache_that_was_reset_starts_afresh(family):
    model, inputs = models.tiny_model(family), prompts.collate(family, prompts.batch(family, "two-images"))
    text, cache = prompts.collate(family, prompts.batch(family, "mixed")[2:3]), DynamicCache()
    expected = models.unhooked(family).generate(**text, max_new_tokens=4, **prompts.GREEDY)
    with tokensieve.attach(model, "vtc-cls", keep=5, positions="contiguous"):
        model.generate(**inputs, max_new_tokens=2, past_key_values=cache)
        cache.reset()
        got = model.generate(**text, max_new_tokens=4, past_key_values=cache, **prompts.GREEDY)
    assert torch.equal(got.sequences, expected.sequences)
