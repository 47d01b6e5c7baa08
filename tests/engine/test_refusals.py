"""Impossible requests are refused with a clear message, and a refusal changes nothing."""

import re
import threading

import pytest
import torch
from transformers import BertConfig, BertModel, DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicLayer

import tokensieve
from tests.support import families, models, prompts
from tokensieve import Method, Reduction

each_family = pytest.mark.parametrize("family", families.CORE)


@pytest.fixture(params=["llava-clip", "qwen2.5-vl"])
def case(request):
    """A model, its inputs, and the check that it still works and can be restored."""
    family = request.param
    model, inputs = models.tiny_model(family), prompts.collate(family, prompts.batch(family, "ragged"))
    before = models.footprint(model)
    yield model, inputs
    with tokensieve.attach(model, "uniform", keep=5):
        model.generate(**inputs, max_new_tokens=2)
    assert models.footprint(model) == before


def works(model, inputs):
    assert model.generate(**inputs, max_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2


# -- at attach time -------------------------------------------------------------------------------------------------

ATTACH = {
    "unknown method": (("vtc-cl",), {}, "unknown method 'vtc-cl'; did you mean vtc-cls"),
    "unknown parameter": (("vtc-cls",), {"kep": 4}, "no open parameter 'kep'; did you mean keep"),
    "bad budget": (
        ("vtc-cls",),
        {"keep": 0},
        "keep must be a whole number of tokens >= 1, or a share in (0, 1]",
    ),
    "bad literal": (("trsm(query='word')",), {}, "query must be one of 'tokens', 'prompt'; got 'word'"),
    "positions": (("full",), {"positions": "kept"}, "positions must be 'original' or 'contiguous'; got 'kept'"),
    "order": (("pool + downsample",), {}, "order encoder, connector, decoder; got connector, encoder"),
    "same stage": (
        ("vtc-cls + trsm",),
        {},
        "two methods of the same stage cannot be combined; got connector",
    ),
    "no such layers": (("vtc-cls(first_layer=9)",), {}, "no encoder layer in 9:-1; the encoder has layers 0 to"),
    "first layer is last": (("vtc-cls(first_layer=-1)",), {}, "no encoder layer in -1:-1"),
    "nothing": (([],), {}, "a method is a spec such as 'vtc-cls(keep=64)', a Method, a list of Methods, or decisions"),
    "a number": ((5,), {}, "or decisions [sample][image]; got 5"),
    "a list of specs": ((["vtc-cls"],), {}, "or decisions [sample][image]; got ['vtc-cls']"),
    "parameters of an object": (([],), {"keep": 3}, "keep can only be given with a method's name"),
}


@pytest.mark.parametrize("reason", ATTACH)
def test_a_failing_attach_leaves_the_model_untouched(case, reason):
    model, inputs = case
    args, kwargs, message = ATTACH[reason]
    before = models.footprint(model)
    with pytest.raises(ValueError, match=re.escape(message)):
        tokensieve.attach(model, *args, **kwargs)
    assert models.footprint(model) == before
    works(model, inputs)


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(
            lambda: BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)), id="bert"
        ),
        pytest.param(lambda: LlamaForCausalLM(LlamaConfig(**families.text())), id="text-only"),
        pytest.param(lambda: torch.nn.Linear(2, 2), id="no model at all"),
    ],
)
def test_models_of_no_known_family(model):
    with pytest.raises(ValueError, match=r"is of no supported family; supported: .*llava, .*qwen2_5_vl, .*qwen3_vl"):
        tokensieve.attach(model(), "full")


def test_an_unknown_vision_encoder_is_refused(monkeypatch):
    model = models.build("llava-clip")
    monkeypatch.setattr(model.model.vision_tower.config, "model_type", "dinov2")
    before = models.footprint(model)
    with pytest.raises(ValueError, match="LLaVA with a dinov2 tower is not supported; supported: clip_vision_model"):
        tokensieve.attach(model, "vtc-cls")
    assert models.footprint(model) == before


def test_attaching_twice(case):
    model, inputs = case
    with tokensieve.attach(model, "vtc-cls", keep=5):
        before = models.footprint(model)
        with pytest.raises(ValueError, match=re.escape("vtc-cls(keep=5) is attached to this model already; detach()")):
            tokensieve.attach(model, "uniform")
        assert models.footprint(model) == before
        works(model, inputs)


