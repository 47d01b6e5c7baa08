"""Beyond the laws: flash-style masks, training, threads, replay, composition, plug-ins."""

import threading

import pytest
import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import tokensieve
from tests.support import families, models, oracle, prompts
from tests.support.oracle import NOISE
from tokensieve import Reduction

each_family = pytest.mark.parametrize("family", families.CORE)
each_policy = pytest.mark.parametrize("policy", ["original", "contiguous"])
FLASH = "flash_stand_in"


def flash_stand_in(module, query, key, value, attention_mask, scaling=None, is_causal=None, **kwargs):
    """Attend as a flash kernel: without a mask, or with a 2-D one over the keys; causal to the lower right."""
    queries, keys = query.shape[2], key.shape[2]
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    seen = torch.ones(queries, keys, dtype=torch.bool)
    if module.is_causal if is_causal is None else is_causal:
        seen = seen.tril(keys - queries)
    seen = seen[None, None].expand(len(query), 1, -1, -1)
    if attention_mask is not None:
        assert attention_mask.shape == (len(query), keys)
        seen = seen & attention_mask[:, None, None].bool()
    scores = (query @ key.transpose(2, 3)).float() * scaling
    weights = scores.masked_fill(~seen, torch.finfo(torch.float32).min).softmax(-1).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register(FLASH, flash_stand_in)
ALL_MASK_ATTENTION_FUNCTIONS.register(FLASH, flash_attention_mask)


@each_policy
@pytest.mark.parametrize("kind", ["ragged", "mixed"])
@each_family
def test_two_dimensional_masks(family, kind, policy, monkeypatch, deviation):
    """Flash kernels get the 2-D mask as it is: uneven rows and later steps must still line up."""
    model, inputs = models.tiny_model(family), prompts.collate(family, prompts.batch(family, kind))
    with tokensieve.attach(model, "vtc-cls", keep=13, positions=policy):
        expected = model.generate(**inputs, max_new_tokens=4, **prompts.GREEDY)
        monkeypatch.setattr(model.model.language_model.config, "_attn_implementation_internal", FLASH)
        got = model.generate(**inputs, max_new_tokens=4, **prompts.GREEDY)
    assert deviation("of 2-D masks", torch.stack(got.logits), torch.stack(expected.logits)) <= NOISE


@each_policy
@each_family
def test_the_loss_and_its_gradients_are_those_by_hand(family, policy, deviation):
    """Labels are shortened with the prompt; gradients reach the tower through what was kept."""
    model, twin = models.build(family), models.unhooked(family)
    (s,) = prompts.batch(family, "two-images")
    inputs = prompts.collate(family, [s])
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == families.IMAGE, -100)
    with tokensieve.attach(model, "divprune", keep=5, positions=policy) as sieve:
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        kept = [r.kept for r in sieve.last[0]]
    features = [oracle.encode_image(twin, family, image) for image in s.images]
    rows = [e.mixed(torch.eye(len(e.rows))[k]) for e, k in zip(features, kept, strict=True)]
    twin.zero_grad()
    logits = oracle.forward(twin, family, oracle.enter(twin, family, s, kept, rows, [], policy))
    target = labels[0, oracle.kept_columns(s, kept)]
    by_hand = torch.nn.functional.cross_entropy(logits[:-1], target[1:])
    by_hand.backward()
    assert deviation("of the loss", loss.detach(), by_hand.detach()) <= 1e-5
    got, expected = model.lm_head.weight.grad, twin.lm_head.weight.grad
    assert deviation("of a gradient", got, expected) <= 1e-5
    tower = model.get_encoder(modality="image")
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in tower.parameters())


@pytest.mark.parametrize("spec", ["vtc-cls(keep=5)", "pool(keep=5)", "downsample(keep=5)"])
@pytest.mark.parametrize("family", ["llava-clip", "qwen3-vl"])
def test_gradient_checkpointing_changes_nothing(family, spec):
    inputs = prompts.collate(family, prompts.batch(family, "ragged"))
    norms = []
    for checkpointing in (False, True):
        model = models.build(family).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        with tokensieve.attach(model, spec):
            loss = model(**inputs, labels=inputs["input_ids"], use_cache=False).loss
            loss.backward()
        norms.append((loss.item(), sum(p.grad.norm().item() for p in model.parameters() if p.grad is not None)))
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


