"""Rows that a net makes: replays, repair, later stages and turns, training, and what is refused."""

import inspect
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch

import tokensieve
from tests.support import models, oracle, prompts
from tests.support.methods import evidence, made_specs
from tests.support.oracle import NOISE
from tokensieve import Reduction, Refusal
from tokensieve.check import Laws
from tokensieve.tokens import ConnectorTokens

FAMILIES = ("llava-clip", "qwen2.5-vl")
SPECS = made_specs("llava-clip")
each_family = pytest.mark.parametrize("family", FAMILIES)
each_spec = pytest.mark.parametrize("spec", SPECS)
each_case = pytest.mark.parametrize(("family", "spec"), [(f, spec) for f in FAMILIES for spec in made_specs(f)])


def generated(model, inputs, *stages, **options):
    """Return the logits of three steps, the decisions, and the sizes of the tokens."""
    with tokensieve.attach(model, *stages, **options) as sieve:
        out = model.generate(**inputs, max_new_tokens=3, **prompts.GREEDY)
    return torch.stack(out.logits, 1), sieve.last, sieve.sizes


def inputs_of(family, kind="ragged"):
    return prompts.collate(family, prompts.batch(family, kind))


@cache
def laws(family):
    samples = [*prompts.batch(family, "ragged")[:2], *prompts.batch(family, "two-images")]
    collated = lambda numbers: prompts.collate(family, [samples[i] for i in numbers])  # noqa: E731
    return Laws(models.tiny_model(family), collated)


@each_case
def test_all_laws_hold_also_in_later_turns(family, spec):
    for verdict in laws(family).check(spec):
        assert verdict.status == "pass", verdict


@pytest.mark.parametrize("spec", made_specs("llava-next"))
def test_images_in_views_with_separators(spec, deviation):
    """A view that the budget covers stays whole beside others; separators are the model's own."""
    family, spec = "llava-next", spec.replace("keep=9", "keep=20")
    model, (s,) = models.unhooked(family), prompts.batch(family, "two-images")
    logits, (decisions,), _ = generated(models.tiny_model(family), prompts.collate(family, [s]), spec)
    encoded = [oracle.Encoded(decision.rows, []) for decision in decisions]
    features = oracle.encode(model, family, s)
    for image, decision, rows in zip(s.images, decisions, features, strict=True):
        separators = torch.isin(decision.kept, torch.tensor(image.newlines))
        assert bool(separators.any())
        assert torch.equal(decision.rows[separators], rows.rows[decision.kept[separators]])
    answer = logits[0].argmax(-1).tolist()
    by_hand = oracle.logits(model, family, s, [d.kept for d in decisions], encoded, answer[:-1])
    assert deviation("of views from the hand reference (law 2)", logits[0], by_hand) <= NOISE


@each_case
def test_a_stored_decision_is_replayed_to_the_bit(family, spec, tmp_path):
    model, inputs = models.tiny_model(family), inputs_of(family)
    logits, decisions, _ = generated(model, inputs, spec)
    stored = []
    for row in decisions:
        for decision in row:
            decision.save(tmp_path / f"{len(stored)}.safetensors")
            stored.append(Reduction.load(tmp_path / f"{len(stored)}.safetensors"))
    files = iter(stored)
    replayed, again, _ = generated(model, inputs, [[next(files) for _ in row] for row in decisions])
    assert torch.equal(replayed, logits)
    assert repr(again[0][0]) == repr(decisions[0][0])
    drawn = [[Reduction.from_json(decision.to_json()) for decision in row] for row in decisions]
    assert torch.equal(drawn[0][0].source, decisions[0][0].source)
    with pytest.raises(Refusal, match=r"rows of this decision were made by a net.*JSON leaves them out"):
        generated(model, inputs, drawn)


@each_case
def test_repair_counts_each_token_once(family, spec):
    model, inputs = models.tiny_model(family), inputs_of(family)
    _, decisions, sizes = generated(model, inputs, spec, repair="size")
    for row, of_row in zip(decisions, sizes, strict=True):
        for decision, of_image in zip(row, of_row, strict=True):
            torch.testing.assert_close(of_image.sum(), torch.tensor(float(decision.total)))
            assert len(of_image) == decision.slots
    _, moved, _ = generated(model, inputs, spec, repair="restore")
    for decision, at_median in zip(decisions[0], moved[0], strict=True):
        order = [int((decision.rows - row).abs().sum(-1).argmin()) for row in at_median.rows]
        assert sorted(order) == list(range(decision.slots))
        assert torch.equal(at_median.matrix(), decision.matrix()[order]), "rows move with their tokens"


@each_family
def test_tokens_made_leave_inside_the_llm(family):
    model, inputs = models.tiny_model(family), inputs_of(family)
    _, (before, *_), _ = generated(model, inputs, "tokenpacker(weights='random')")
    _, (after, *_), _ = generated(model, inputs, "tokenpacker(weights='random') + vtw(layer=1)")
    assert [decision.slots for decision in after] == [0]
    _, (after, *_), _ = generated(model, inputs, "tokenpacker(weights='random') + fastv(layer=1, keep=2)")
    (first,), (last,) = before, after
    kept = [first.kept.tolist().index(place) for place in last.kept.tolist()]
    assert len(kept) == 2
    torch.testing.assert_close(last.rows, first.rows[kept])


@each_case
def test_gradients_reach_the_net_alone(family, spec):
    model, inputs = models.tiny_model(family), inputs_of(family)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    with tokensieve.attach(model, spec) as sieve:
        net = sieve.nets["connector"]
        frozen = [parameter.requires_grad for parameter in model.parameters()]
        model.requires_grad_(False)
        try:
            net.requires_grad_(True).train()
            model(**inputs, labels=labels, use_cache=False).loss.backward()
        finally:
            for parameter, asked in zip(model.parameters(), frozen, strict=True):
                parameter.requires_grad_(asked)
    assert all(parameter.grad is None for parameter in model.parameters())
    without = [name for name, weights in net.named_parameters() if weights.grad is None or not weights.grad.any()]
    assert not without


