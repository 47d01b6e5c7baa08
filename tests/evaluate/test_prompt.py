"""Prompts: left-padded, through the template, with an unchanged processor; repeated images are encoded once."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from tokensieve import attach
from tokensieve.engine.handoff import EncoderOutputs
from tokensieve.errors import Refusal
from tokensieve.evaluate import decode, encode
from tokensieve.evaluate.answer import in_order, together
from tokensieve.evaluate.prompt import check_texts, generate_arguments, without_repetitions
from tokensieve.reduction import Reduction


def test_prompts_are_left_padded_and_the_processor_is_not_changed(processor, samples, monkeypatch):
    monkeypatch.setattr(processor.tokenizer, "padding_side", "right")
    inputs = encode(processor, samples[:3])
    assert processor.tokenizer.padding_side == "right"
    mask = inputs["attention_mask"]
    assert mask[:, -1].all()
    assert mask.sum(1).tolist() == [len(encode(processor, [s])["input_ids"][0]) for s in samples[:3]]
    texts = processor.batch_decode(inputs["input_ids"], skip_special_tokens=True)
    assert [text.split("\n")[-1].split() for text in texts] == [
        s.question.replace("?", " ?").split() for s in samples[:3]
    ]
    assert inputs["pixel_values"].shape == (3, 3, 120, 120)


def test_the_prompt_wraps_the_question(processor, samples):
    plain, wrapped = (
        encode(processor, samples[:1], prompt=p)["input_ids"] for p in ("{question}", "{question} is it red ?")
    )
    assert wrapped.shape[1] == plain.shape[1] + 4


def test_a_processor_without_template_gets_its_image_token(processor, samples, monkeypatch):
    monkeypatch.setattr(processor, "chat_template", None)
    ids = encode(processor, samples[:1])["input_ids"]
    assert (ids == processor.tokenizer.convert_tokens_to_ids("<image>")).sum() == 144
    monkeypatch.setattr(processor, "image_token", None)
    with pytest.raises(ValueError, match="neither a chat template nor an image token"):
        encode(processor, samples[:1])


def test_a_question_that_holds_a_placeholder_is_refused(processor, samples):
    with pytest.raises(ValueError, match="leave <image> out, the image is put there by itself"):
        encode(processor, samples[:1], prompt="<image> {question}")


@pytest.mark.parametrize("field", ["question", "answers", "id", "type", "choices"])
def test_texts_that_no_tokenizer_or_file_accepts_are_refused(processor, samples, field):
    value = ("red", "\ud83c") if field in ("answers", "choices") else "\ud83c?"
    with pytest.raises(Refusal, match=r"data\.jsonl, line 1: .* is not valid text: half of a character"):
        check_texts(processor, [replace(samples[0], **{field: value})])
    with pytest.raises(Refusal, match="the prompt is not valid text"):
        check_texts(processor, samples, "{question} \udcff")


def test_decode_leaves_out_the_prompt_and_special_tokens(processor):
    ids = processor.tokenizer("USER: what is it ? ASSISTANT:")["input_ids"]
    answer = processor.tokenizer("red anchor", add_special_tokens=False)["input_ids"]
    generated = torch.tensor([ids + answer + [processor.tokenizer.eos_token_id]])
    assert decode(processor, generated, len(ids)) == ["red anchor"]


def test_the_order_holds_every_sample_once_and_an_image_together(samples):
    ordered = in_order(samples)
    assert sorted(s.id for s in ordered) == sorted(s.id for s in samples)
    order = [s.image for s in ordered]
    assert len([1 for a, b in pairwise(order) if a != b]) == 3


@pytest.mark.parametrize("spec", ["full", "vtc-cls(keep=9)", "trsm(keep=9)", "pool(keep=9)", "downsample(keep=9)"])
def test_encoding_an_image_once_changes_nothing(model, processor, samples, spec):
    batch = [samples[i] for i in (0, 4, 1, 8)]  # three about image 0, one about image 1
    tensors = encode(processor, batch)
    shared = without_repetitions(model, tensors, [0, 0, 1, 0])
    assert len(shared.tensors["pixel_values"]) == 2
    assert shared.nbytes < sum(t.nbytes for t in tensors.values())

    steps = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with torch.inference_mode(), attach(model, spec, processor=processor) as sieve:
        plain, kept = model.generate(**tensors, **steps), sieve.last
        once = model.generate(**generate_arguments(model, shared), **steps)
    assert torch.equal(plain.sequences, once.sequences)
    torch.testing.assert_close(torch.stack(once.logits), torch.stack(plain.logits), atol=1e-5, rtol=1e-5)
    assert [[r.to_json() for r in row] for row in kept] == [[r.to_json() for r in row] for row in sieve.last]


def test_inputs_that_are_not_plain_pixels_stay_unchanged(model, processor, samples):
    tensors = encode(processor, [samples[0], samples[4]])
    tiles = {**tensors, "pixel_values": tensors["pixel_values"][:, None]}
    sized = {**tensors, "image_sizes": torch.tensor([[120, 120], [120, 120]])}
    for inputs in (tiles, sized):
        kept = without_repetitions(model, inputs, [0, 0])
        assert kept.images is None
        assert kept.tensors is inputs
    different = without_repetitions(model, tensors, [0, 1])
    assert generate_arguments(model, different) == tensors


def test_the_record_is_repeated_with_the_images(model, processor, samples):
    shared = without_repetitions(model, encode(processor, [samples[0], samples[4]]), [0, 0])
    with torch.inference_mode(), attach(model, "visionzip(keep=9)"):
        output = generate_arguments(model, shared)["mm_encoder_outputs"]["image"]
    record = EncoderOutputs.of(output)
    by_layer = [rows for layers in record.by_layer.values() for rows in layers.values()]
    per_image = [record.layouts, record.patches, *by_layer]
    assert len(per_image) > 3
    assert all(len(rows) == len(output.pooler_output) == 2 for rows in per_image)


def test_tiles_that_are_images_count_as_one():
    """Join the decisions about the tiles of a picture into one."""
    first, second = Reduction(4, torch.tensor([1, 3])), Reduction(3, torch.tensor([0]))
    both = together([first, second])
    assert (both.total, both.anchors.tolist(), both.grid) == (7, [1, 3, 4], None)
    assert together([first]) is first
