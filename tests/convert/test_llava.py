"""Checkpoints in LLaVA's original format: the converted folder computes what the authors' weights do."""

import json

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, LlamaTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from typer.testing import CliRunner

import tokensieve
from tests.cli.calling import run_many
from tests.convert import original
from tests.engine.test_published_nets import drawn
from tokensieve import Refusal
from tokensieve.cli import app
from tokensieve.convert import convert_llava
from tokensieve.convert.names import renamed
from tokensieve.evaluate.prompt import left_padded_batch
from tokensieve.loading import load_model

WIDE = Image.linear_gradient("L").resize((160, 90)).convert("RGB")


def convert(*arguments):
    return CliRunner().invoke(app, ["convert", "llava", *map(str, arguments)])


def refused(*arguments):
    """Return the reason of the refusal; nothing may be written."""
    result = convert(*arguments)
    assert result.exit_code == 2, result.output
    assert not arguments[1].exists()
    return " ".join(result.output.split())


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    return original.save_tower(tmp_path_factory.mktemp("tower"))


@pytest.fixture
def target(tmp_path):
    return tmp_path / "converted"


def inputs_of(processor, question="what is it ?"):
    return left_padded_batch(processor, [[WIDE]], [question])


@torch.no_grad()
def assert_same(ours, inputs, theirs=None):
    """The logits are those of the original model, and no added row of the vocabulary has the largest."""
    theirs = theirs or original.model()
    expected, logits = theirs(**inputs).logits, ours(**inputs).logits
    rows = expected.shape[-1]
    assert logits.shape[-1] % 64 == 0
    assert torch.equal(logits[..., :rows], expected)
    assert (logits[..., rows:].amax(-1) < expected.amax(-1)).all()


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("place", ["inside", "beside", "in CLIP"])
def test_the_whole_model_gives_the_same_logits(kind, place, tower, tmp_path, target):
    if place == "inside":  # a tuned encoder wins over the other
        tower = original.save_tower(tmp_path / "tower", other=True)
    elif place == "in CLIP":
        tower = original.save_clip(tmp_path / "tower")
    tensors = original.weights(tower=place == "inside")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)  # a buffer of early transformers
    source = original.save(tmp_path / "theirs", tensors, kind)
    result = convert(source, target, "--tower", tower)
    assert result.exit_code == 0, result.output
    model, processor = load_model(str(target))
    assert_same(model, inputs_of(processor))
    assert model.generation_config.pad_token_id == 0


@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_a_lora_is_merged_as_by_peft(rank_stabilised, tmp_path, tower, target):
    peft = pytest.importorskip("peft")
    base, source = original.save_base(tmp_path / "base"), tmp_path / "lora"
    options = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
    adapted = peft.get_peft_model(base, peft.LoraConfig(**options, use_rslora=rank_stabilised))
    adapted.save_pretrained(source)
    (source / "config.json").write_text(json.dumps(original.settings()))
    projector = {name: rows + 1 for name, rows in original.weights().items() if "mm_projector" in name}
    others = {f"base_model.model.{name}": rows for name, rows in projector.items()}
    torch.save(others, source / "non_lora_trainables.bin")
    result = convert(source, target, "--tower", tower, "--base", tmp_path / "base")
    assert result.exit_code == 0, result.output
    merged = adapted.merge_and_unload().state_dict()
    model, _ = load_model(str(target))
    for name, rows in model.model.language_model.state_dict().items():
        assert torch.equal(rows[: len(merged[f"model.{name}"])], merged[f"model.{name}"]), name
    assert torch.equal(model.model.multi_modal_projector.linear_2.bias, projector["model.mm_projector.2.bias"])


def test_a_projector_alone(tmp_path, tower, target):
    original.save_base(tmp_path / "base")
    source = tmp_path / "projector"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(original.settings()))
    tensors = {name: rows for name, rows in original.weights().items() if "mm_projector" in name}
    torch.save(tensors, source / "mm_projector.bin")
    assert "was trained on with --base FOLDER" in refused(source, target, "--tower", tower)
    convert_llava(source, target, tower=str(tower), base=tmp_path / "base")
    model, processor = load_model(str(target))
    assert_same(model, inputs_of(processor))