@pytest.mark.parametrize("spec", ["vtc-cls(keep=5)", "downsample(keep=5)", "fastv(layer=1, keep=5)"])
@pytest.mark.parametrize("family", ["llava-clip", "qwen2.5-vl"])
def test_two_threads_on_one_attached_model(family, spec):
    """Evidence, decisions and states of concurrent calls do not mix."""
    model = models.tiny_model(family)
    jobs = [prompts.collate(family, prompts.batch(family, name)) for name in ("two-images", "ragged")]
    got: dict[tuple[int, int], list] = {}
    with tokensieve.attach(model, spec):
        expected = [model.generate(**job, max_new_tokens=4).tolist() for job in jobs]

        def work(thread: int) -> None:
            for turn in range(4):
                job = (thread + turn) % 2
                try:
                    got[thread, turn] = [job, model.generate(**jobs[job], max_new_tokens=4).tolist()]
                except Exception as error:  # shown by the assertion below
                    got[thread, turn] = [job, repr(error)]

        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        [t.start() for t in threads]
        [t.join() for t in threads]
    assert len(got) == 8
    for job, sequences in got.values():
        assert sequences == expected[job]


@pytest.mark.parametrize("spec", ["vtc-cls(keep=5)", "pool(keep=13)", "trsm(keep=0.3)", "random(keep=24)"])
@each_family
def test_replay(family, spec, tmp_path):
    """Decisions act again as they are, from memory and from disk, for one answer and for beams."""
    model, inputs = models.tiny_model(family), prompts.collate(family, prompts.batch(family, "mixed"))
    with tokensieve.attach(model, spec, positions="contiguous") as sieve:
        expected, decisions = model.generate(**inputs, max_new_tokens=3, **prompts.GREEDY), sieve.last
        beams = model.generate(**inputs, max_new_tokens=3, num_beams=2, do_sample=False)
    for i, row in enumerate(decisions):
        for j, decision in enumerate(row):
            decision.save(tmp_path / f"{i}-{j}.safetensors")
    loaded = [
        [Reduction.load(tmp_path / f"{i}-{j}.safetensors") for j in range(len(r))] for i, r in enumerate(decisions)
    ]
    for replayed in (decisions, loaded):
        with tokensieve.attach(model, replayed, positions="contiguous") as sieve:
            assert str(sieve) == "a replay"
            again = model.generate(**inputs, max_new_tokens=3, **prompts.GREEDY)
            assert all(torch.equal(a, b) for a, b in zip(again.logits, expected.logits, strict=True))
            assert torch.equal(model.generate(**inputs, max_new_tokens=3, num_beams=2, do_sample=False), beams)


@each_family
def test_a_second_stage_acts_on_the_tokens_of_the_first(family):
    """downsample + vtc-cls = downsample, then the CLS row of the small image: never a token it did not make."""
    model, inputs = models.tiny_model(family), prompts.collate(family, prompts.batch(family, "two-images"))
    run = {"max_new_tokens": 1}
    with tokensieve.attach(model, "downsample(keep=0.5)") as sieve:
        model.generate(**inputs, **run)
        first = sieve.last[0]
    with tokensieve.attach(model, "downsample(keep=0.5) + vtc-cls(keep=3)") as sieve:
        model.generate(**inputs, **run)
        both = sieve.last[0]
    for small, final in zip(first, both, strict=True):
        assert final.slots == 3 < small.slots
        picked = torch.isin(small.kept, final.kept)
        assert int(picked.sum()) == 3
        assert torch.allclose(final.matrix(), small.matrix()[picked], atol=1e-6)
        assert any("cells for a budget" in note for note in final.notes)


PLUGIN = '''
from dataclasses import dataclass
import tokensieve
import torch

@tokensieve.register("first-tokens", paper="none")
@dataclass(frozen=True)
class FirstTokens(tokensieve.Method):
    """Keep the first tokens."""

    keep: int = 4

    def reduce(self, image):
        return image.keep(torch.arange(self.keep).expand(len(image.features), -1))
'''


