"""The laws of blocks beside the LLM: on a copy of the stream, with weights and a precision of their own.

That they act as by hand in every family, kernel and batch is a rule of ``tests/methods/decoder/rules.py``, where they
have the weights of the LLM's own layers. Here they have others.
"""

import json
import re
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

import tokensieve
from tests.methods.decoder.rules import Rule, twig
from tests.methods.decoder.runs import by_hand_run
from tests.support import families, models, prompts
from tests.support.oracle import NOISE, Layer
from tokensieve import Refusal, parse
from tokensieve.engine.nets import load_net, save_net, shape_of

SPEC = "twigvlm(layers=(1, 4), blocks=2, keep=0.4, weights='random')"
FAMILY = families.DEEP[0]


def shaken(net):
    """Change every weight of a net, always by the same."""
    generator = torch.Generator().manual_seed(3)
    for weight in net.parameters():
        weight.data += 0.3 * weight.std() * torch.randn(weight.shape, generator=generator).to(weight)
    return net


def rule(net, keep=0.4):
    """The twig by hand with the net's weights in the place of the LLM's."""

    def decide(sequence, image, layer, count):
        beside = SimpleNamespace(layers=dict(enumerate(net, 1)), rotary_emb=layer.decoder.rotary_emb)
        return twig(len(net))(sequence, image, Layer(beside, layer.number, layer.rows, layer.position_ids), count)

    return Rule([1, 4], decide, lambda n: [max(1, round(keep * n)), 0])


@pytest.mark.parametrize("family", families.DEEP)
@torch.no_grad()
def test_a_second_turn_on_the_cache(family, deviation):
    """The prompt, greedy steps and later words on the cache, padded: as by hand; the net and the model stay apart."""
    model, samples = models.tiny_model(family), prompts.batch(family, "ragged")
    before, state = models.footprint(model), {name: rows.clone() for name, rows in model.state_dict().items()}
    inputs, later = prompts.collate(family, samples), torch.tensor([[7, 9, 11]] * len(samples))
    with tokensieve.attach(model, SPEC) as sieve:
        plain = model(**inputs).logits
        net = shaken(sieve.nets["decoder"])
        assert not torch.equal(model(**inputs).logits, plain)
        first = model.generate(**inputs, max_new_tokens=2, **prompts.GREEDY)
        ids = torch.cat([first.sequences, later], 1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(len(ids), 5, dtype=torch.long)], 1)
        types = {name: torch.cat([x, x.new_zeros(len(ids), 5)], 1) for name, x in inputs.items() if "type" in name}
        second = model.generate(
            input_ids=ids, attention_mask=mask, **types, past_key_values=first.past_key_values, max_new_tokens=1,
            **prompts.GREEDY,
        )  # fmt: skip
        assert state.keys() == model.state_dict().keys()
        assert not {id(p) for p in net.parameters()} & {id(p) for p in model.parameters()}
    assert models.footprint(model) == before
    assert all(torch.equal(rows, state[name]) for name, rows in model.state_dict().items())
    for row in range(len(samples)):
        answer = [*first.sequences[row, -2:].tolist(), *later[row].tolist()]
        by_hand, sequence = by_hand_run(SPEC, family, "ragged", "original", row, answer, rule(net))
        assert deviation("of the first answer", torch.stack(first.logits, 1)[row], by_hand[:2]) <= NOISE
        assert deviation("of the second turn", second.logits[0][row], by_hand[-1]) <= NOISE
        assert [decision.kept.tolist() for decision in sieve.last[row]] == sequence.kept


