"""The loss under a method is that of the answer after the reduced prompt, also where questions share an image."""

import random
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch.nn.functional import cross_entropy

import tokensieve
from tests.support.models import tiny_model
from tests.support.processors import processor as tiny_processor
from tokensieve.evaluate import Sample
from tokensieve.evaluate.prompt import Inputs, encode
from tokensieve.loading import load_model

pytest.importorskip("peft")

from tokensieve.train.adapter import Recipe
from tokensieve.train.adapter.data import IGNORED, Collator, read_samples
from tokensieve.train.adapter.loss import answer_logits, answer_loss, check_method
from tokensieve.train.adapter.parts import prepared
from tokensieve.train.adapter.shared import SharedPrompts

SPECS = [
    "full",
    "pool(keep=16)",
    "random(keep=0.2)",
    "vtc-cls(keep=9)",
    "trsm(keep=9)",
    "pool-decoder(layer=1, stride=8)",
    "divprune(keep=20) + vtw(layer=2)",
    "downsample(keep=36)",
]
BASES = SimpleNamespace(), SimpleNamespace(rope_deltas=None)


@pytest.fixture(scope="module")
def samples(llava):
    """Questions about images, one of them with an earlier turn and one about two images."""
    return [*read_samples(str(llava.parent / "train.jsonl"))[0][:5], *read_samples("reference:train[:13]")[0]]


def batch_of(processor, samples):
    return Collator(processor, "{question}")(samples)


@pytest.mark.parametrize("spec", SPECS)
def test_shared_beginnings_change_neither_loss_nor_gradient(spec, llava, samples, monkeypatch):
    model, processor = load_model(str(llava))
    tuned = prepared(model, Recipe(rank=2), "llava").train()
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:  # zeros at first, through which no gradient passes
            torch.nn.init.normal_(weight, std=0.3)
    batch, seen = batch_of(processor, samples), []
    make = SharedPrompts.of
    monkeypatch.setattr(SharedPrompts, "of", lambda *args: seen.append(make(*args)) or seen[-1])

    def outcome():
        tuned.zero_grad()
        loss = answer_loss(answer_logits(tuned, batch, tokensieve.parse(spec), processor), batch["labels"])
        loss.backward()
        return loss, [weight.grad for weight in tuned.parameters() if weight.requires_grad]

    loss, gradients = outcome()
    assert (seen[0] is None) == (spec.startswith("trsm"))  # it goes by the words, so each question has its own tokens
    if seen[0] is not None:
        assert len(seen[0].beginnings.tensors["input_ids"]) < len(samples)
    monkeypatch.setattr(SharedPrompts, "of", lambda *args: None)
    apart, gradients_apart = outcome()
    assert torch.allclose(loss, apart, atol=1e-5)
    for one, other in zip(gradients, gradients_apart, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
        assert one.abs().max() > 0


@pytest.mark.parametrize("spec", [spec for spec in SPECS if not spec.startswith("trsm")])
def test_the_logits_are_those_that_generation_chooses_by(spec, llava, samples):
    model, processor = load_model(str(llava))
    stages, few = tokensieve.parse(spec), samples[:3]
    prompts = encode(processor, few)
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "return_dict_in_generate": True, "output_logits": True}
    options["suppress_tokens"] = [model.config.image_token_id]  # a random model might answer with an image
    with tokensieve.attach(model, stages, processor=processor):
        generated = model.generate(**prompts, **options)
    answers = generated.sequences[:, prompts["input_ids"].shape[1] :]
    batch = batch_of(processor, few)
    numbers = batch["image_numbers"]
    ids = torch.cat([prompts["input_ids"], answers], 1)
    mask = torch.cat([prompts["attention_mask"], torch.ones_like(answers)], 1)
    batch = {**prompts, "input_ids": ids, "attention_mask": mask, "labels": answers, "image_numbers": numbers}
    with torch.no_grad():
        logits = answer_logits(model, batch, stages, processor)
    assert torch.allclose(logits, torch.stack(generated.logits, 1), atol=1e-4)