def test_routers_of_p_mod_stay_where_they_are(tmp_path, tower, target):
    tensors = {
        name.replace("model.layers.1.", "model.layers.1.decoder_layer."): rows
        for name, rows in original.weights().items()
    }
    tensors["model.layers.1.router.router.weight"] = torch.zeros(1, original.WIDTH)
    tensors["model.layers.1.router.router.bias"] = torch.zeros(1)
    source = original.save(tmp_path / "theirs", tensors, model_type="pmod_llava_llama")
    result = convert(source, target, "--tower", tower)
    assert "2 tensors of the routers of p-MoD stay in" in " ".join(result.output.split())
    model, processor = load_model(str(target))
    assert_same(model, inputs_of(processor))


def test_the_llm_of_mqt_with_its_resampler(tmp_path, tower, target):
    tensors = {name: rows for name, rows in original.weights().items() if "mm_projector" not in name}
    shapes = {name: rows for name, rows in drawn("mqt").items() if name != "proj"}
    shapes["proj"] = torch.randn(original.WIDTH, original.WIDTH).half()
    tensors |= {f"model.query_abstractor.{name}": rows for name, rows in shapes.items()}
    source = original.save(
        tmp_path / "theirs", tensors, mm_projector_type="linear", query_abstractor_type="matry_query"
    )
    result = convert(source, target, "--tower", tower)
    assert "without that method the model sees nothing" in " ".join(result.output.split())
    model, processor = load_model(str(target))
    inputs = inputs_of(processor)
    spec = f"mqt(weights={str(source)!r}, keep=16)"
    with tokensieve.attach(model, spec), tokensieve.attach(original.model(), spec):
        assert_same(model, inputs)


def test_the_projector_of_tokenpacker_is_set_apart():
    theirs = {f"model.mm_projector.{name}": rows for name, rows in drawn("tokenpacker").items()}
    ours, apart = renamed(theirs | {"model.mm_projector.weight": torch.zeros(1)})
    (names,) = apart.values()
    assert names == list(theirs)
    assert ours.keys() == {"model.mm_projector.weight"}  # a projector of one layer is not known


def test_images_are_padded_as_by_the_authors(tmp_path, tower, target):
    source = original.save(tmp_path / "theirs", original.weights())
    convert_llava(source, target, tower=str(tower))
    _, processor = load_model(str(target))
    plain = CLIPImageProcessorPil.from_pretrained(tower)
    square = Image.new("RGB", (160, 160), tuple(int(share * 255) for share in plain.image_mean))
    square.paste(WIDE, (0, 35))
    expected = plain(square, return_tensors="pt")["pixel_values"]
    assert torch.equal(inputs_of(processor)["pixel_values"], expected)


def test_the_prompt_is_vicunas(tmp_path, tower, target):
    source = original.save(tmp_path / "theirs", original.weights(), image_aspect_ratio=None)
    convert_llava(source, target, tower=str(tower))
    _, processor = load_model(str(target))
    image, text = {"type": "image"}, {"type": "text", "text": "What is it?"}
    turns = [{"role": "user", "content": [image, text]}, {"role": "assistant", "content": "A cat."}]
    system = "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    system += "detailed, and polite answers to the user's questions."
    asked = "USER: <image>\nWhat is it? ASSISTANT: A cat.</s>USER: Why? ASSISTANT:"
    turns += [{"role": "user", "content": "Why?"}]
    render = {"add_generation_prompt": True, "tokenize": False}
    assert processor.apply_chat_template(turns, **render) == f"{system} {asked}"
    brief = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    assert processor.apply_chat_template([brief, *turns], **render) == f"Be brief. {asked}"
    assert inputs_of(processor)["input_ids"][0].tolist().count(processor.tokenizer.bos_token_id) == 1
    assert not processor.image_processor.do_pad
    assert processor.tokenizer.padding_side == "left"