def test_attaching_from_many_threads_lets_one_through():
    model, start, got = models.tiny_model("llava-clip"), threading.Barrier(8), []
    before = models.footprint(model)

    def try_it():
        start.wait()
        try:
            got.append(tokensieve.attach(model, "vtc-cls", keep=5))
        except ValueError as error:
            got.append(str(error))

    threads = [threading.Thread(target=try_it) for _ in range(8)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    sieves = [x for x in got if isinstance(x, tokensieve.Sieve)]
    assert len(got) == 8
    assert len(sieves) == 1
    sieves[0].detach()
    assert models.footprint(model) == before


# -- when the model is called ---------------------------------------------------------------------------------------


def right_padded(inputs):
    return {**inputs, "attention_mask": inputs["attention_mask"].flip(-1), "input_ids": inputs["input_ids"].flip(-1)}


def filled_cache(model, inputs):
    cache = DynamicCache()
    text = {"input_ids": torch.full((len(inputs["input_ids"]), 3), 7)}
    model(**text, past_key_values=cache)
    return cache


CALLS = {
    "static cache": (
        lambda model, inputs: model.generate(**inputs, max_new_tokens=2, cache_implementation="static"),
        r"attention_mask must be \[B, L\]|a static cache cannot hold a reduced prompt",
    ),
    "chunked prefill": (
        lambda model, inputs: model.generate(**inputs, max_new_tokens=2, prefill_chunk_size=16),
        r"prefill_chunk_size\): encode them with the method attached",
    ),
    "right padding": (
        lambda model, inputs: model(**right_padded(inputs)),
        "right-padded prompts cannot be reduced; set processor.tokenizer.padding_side = 'left'",
    ),
    "embeddings only": (
        lambda model, inputs: model(
            inputs_embeds=model.get_input_embeddings()(inputs["input_ids"]),
            **{k: v for k, v in inputs.items() if k != "input_ids"},
        ),
        "needs input_ids: inputs_embeds do not show where the images stand",
    ),
    "a mask that leaves out the cache": (
        lambda model, inputs: model(**inputs, past_key_values=filled_cache(model, inputs)),
        r"attention_mask must cover the 3 columns in the cache and the \d+ new ones; got \d+",
    ),
    "a 4-D mask": (
        lambda model, inputs: model(**{**inputs, "attention_mask": inputs["attention_mask"][:, None, None].float()}),
        r"attention_mask must be \[B, L\] for a reduced prompt; got 4 dimensions",
    ),
    "columns of logits": (
        lambda model, inputs: model(**inputs, logits_to_keep=torch.tensor([1, 2])),
        "logits_to_keep must be a number",
    ),
    "a quantised cache, say": (
        lambda model, inputs: model(**inputs, past_key_values=other_cache()),
        "a cache with OtherLayer is not supported",
    ),
}


class OtherLayer(DynamicLayer):
    """An untested kind of cache."""


def other_cache():
    cache = DynamicCache()
    cache.layers = [OtherLayer() for _ in range(3)]
    return cache


@pytest.mark.parametrize("method", ["vtc-cls(keep=5)", "downsample(keep=5)"])
@pytest.mark.parametrize("reason", CALLS)
@torch.no_grad()
def test_a_refused_call_gives_the_reason_and_changes_nothing(case, reason, method):
    model, inputs = case
    call, message = CALLS[reason]
    expected = model.generate(**inputs, max_new_tokens=2, **prompts.GREEDY)
    with tokensieve.attach(model, method):
        good = model.generate(**inputs, max_new_tokens=2)
        with pytest.raises(ValueError, match=message):
            call(model, inputs)
        assert torch.equal(model.generate(**inputs, max_new_tokens=2), good)
    after = model.generate(**inputs, max_new_tokens=2, **prompts.GREEDY)
    assert all(torch.equal(a, b) for a, b in zip(after.logits, expected.logits, strict=True))


@torch.no_grad()
def test_features_encoded_before_attaching(case):
    model, inputs = case
    pixels = {k: inputs[k] for k in ("pixel_values", "image_grid_thw") if k in inputs}
    encoded = model.get_image_features(**pixels, return_dict=True)
    rest = {k: v for k, v in inputs.items() if k != "pixel_values"}
    with (
        tokensieve.attach(model, "uniform", keep=5),
        pytest.raises(ValueError, match="encoded before the method was attached"),
    ):
        model(**rest, mm_encoder_outputs={"image": encoded})


@torch.no_grad()
def test_placeholders_and_images_that_do_not_match(case):
    model, inputs = case
    ids = inputs["input_ids"].clone()
    ids[0, (ids[0] == families.IMAGE).nonzero()[0]] = 7
    with (
        tokensieve.attach(model, "uniform", keep=5),
        pytest.raises(ValueError, match=r"sample 0 has \d+ image placeholders; its images have \[\d+\] tokens"),
    ):
        model(**{**inputs, "input_ids": ids})


@each_family
@torch.no_grad()
def test_a_text_method_without_words(family):
    model, s = models.tiny_model(family), prompts.sample(family, (3, 0), (0,), 1)
    with (
        tokensieve.attach(model, "trsm", keep=5),
        pytest.raises(ValueError, match="the prompt of sample 0 has no words"),
    ):
        model(**prompts.collate(family, [s]))
    with tokensieve.attach(model, "trsm", keep=5):
        model(**prompts.collate(family, prompts.batch(family, "mixed")))  # a row without images needs no words


@pytest.mark.parametrize("family", families.CORE_QWEN)
@torch.no_grad()
def test_decoding_by_hand_with_contiguous_m_rope(family):
    model, inputs = models.tiny_model(family), prompts.collate(family, prompts.batch(family, "two-images"))
    with tokensieve.attach(model, "uniform", keep=5, positions="contiguous"):
        out = model(**inputs)
        with pytest.raises(ValueError, match="renumbered positions with M-RoPE: pass position_ids"):
            model(input_ids=torch.tensor([[7]]), past_key_values=out.past_key_values)


@pytest.mark.parametrize("family", families.CORE_QWEN)
@torch.no_grad()
def test_a_video_is_not_resized(family):
    model = models.tiny_model(family)
    s = prompts.sample(family, (3, 4), (0,), 1)
    ids = torch.tensor([[families.VIDEO if i == families.IMAGE else i for i in s.ids]])
    inputs = {
        "input_ids": ids,
        "pixel_values_videos": s.images[0].pixels,
        "video_grid_thw": torch.tensor([[1, 8, 8]]),
        "mm_token_type_ids": 2 * (ids == families.VIDEO).int(),
    }
    with (
        tokensieve.attach(model, "downsample(keep=5)"),
        pytest.raises(ValueError, match="acts on images in the encoder; videos are not supported"),
    ):
        model(**inputs)


def test_decisions_for_other_images(case):
    model, inputs = case
    with (
        tokensieve.attach(model, [[Reduction.identity(3)]]),
        pytest.raises(ValueError, match=r"the decisions to replay are for images of \[\[3\]\] tokens; the batch has"),
    ):
        model.generate(**inputs, max_new_tokens=1)


def test_a_method_that_fails_leaves_a_working_model(case, registry):
    from dataclasses import dataclass

    @tokensieve.register("broken", paper="none")
    @dataclass(frozen=True)
    class Broken(Method):
        keep: int = 4

        def reduce(self, image):
            raise RuntimeError("on purpose")

    model, inputs = case
    before = models.footprint(model)
    with tokensieve.attach(model, "broken"):
        with pytest.raises(RuntimeError, match="on purpose"):
            model.generate(**inputs, max_new_tokens=1)
        with pytest.raises(RuntimeError, match="on purpose"):
            model.generate(**inputs, max_new_tokens=1)
    assert models.footprint(model) == before
    works(model, inputs)


def test_an_attach_that_fails_otherwise_leaves_nothing_behind(case, monkeypatch):
    """An unknown LLM may lack anything: not only what we refuse must be undone."""
    model, _ = case
    before = models.footprint(model)
    with monkeypatch.context() as patch:
        patch.setattr(model, "get_decoder", lambda: torch.nn.Identity())
        with pytest.raises(AttributeError, match="layers"):
            tokensieve.attach(model, "uniform(keep=5) + fastv(layer=1, keep=3)")
    assert models.footprint(model) == before


def test_a_vision_encoder_that_fails_disarms_the_probes():
    family = "llava-clip"
    model, inputs = models.tiny_model(family), prompts.collate(family, prompts.batch(family, "single"))
    tower = model.model.vision_tower

    def fail(*_):
        raise RuntimeError("on purpose")

    with tokensieve.attach(model, "fastervlm", keep=5) as sieve:
        handle = tower.encoder.layers[-1].mlp.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="on purpose"):
            model(**inputs)
        handle.remove()
        with torch.no_grad():
            tower(inputs["pixel_values"])  # a direct call: nothing may be read, or kept in memory
        assert not sieve._flight.readings
        works(model, inputs)


def test_masks_in_blocks_cannot_be_read():
    """Flex attention gives its kernel a BlockMask; this method reads attention, and says what to load instead."""
    from torch.nn.attention.flex_attention import create_block_mask

    from tokensieve.engine.inflight import InFlight
    from tokensieve.engine.probe import probe_of

    model = models.tiny_model("llava-clip")
    attention = model.model.vision_tower.encoder.layers[0].self_attn
    probe = probe_of(attention, lambda *inputs: inputs, InFlight())
    try:
        probe.arm()
        rows, mask = torch.zeros(1, 1, 128, 8), create_block_mask(lambda b, h, q, k: q >= k, 1, None, 128, 128, "cpu")
        with pytest.raises(ValueError, match=r"attention cannot be read under a BlockMask .*sdpa, eager"):
            probe.observe(rows, rows, None, mask, rows)
    finally:
        probe.remove()