@pytest.mark.parametrize("name", ["qwen2-vl", "llava-next"])
def test_models_of_packed_patches_and_tiles(name):
    """Rows of different lengths, and positions in three dimensions: the same logits as in generation."""
    model, processor, drawn = tiny_model(name), tiny_processor(name), random.Random(0)
    sizes = [(56, 56), (112, 56), (84, 56)]
    pictures = [Image.frombytes("RGB", size, drawn.randbytes(size[0] * size[1] * 3)) for size in sizes]
    questions = ("what is red ?", "which one ?", "A")
    few = [
        Sample(f"{n}", partial(lambda p: p, picture), text, ("red blue",))
        for n, (picture, text) in enumerate(zip(pictures, questions, strict=True))
    ]
    batch, stages = Collator(processor, "{question}")(few), tokensieve.parse("uniform(keep=0.5)")
    with torch.no_grad():
        logits = answer_logits(model, batch, stages, processor)
        assert batch["labels"].tolist() == [processor.tokenizer.convert_tokens_to_ids(["red", "blue"])] * 3
        with tokensieve.attach(model, stages):
            prompts = encode(processor, few)
            options = {"max_new_tokens": 2, "min_new_tokens": 2, "return_dict_in_generate": True}
            generated = model.generate(
                **prompts, **options, prefix_allowed_tokens_fn=answering(batch), output_logits=True
            )
    assert torch.allclose(logits, torch.stack(generated.logits, 1), atol=1e-4)


def answering(batch):
    """Make generation say the answers of a batch, whatever is likely."""
    first, second = batch["labels"][0].tolist()
    return lambda row, ids: [second] if int(ids[-1]) == first else [first]


@pytest.mark.parametrize("spec", ["uniform(keep=12)", "pool(keep=16)"])
def test_the_loss_is_that_of_a_prompt_reduced_by_hand(spec, llava, samples):
    """Give the unhooked LLM the kept rows, their positions and the labels, as if no other token had been there."""
    model, processor = load_model(str(llava))
    batch = batch_of(processor, samples[:1])
    with torch.no_grad(), tokensieve.attach(model, spec) as sieve:
        model(**{name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")})
        (reduction,) = sieve.last[0]
    with torch.no_grad():
        rows = model.model.get_image_features(pixel_values=batch["pixel_values"]).pooler_output[0]
        ids = batch["input_ids"][0]
        (columns,) = torch.where(ids == model.config.image_token_id)
        embedded = model.get_input_embeddings()(ids)
        first, last = int(columns[0]), int(columns[-1]) + 1
        embedded = torch.cat([embedded[:first], reduction.apply(rows), embedded[last:]])
        positions = torch.cat([torch.arange(first), first + reduction.anchors, torch.arange(last, len(ids))])
        labels = torch.full((len(embedded),), IGNORED)
        answer = batch["labels"][0]
        labels[-len(answer) :] = answer
        mask = torch.ones(1, len(embedded))
        inputs = {"inputs_embeds": embedded[None], "position_ids": positions[None], "attention_mask": mask}
        logits = model(**inputs).logits[0]
        by_hand = cross_entropy(logits[:-1], labels[1:])
        loss = answer_loss(answer_logits(model, batch, tokensieve.parse(spec), processor), batch["labels"])
        whole = torch.cat([torch.full((1, len(ids) - len(answer)), IGNORED), batch["labels"]], 1)
        with tokensieve.attach(model, spec):  # and that of the model's own labels, which are shortened with the prompt
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
            own = model(**inputs, labels=whole).loss
    assert torch.allclose(loss, by_hand, atol=1e-5)
    assert torch.allclose(loss, own, atol=1e-5)


def test_only_the_answer_has_labels_and_the_prompt_is_that_of_compare(llava, samples):
    _, processor = load_model(str(llava))
    batch, prompts = batch_of(processor, samples), encode(processor, samples)
    for row, sample in enumerate(samples):
        labels = batch["labels"][row]
        text = processor.tokenizer.decode(labels[labels != IGNORED])
        assert text == f"{sample.answers[0]}</s>" or text == f"{sample.answers[0]} </s>"
        valid, answer = batch["attention_mask"][row].bool(), int((labels != IGNORED).sum())
        prompt = prompts["input_ids"][row][prompts["attention_mask"][row].bool()]
        assert torch.equal(batch["input_ids"][row][valid][:-answer], prompt)


@pytest.mark.parametrize("spec", ["fastv(layer=1)", "trio(layers=(1,))", "autoprune"])
def test_methods_that_would_see_the_answer_are_refused(spec, llava, samples):
    model, processor = load_model(str(llava))
    with pytest.raises(tokensieve.Refusal, match="answer"):
        check_method(tokensieve.parse(spec), model, processor, batch_of(processor, samples[:1]))


def test_models_with_positions_in_two_dimensions_do_not_share():
    """The positions behind an image then depend on its grid, which the shared road does not follow."""
    tensors = {"input_ids": torch.tensor([[1, 5, 7], [1, 5, 8]]), "pixel_values": torch.zeros(1, 3, 8, 8)}
    inputs = Inputs({**tensors, "attention_mask": torch.ones(2, 3, dtype=torch.long)}, (0, 0))
    llava, qwen = (SimpleNamespace(base_model=base, config=SimpleNamespace(image_token_id=5)) for base in BASES)
    assert SharedPrompts.of(llava, inputs, ()) is not None
    assert SharedPrompts.of(qwen, inputs, ()) is None