def test_text_behind_an_image_begins_as_by_the_authors(tmp_path, tower, target):
    """They tokenize the parts around an image apart; a stored tokenizer of early Llamas does so again."""
    words = ["<unk>", "<s>", "</s>", *"▁USER:\nhet", "he", "▁t", "US"]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = LlamaTokenizer(vocab=vocabulary, merges=[("h", "e"), ("▁", "t"), ("U", "S")])
    source = original.save(tmp_path / "theirs", original.weights())
    for file in source.glob("*token*"):
        file.unlink()
    tokenizer.save_pretrained(source)
    convert_llava(source, target, tower=str(tower))
    stored = AutoTokenizer.from_pretrained(target)
    parts = [stored(part, add_special_tokens=False).input_ids for part in ("USER: ", "\nthe")]
    image = stored.convert_tokens_to_ids("<image>")
    assert image == len(words)
    assert stored("USER: <image>\nthe").input_ids == [1, *parts[0], image, *parts[1]]
    assert parts[1][:2] == [vocabulary["▁"], vocabulary["\n"]]


def test_compare_takes_the_folder(tmp_path, tower, target):
    source = original.save(tmp_path / "theirs", original.weights())
    once = ["--methods", "pool", "--keep", "36", "--limit", "2", "--max-new-tokens", "2", "--no-measure", "--no-report"]
    outcomes = run_many({
        "convert": ["convert", "llava", source, target, "--tower", tower],
        "compare": ["compare", "--model", target, *once, "--output", tmp_path / "out"],
        "original": ["compare", "--model", source, *once, "--output", tmp_path / "other"],
    })  # fmt: skip
    assert outcomes["convert"].code == 0, outcomes["convert"].err
    assert outcomes["compare"].code == 0, outcomes["compare"].err
    assert "pool" in outcomes["compare"].out
    assert f"convert it: tokensieve convert llava {source}" in outcomes["original"].refused()


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"model_type": "llava_qwen"}, "has model_type 'llava_qwen'; supported is LLaVA-1.5 on Llama: llava, "),
        ({"image_aspect_ratio": "anyres"}, "has image_aspect_ratio 'anyres'; supported is LLaVA-1.5 on Llama"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "has mm_patch_merge_type 'spatial_unpad'"),
        ({"mm_use_im_start_end": True}, "has mm_use_im_start_end True"),
        ({"mm_projector_type": "linear"}, "has mm_projector_type 'linear'; supported: mlp2x_gelu"),
        ({"mm_vision_select_feature": "cls"}, "has mm_vision_select_feature 'cls'"),
        ({"mm_vision_select_layer": "last"}, "has values that transformers refuses"),
        ({"mm_vision_tower": None}, "names no mm_vision_tower"),
        ({"vision_config": {}}, "there is nothing to convert"),
        ({"num_hidden_layers": 3}, "9 missing: model.language_model.layers.2.input_layernorm.weight"),
        ({"intermediate_size": 64}, "6 of another shape: model.language_model.layers.0.mlp.down_proj.weight is "),
    ],
)  # fmt: skip
def test_another_kind_of_llava_is_refused(changed, reason, tmp_path, tower, target):
    source = original.save(tmp_path / "theirs", original.weights(), **changed)
    assert reason in refused(source, target, "--tower", tower)


def test_unknown_and_missing_tensors_are_named(tmp_path, tower, target):
    tensors = original.weights()
    tensors["model.image_newline"] = tensors.pop("model.norm.weight")
    source = original.save(tmp_path / "theirs", tensors)
    reason = refused(source, target, "--tower", tower)
    assert "1 missing: model.language_model.norm.weight; 1 unexpected: model.image_newline" in reason


