"""Impossible requests are refused before the LLM runs, with advice, and nothing is broken afterwards."""

import copy

import pytest
import torch

import tokensieve
from tests.support import families, models, prompts

FAMILY = "llava-clip-deep"


@pytest.fixture
def model():
    return models.tiny_model(FAMILY)


@pytest.fixture
def inputs():
    return prompts.collate(FAMILY, prompts.batch(FAMILY, "single"))


@pytest.fixture
def unused(model):
    """The LLM must not have run when the test ends."""
    calls = []
    handle = model.model.language_model.register_forward_pre_hook(lambda *_: calls.append(1))
    yield
    handle.remove()
    assert not calls


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("fastv(layer=6)", "layers 1 to 5"),
        ("fastv(layer=0)", "layers 1 to 5"),
        ("pyramiddrop(layers=(3, 2, 4))", "ascending"),
        ("sparsevlm(layers=())", "layers 1 to 5"),
        ("fastv(layer=3, average=0.4)", "reachable: above"),  # three full blocks of six
        ("autoprune(keep=0.3, layer=2)", "reachable: above"),  # two full blocks of six
        ("pyramiddrop(counts=(0.5, 0.2))", "counts must be 3 budgets"),
        ("pyramiddrop(counts=(0.2, 0.3, 0.1))", "none larger than the one before"),
        ("sparsevlm(recycle=2.0)", "recycle must be a share"),
        ("pool-decoder(stride=0)", "stride must be at least 1"),
        ("pool-decoder(incomplete='pad')", "incomplete must be one of 'average', 'drop'"),
        ("fastv(keep=0)", "keep must be"),
        ("fastv(average=0.0)", "must be"),
        ("vtw(calibration='no-such-file.json')", "no result of 'tokensieve calibrate vtw'"),
        ("fastv + vtw", "two methods of the same stage"),
        ("fastv(keep=4) + uniform(keep=8)", "order encoder, connector, decoder"),
    ],
)
def test_at_attach(model, unused, spec, words):
    before = models.hooks(model)
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        tokensieve.attach(model, spec)
    assert models.hooks(model) == before
    assert "_deepstack_process" not in vars(model.model.language_model)


def test_an_average_that_one_image_cannot_reach(model, inputs, unused):
    with tokensieve.attach(model, "autoprune(keep=8, layer=2)"), pytest.raises(tokensieve.Refusal, match="reachable"):
        model(**inputs)


@torch.no_grad()
def test_a_prompt_shorter_than_the_places_of_the_guesses(model):
    sample = prompts.batch(FAMILY, "single")[0]
    (image,) = sample.images
    ids = torch.tensor([[*[families.IMAGE] * 25, 7]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": image.pixels}
    spec = "trio(layers=(1, 3), counts=({}, 2))"
    with tokensieve.attach(model, spec.format(4)) as sieve:
        model(**inputs)
        assert sieve.last[0][0].slots == 2
    for keep, columns in ((3, 4), (2, 3)):
        words = f"the last 5 places of the prompt; {columns} are left of it at layer 3"
        with tokensieve.attach(model, spec.format(keep)), pytest.raises(tokensieve.Refusal, match=words):
            model(**inputs)
        with tokensieve.attach(model, "divprune(keep=9)"):
            model(**inputs)  # nothing of the refused prompt remains


def test_a_gradient_of_weights_that_were_made_in_inference_mode():
    shared = models.unhooked(FAMILY)  # made outside: other tests use it
    with torch.inference_mode():
        frozen = copy.deepcopy(shared)
    with pytest.raises(tokensieve.Refusal, match="load the model outside"):
        tokensieve.attach(frozen, "trio(layers=(2,))")


def test_a_family_without_a_decoder_stage(model, unused, monkeypatch):
    from tokensieve.models.llava import Llava

    monkeypatch.setattr(Llava, "stages", ("encoder", "connector"))
    with pytest.raises(ValueError, match="acts in the decoder, which is not supported in LLaVA"):
        tokensieve.attach(model, "fastv")


def test_layers_with_other_attention_are_refused(unused, monkeypatch):
    model = models.tiny_model("qwen2.5-vl-deep")
    kinds = ["full_attention", *["chunked_attention"] * (families.DEPTH - 1)]
    monkeypatch.setattr(model.model.language_model.config, "layer_types", kinds)
    with pytest.raises(ValueError, match="full_attention or sliding_attention; this LLM has chunked_attention"):
        tokensieve.attach(model, "fastv")


@pytest.mark.parametrize(
    ("spec", "more", "words"),
    [
        ("fastv", {"labels": True}, "labels cannot be given with a decoder method"),
        ("fastv", {"logits_to_keep": 3}, "assisted decoding"),
        ("fastv(layer=4, average=8)", {}, "reachable: above"),  # of 25 tokens: at least 4/6
    ],
)
def test_in_a_forward(model, inputs, unused, spec, more, words):
    if "labels" in more:
        more = {"labels": inputs["input_ids"]}
    with tokensieve.attach(model, spec), pytest.raises(ValueError, match=words):
        model(**inputs, **more)


@pytest.mark.parametrize(
    ("spec", "more", "words"),
    [
        ("fastv", {"cache_implementation": "static"}, "static cache"),
        ("vtw", {"cache_implementation": "static"}, "static cache"),
        ("fastv", {"prefill_chunk_size": 8}, "prefill_chunk_size"),
        ("sparsevlm", {"assistant_model": True}, "without an assistant"),
        ("text-correlation", {"prompt": "no words"}, "no words to go by"),
    ],
)
def test_in_generate(model, inputs, unused, spec, more, words):
    if "assistant_model" in more:
        from transformers import LlamaConfig, LlamaForCausalLM

        more = {"assistant_model": LlamaForCausalLM(LlamaConfig(**families.text())).eval()}
    if "prompt" in more:
        ids = [families.BOS, *[families.IMAGE] * 25, families.EOS]
        inputs = {**inputs, "input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, 27, dtype=torch.long)}
        more = {}
    with tokensieve.attach(model, spec), pytest.raises(ValueError, match=words):
        model.generate(**inputs, max_new_tokens=3, **more)


def test_a_reduced_cache_without_its_method(model, inputs):
    with tokensieve.attach(model, "fastv"):
        cache = model.generate(**inputs, max_new_tokens=1, **prompts.GREEDY).past_key_values
    with (
        tokensieve.attach(model, "uniform(keep=4)"),
        pytest.raises(ValueError, match="with the decoder method attached"),
    ):
        model(input_ids=torch.tensor([[20]]), past_key_values=cache)


def test_nothing_is_broken_afterwards(model, inputs):
    """After every kind of refusal, and after an error in the middle of the blocks, the same answer as before."""
    with tokensieve.attach(model, "fastv") as sieve:
        expected = model.generate(**inputs, max_new_tokens=3)
        for more in ({"cache_implementation": "static"}, {"prefill_chunk_size": 8}):
            with pytest.raises(ValueError, match=r"cache|chunk"):
                model.generate(**inputs, max_new_tokens=3, **more)
        failing = model.model.language_model.layers[3].register_forward_pre_hook(_fail)
        with pytest.raises(RuntimeError, match="in the middle"):
            model(**inputs)
        failing.remove()
        ids = torch.tensor([[families.BOS, 20, 21]])
        assert torch.equal(model(input_ids=ids).logits, models.unhooked(FAMILY)(input_ids=ids).logits)
        assert torch.equal(model.generate(**inputs, max_new_tokens=3), expected)
        assert sieve.last[0][0].slots == 12


def _fail(*_):
    raise RuntimeError("in the middle")