def test_a_method_from_a_file(tmp_path, registry):
    (tmp_path / "mine.py").write_text(PLUGIN)
    family = "llava-clip"
    model, inputs = models.tiny_model(family), prompts.collate(family, prompts.batch(family, "ragged"))
    with tokensieve.attach(model, f"{tmp_path}/mine.py:FirstTokens", keep=3) as sieve:
        model.generate(**inputs, max_new_tokens=1)
        assert [r.kept.tolist() for row in sieve.last for r in row] == [[0, 1, 2]] * 3
        assert str(sieve) == "first-tokens(keep=3)"
        assert repr(sieve) == "<Sieve first-tokens(keep=3) on LlavaForConditionalGeneration, attached>"
    assert repr(sieve) == "<Sieve first-tokens(keep=3) on LlavaForConditionalGeneration, detached>"


@pytest.mark.parametrize("name", ["pixel_values", "input_ids"])
def test_positional_arguments(name):
    """`model(input_ids, pixel_values, …)`: arguments are matched by place as the model itself does."""
    family = "llava-clip"
    model, inputs = models.tiny_model(family), prompts.collate(family, prompts.batch(family, "ragged"))
    rest = {k: v for k, v in inputs.items() if k not in ("input_ids", "pixel_values")}
    with torch.no_grad(), tokensieve.attach(model, "uniform", keep=5):
        by_name = model(**inputs).logits
        by_place = model(inputs["input_ids"], inputs["pixel_values"], **rest).logits
    assert torch.equal(by_name, by_place)


@pytest.mark.parametrize("family", families.CORE_QWEN)
def test_qwen_without_token_types(family):
    """Without `mm_token_type_ids` a plain forward of Qwen2.5 numbers positions in one dimension; Qwen3 refuses."""
    model, inputs = models.tiny_model(family), prompts.collate(family, prompts.batch(family, "two-images"))
    del inputs["mm_token_type_ids"]
    with torch.no_grad():
        try:
            expected = models.unhooked(family)(**inputs).logits
        except ValueError:
            with tokensieve.attach(model, "uniform", keep=5), pytest.raises(ValueError, match="mm_token_type_ids"):
                model(**inputs)
            return
        with tokensieve.attach(model, "full"):
            assert torch.equal(model(**inputs).logits, expected)
        with tokensieve.attach(model, "uniform", keep=5) as sieve:
            got = model(**inputs).logits[0]
    plain = torch.arange(inputs["input_ids"].shape[1]).expand(3, -1)
    (s,) = prompts.batch(family, "two-images")
    kept = [r.kept for r in sieve.last[0]]
    with torch.no_grad():
        features = [oracle.encode_image(models.unhooked(family), family, image).rows for image in s.images]
        ids = torch.tensor(s.ids)[(stay := oracle.kept_columns(s, kept))]
        embeds = models.unhooked(family).get_input_embeddings()(ids)
        rows = torch.cat([f[k] for f, k in zip(features, kept, strict=True)])
        embeds = embeds.masked_scatter((ids == families.IMAGE)[:, None], rows)[None]
        out = models.unhooked(family).model.language_model(
            inputs_embeds=embeds,
            position_ids=plain[:, None, stay],
            attention_mask=torch.ones(1, len(stay), dtype=torch.long),
            use_cache=False,
        )
        assert (got - models.unhooked(family).lm_head(out.last_hidden_state[0])).abs().max() <= NOISE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "spec", ["vtc-cls(keep=5)", "pool(keep=5)", "trsm(keep=5)", "downsample(keep=5) + divprune(keep=3)"]
)
def test_half_precision_runs(spec, dtype):
    for family in families.CORE:
        model, inputs = models.build(family).to(dtype), prompts.collate(family, prompts.batch(family, "ragged"))
        inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
        with tokensieve.attach(model, spec):
            out = model.generate(**inputs, max_new_tokens=2, **prompts.GREEDY)
        assert all(torch.isfinite(step).all() for step in out.logits)