def test_broken_folders_are_refused(tmp_path, tower, target, monkeypatch):
    monkeypatch.setattr("tokensieve.loading.place._hub_refusal", lambda *_: "no network")
    source = original.save(tmp_path / "theirs", original.weights(), "bin")
    options = ["--tower", tower]
    assert "--base is for a LoRA or a projector alone" in refused(source, target, *options, "--base", source)
    assert "is a 'llava' model; supported: clip_vision_model" in refused(source, target, "--tower", "reference")
    assert "it does not exist; give the vision encoder's folder" in refused(
        source, target, "--tower", tmp_path / "none"
    )
    assert "no model openai/clip-vit-large-patch14-336: it is no folder" in refused(source, target)
    shard = source / "pytorch_model-00002-of-00002.bin"
    torch.save({"an": object()}, shard)
    assert "other objects are not loaded, because that would run code" in refused(source, target, *options)
    shard.unlink()
    assert "names 1 shards that are missing: pytorch_model-00002-of-00002.bin" in refused(source, target, *options)
    index = source / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "../theirs.bin"}}))
    assert "that are not beside it: ../theirs.bin" in refused(source, target, *options)
    index.unlink()
    assert "it has none of model.safetensors, pytorch_model.bin, adapter_model" in refused(source, target, *options)
    (source / "config.json").write_text("{")
    assert "cannot read" in refused(source, target, *options)
    (source / "config.json").unlink()
    assert "no config.json at" in refused(source, target, *options)


def test_a_lora_that_does_not_fit_is_refused(tmp_path, tower, target):
    original.save_base(tmp_path / "base")
    source = tmp_path / "lora"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(original.settings()))
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    pair = {f"{name}A.weight": torch.zeros(4, original.WIDTH), f"{name}B.weight": torch.zeros(original.WIDTH, 4)}
    plain = {"peft_type": "LORA", "lora_alpha": 8}
    cases = [
        (plain | {"peft_type": "IA3"}, pair, "has peft_type 'IA3'; supported: 'LORA'"),
        (plain | {"use_dora": True}, pair, "has use_dora=True; supported: plain LoRA"),
        (plain | {"lora_alpha": None}, pair, "must have a number as lora_alpha; got None"),
        (plain, pair | {f"{name}B.weight": torch.zeros(8, 4)}, "do not fit model.layers.0.self_attn.q_proj.weight"),
        (plain, {f"{name}A.weight": pair[f"{name}A.weight"]}, "has one of the two factors of"),
        (plain, {n.replace("layers.0", "layers.7"): t for n, t in pair.items()}, "the base has no model.layers.7."),
        (plain, {name + "embedding_A": pair[f"{name}A.weight"]}, "is no factor of a linear map"),
        (plain, pair, "4 missing: model.multi_modal_projector.linear_1.bias"),
    ]
    for settings, tensors, reason in cases:
        (source / "adapter_config.json").write_text(json.dumps(settings))
        torch.save(tensors, source / "adapter_model.bin")
        assert reason in refused(source, target, "--tower", tower, "--base", tmp_path / "base")
    with pytest.raises(Refusal, match="no weights at the base"):
        convert_llava(source, target, tower=str(tower), base=target.parent)


def test_a_tokenizer_of_another_model_is_refused(tmp_path, tower, target):
    tensors = original.weights()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:100].clone()
    source = original.save(tmp_path / "theirs", tensors)
    assert "but model.language_model.embed_tokens.weight is [100, 32]" in refused(source, target, "--tower", tower)
    (source / "tokenizer.json").write_text("{")
    assert "the tokenizer at" in refused(source, target, "--tower", tower)
    for file in source.glob("*token*"):
        file.unlink()
    assert "expected tokenizer.json or tokenizer.model" in refused(source, target, "--tower", tower)


def test_never_overwrites(tmp_path, tower):
    source = original.save(tmp_path / "theirs", original.weights())
    result = convert(source, source, "--tower", tower)
    assert result.exit_code == 2
    assert "exists already" in result.output