@torch.no_grad()
def test_the_blocks_compute_in_the_precision_of_the_model():
    model, inputs = models.build(FAMILY).to(torch.bfloat16), prompts.collate(FAMILY, prompts.batch(FAMILY, "ragged"))
    inputs = {name: rows.bfloat16() if rows.is_floating_point() else rows for name, rows in inputs.items()}
    with tokensieve.attach(model, SPEC) as sieve:
        assert model(**inputs).logits.isfinite().all()
        assert {weight.dtype for weight in sieve.nets["decoder"].parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("keep", [1, 9, 24, 25, 0.4, 1.0])
@torch.no_grad()
def test_no_token_is_left_behind_the_second_layer(keep):
    """A number and a share drop the same tokens; an image that fits in whole stays whole."""
    model, (sample,) = models.tiny_model(FAMILY), prompts.batch(FAMILY, "single")
    (total,) = (image.tokens for image in sample.images)
    kept = round(keep * total) if isinstance(keep, float) else keep
    with tokensieve.attach(model, "twigvlm", layers=(1, 4), keep=keep, weights="random") as sieve:
        model(**prompts.collate(FAMILY, [sample]))
        last = 0 if kept < total else total
        assert sieve.tokens == [[[total, kept, kept, kept, last, last]]]
        assert sieve.last[0][0].slots == last


@torch.no_grad()
def test_an_average_is_that_over_the_layers():
    """As in the paper, R' = ⌈(L·R − K·N) / (l − K)⌉ tokens stay between the two layers."""
    model, (sample,) = models.tiny_model(FAMILY), prompts.batch(FAMILY, "single")
    (total,) = (image.tokens for image in sample.images)
    with tokensieve.attach(model, "twigvlm", layers=(1, 4), average=8, weights="random") as sieve:
        model(**prompts.collate(FAMILY, [sample]))
        kept = -((total - 6 * 8) // 3)
        assert sieve.tokens == [[[total, kept, kept, kept, 0, 0]]]
        for average in (4, 24):  # all tokens pass one of six layers, and none the last two
            with tokensieve.attach(models.build(FAMILY), "twigvlm", layers=(1, 4), average=average, weights="random"):
                pass
    shape = parse("twigvlm", layers=(1, 4), average=20)[0]
    with pytest.raises(Refusal, match=re.escape("of 25 tokens, averages above 4.16667 up to 16.6667 are in reach")):
        shape.stage_budgets(25, [1, 4], 6)
    assert shape.stage_budgets(20, [1, 4], 6) == [20, 20]


def test_refused_at_attach():
    model = models.tiny_model(FAMILY)
    for options, words in (
        ({"blocks": 6}, "6 blocks from layer 1 on are copied; this LLM has layers 0 to 5"),
        ({"blocks": 0}, "needs two layers and at least one block"),
        ({"layers": (1,)}, "needs two layers and at least one block"),
        ({"layers": (1, 6)}, "tokens can leave before layers 1 to 5"),
        ({"average": 0.1, "layers": (2, 4)}, "out of reach"),
        ({"weights": "bundled"}, "has no bundled weights"),
    ):
        with pytest.raises(Refusal, match=re.escape(words)) as caught:
            tokensieve.attach(model, "twigvlm", **{"weights": "random", **options})
        assert "\n" not in str(caught.value)


def test_layers_that_attend_in_several_ways_are_refused():
    family = "gemma3"
    with pytest.raises(Refusal, match="copies layers with one kind of attention; these have full_attention, sliding"):
        tokensieve.attach(models.tiny_model(family), "twigvlm", weights="random", layers=(1, 2), blocks=2)


def test_a_folder_names_the_layers_of_its_twig(tmp_path):
    model = models.tiny_model(FAMILY)
    shape, llm, method = shape_of(model), model.get_decoder(), parse(SPEC)[0]
    net = shaken(load_net(method, shape, llm))
    save_net(tmp_path, method, shape, net, {})
    assert json.loads((tmp_path / "method.json").read_text())["net"] == {"layer": 1, "blocks": 2}
    again = load_net(replace(method, weights=str(tmp_path)), shape, llm)
    assert all(torch.equal(rows, again.state_dict()[name]) for name, rows in net.state_dict().items())
    with pytest.raises(Refusal, match=r"are a twig of 2 blocks from layer 1 on; .* asks for 1 blocks from layer 2 on"):
        load_net(parse("twigvlm", layers=(2, 4), blocks=1, weights=str(tmp_path))[0], shape, llm)


def test_the_authors_checkpoint(tmp_path):
    """Layers renumbered from 0, beside a norm and a head, which only their decoding needs."""
    model = models.tiny_model(FAMILY)
    shape, llm, config = shape_of(model), model.get_decoder(), model.get_decoder().config
    width, inner = config.hidden_size, config.intermediate_size
    keys = config.num_key_value_heads * config.head_dim
    shapes = {f"self_attn.{n}_proj": (rows, width) for n, rows in (("q", width), ("k", keys), ("v", keys))}
    shapes |= {"self_attn.o_proj": (width, width), "mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width)}
    shapes |= {"mlp.down_proj": (width, inner), "input_layernorm": (width,), "post_attention_layernorm": (width,)}
    stored = {f"model.layers.{i}.{n}.weight": torch.randn(s).half() for i in range(3) for n, s in shapes.items()}
    extra = {"lm_head.weight": torch.zeros(9, width).half(), "model.norm.weight": torch.zeros(width).half()}
    save_file(stored | extra, tmp_path / "model.safetensors")
    net = load_net(parse("twigvlm", layers=(2, 4), blocks=3, weights=str(tmp_path))[0], shape, llm)
    assert len(net.state_dict()) == len(stored)
    assert all(torch.equal(r, stored[f"model.layers.{n}"].float()) for n, r in net.state_dict().items())
    with pytest.raises(Refusal, match="a twig of 3 blocks"):
        load_net(parse("twigvlm", layers=(2, 4), blocks=2, weights=str(tmp_path))[0], shape, llm)


@torch.no_grad()
def test_repaired_attention_reaches_the_blocks():
    """Merged tokens weigh in the blocks as in the LLM's own layers, whatever the kernel."""
    spec, inputs = SPEC.replace("0.4", "5"), prompts.collate(FAMILY, prompts.batch(FAMILY, "ragged"))
    received = {}
    for attention, repair in product(("sdpa", "eager"), (None, "size")):
        model = models.tiny_model(FAMILY, attention)
        with tokensieve.attach(model, f"pool(keep=9) + {spec}", repair=repair) as sieve:
            norm = sieve.nets["decoder"][-1].input_layernorm
            norm.register_forward_pre_hook(lambda _, args, key=(attention, repair): received.update({key: args[0]}))
            model(**inputs)
    torch.testing.assert_close(received["sdpa", "size"], received["eager", "size"], atol=NOISE, rtol=0)
    assert (received["sdpa", "size"] - received["sdpa", None]).abs().max() > 100 * NOISE