def test_mqt_trains_nested_queries_and_forgets_what_it_computed():
    (method,) = tokensieve.parse("mqt(keep=8)")
    net = method.make_net(tokensieve.methods.ModelShape("any", 6, 1, 16), queries=16).eval().requires_grad_(False)
    image = ConnectorTokens(torch.zeros(1, 12, 6), grid=(3, 4), patches=torch.randn(1, 12, 16), net=net)
    rows = method(image).rows
    assert net.shares((3, 4)) is net.shares((3, 4))
    torch.testing.assert_close(method(replace(image, budget=5)).rows, rows[:, :5])
    net.requires_grad_(True).train()
    assert {method(image).slots for _ in range(40)} == {2, 4, 6, 8}
    with torch.no_grad():
        net.query.mul_(-3)
    net.requires_grad_(False).eval()
    assert (method(image).rows - rows).abs().max() > 1e-4
    with pytest.raises(Refusal, match="this net has 16 queries; keep asks for 20 tokens"):
        method(ConnectorTokens(torch.zeros(1, 25, 6), grid=(5, 5), patches=torch.randn(1, 25, 16), net=net, budget=20))


@pytest.mark.parametrize("family", ["llava-clip", "llava-siglip"])
def test_encoder_states_are_the_output_of_the_layers(family):
    model, (s,) = models.unhooked(family), prompts.batch(family, "single")
    needs = tokensieve.Needs(encoder_states=(0, -2), patches=True)
    (image,), _ = evidence(models.tiny_model(family), prompts.collate(family, [s]), needs)
    with torch.no_grad():
        states = model.model.vision_tower(s.images[0].pixels, output_hidden_states=True).hidden_states
    specials = family == "llava-clip"
    torch.testing.assert_close(image.encoder_states[0], states[1][:, specials:])
    torch.testing.assert_close(image.encoder_states[-2], states[-2][:, specials:])
    assert torch.equal(image.encoder_states[-2], image.patches)


def test_encoder_states_of_qwen_follow_the_order_of_the_tokens():
    """The mean of a unit's four patches is the mean of the four parts of the row that enters the projector."""
    family = "qwen2.5-vl"
    needs = tokensieve.Needs(encoder_states=-1, patches=True)
    model, received = models.tiny_model(family), []
    norm = model.model.visual.merger.ln_q
    handle = norm.register_forward_pre_hook(lambda _, args: received.append(args[0]))
    groups, _ = evidence(model, inputs_of(family), needs)
    handle.remove()
    for image in groups:
        parts = image.patches.unflatten(-1, (4, -1)).mean(-2)
        torch.testing.assert_close(image.encoder_states[-1], parts)


def test_refusals(registry):
    model = models.tiny_model("qwen3-vl")
    with pytest.raises(
        Refusal, match="the net of mqt makes the rows that enter the LLM, and none for its later layers"
    ):
        tokensieve.attach(model, "mqt(weights='random', keep=4)")
    with pytest.raises(Refusal, match="mqt has no bundled weights"):
        tokensieve.attach(models.tiny_model("llava-clip"), "mqt(keep=4)")
    before = models.footprint(models.tiny_model("llava-clip"))
    with pytest.raises(Refusal, match="reads hidden states of the encoder, in which tome"):
        tokensieve.attach(models.tiny_model("llava-clip"), "tome(keep=0.5) + tokenpacker(weights='random')")
    assert models.footprint(models.tiny_model("llava-clip")) == before, "a refusal leaves no hook"
    decision = ConnectorTokens(torch.randn(1, 9, 4)).made(torch.randn(1, 2, 4), torch.tensor([[7, 1]]))
    assert decision.anchors.tolist() == [[1, 7]]
    with pytest.raises(Refusal, match="a net made the rows of this Reduction"):
        decision.apply(torch.randn(1, 9, 4))

    @tokensieve.register("undeclared", paper="none")
    @dataclass(frozen=True)
    class Undeclared(tokensieve.Method):
        keep: int | float = 2

        def reduce(self, image):
            return image.made(image.features[:, :2], torch.arange(2).expand(len(image.features), -1))

    with pytest.raises(ValueError, match="only a connector method whose class sets makes_rows can make rows"):
        Undeclared()(ConnectorTokens(torch.randn(1, 9, 4)))


@each_spec
def test_a_method_is_one_short_file_and_reads_back(spec):
    (method,) = tokensieve.parse(spec)
    assert tokensieve.parse(str(method)) == [method]
    assert len(inspect.getsource(inspect.getmodule(type(method))).splitlines()) <= 110


def test_rows_follow_their_anchors_and_padding_goes():
    rows = torch.arange(6.0).view(1, 3, 2)
    parts = torch.eye(5)[[4, 0, 2]][None]
    image = ConnectorTokens(torch.zeros(1, 5, 2))
    decision = image.made(rows, torch.tensor([[4, 0, 2]]), parts=parts, valid=torch.tensor([[True, True, False]]))
    (one,) = decision
    assert one.kept.tolist() == [0, 4]
    assert torch.equal(one.rows, rows[0, [1, 0]])
    assert one.source.tolist()[0] == 0
    assert one.source.tolist()[4] == 1
    second = tokensieve.VisualTokens(one.rows[None]).keep(torch.tensor([[1]]))[0]
    assert torch.equal(second.after(one).rows, rows[0, [0]])
