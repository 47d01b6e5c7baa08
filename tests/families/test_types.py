"""Every image-text-to-text type of transformers: the evidence of ``docs/models.md`` is what the laws say."""

import inspect
import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

import tokensieve
from tests.support import zoo, zoo_prompts
from tests.support.evidence import evidence
from tokensieve import Refusal
from tokensieve.models import family_of
from tokensieve.models.family import EncodeCall
from tokensieve.models.patch_order import discover_rules, unit_of_row

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "docs"), str(ROOT / "benchmarks")]
import make_models  # noqa: E402

import families as script  # noqa: E402

RECORD = json.loads((ROOT / "docs" / "models.json").read_text("utf-8"))
ALWAYS = ("cosmos3_omni", "ernie4_5_vl_moe", "glm46v", "gemma4", "mistral_large4")  # in order, packed, with a refusal
DISCOVERED = [name for name, entry in RECORD["types"].items() if entry.get("recognised") == "discovered"]
ROTATING = [name for name in DISCOVERED if name not in ALWAYS][datetime.now(UTC).toordinal() % 7 :: 7]

same_release = pytest.mark.skipif(
    transformers.__version__ != RECORD["transformers"], reason="the evidence is about another release"
)


@same_release
@pytest.mark.slow
@pytest.mark.parametrize("name", [*ALWAYS, *ROTATING])  # a seventh of them a day; the script runs all
def test_the_evidence_of_a_type_is_what_the_laws_say(name):
    assert script.outcomes(evidence(name)) == script.outcomes(RECORD["types"][name])


def test_the_page_is_what_the_generator_writes():
    text = (ROOT / "docs" / "models.md").read_text("utf-8")
    assert make_models.page(text, RECORD) == text, "run python docs/make_models.py"


@same_release
def test_the_evidence_is_about_types_of_the_release():
    assert set(RECORD["types"]) <= set(zoo.TYPES)
    assert RECORD["types_of_the_release"] == len(zoo.TYPES)


def test_no_type_fails():
    failed = [n for n, e in RECORD["types"].items() for s in e.get("stages", {}).values() if s["status"] == "failed"]
    assert not failed, "a type that is not right must be refused"


def test_a_run_is_compared_with_an_earlier_one():
    passed = {"stages": {"features": {"status": "passed", "reason": ""}}}
    refused = {"refused": "no LLM"}
    assert script.differences({"a": passed, "b": passed, "c": refused}, {"a": passed, "b": refused, "d": passed}) == [
        "b, all: – -> refused: no LLM", "b, features: passed -> –", "c: gone", "d: new",
    ]  # fmt: skip


def test_an_error_of_several_lines_is_one_line_of_evidence(monkeypatch):
    def fails(name):
        raise ImportError("\n  it needs timm\n  install it")

    monkeypatch.setattr("tests.support.evidence.evidence", fails)
    entry = script.run(["some_type"], None, {})["some_type"]
    assert entry == {"refused": "no tiny model of it runs: ImportError: it needs timm install it"}
    record = {"transformers": "5.23.0", "types_of_the_release": 1, "types": {"some_type": entry}}
    assert "1 are not checked" in make_models.table(record)
    assert "| `some_type` | not checked: no tiny model" in make_models.table(record)


def test_a_model_that_prunes_by_itself_is_refused():
    config = zoo.tiny_config("nemotron_h_omni")
    config.video_pruning_rate = 0.5
    model = SimpleNamespace(config=config)
    with pytest.raises(Refusal, match="drops visual tokens by itself"):
        family_of(model)


def sparse(model):
    for indexer in model.modules():
        if hasattr(indexer, "index_topk"):
            indexer.index_topk = 6


def sliding(model):
    model.config.get_text_config().sliding_window = 3


def answer(model, **inputs):
    steps = model.generate(
        **inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    return torch.stack(steps.logits, 1)


@same_release
@pytest.mark.parametrize(("name", "change"), [("mistral_large4", sparse), ("unlimited_ocr", sliding)])
def test_a_cache_that_leaves_out_columns_holds_a_reduced_prompt(name, change):
    """It reads the columns of the best index scores only, or the prompt and the last columns of the answer only.

    The run equals one on the embeddings of the kept tokens, with nothing attached.
    """
    model = zoo.tiny_model(name)
    inputs = zoo_prompts.prompts(model, name)([0])
    all_columns = answer(model, **inputs)
    change(model)
    assert (answer(model, **inputs) - all_columns).abs().max() > 1e-2, "no column was left out"
    with tokensieve.attach(model, "divprune(keep=3)", positions="contiguous") as sieve:
        reduced = answer(model, **inputs)
        kept = sieve.last[0][0].kept

    ids = inputs.pop("input_ids")
    visual = (ids[0] == model.config.image_token_id).nonzero().flatten()
    left = torch.ones(ids.shape[1], dtype=torch.bool)
    left[visual] = torch.zeros(len(visual), dtype=torch.bool).index_fill(0, kept, True)
    arguments = inspect.signature(model.base_model.get_image_features).parameters
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(ids)
        images = {argument: value for argument, value in inputs.items() if argument in arguments}
        embeddings[0, visual] = torch.cat(list(model.base_model.get_image_features(**images).pooler_output))
        by_hand = answer(model, inputs_embeds=embeddings[:, left], attention_mask=torch.ones(1, int(left.sum())))
    assert (reduced - by_hand).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["granite4_vision", "llama4", "inkling_mm_model"])
def test_rows_in_another_field_are_reduced(name):
    """Rows for several layers of the LLM, rows that the forward projects, patches that are encoded one by one."""
    model = zoo.tiny_model(name)
    inputs = zoo_prompts.prompts(model, name)([0])
    visual = int((inputs["input_ids"] == model.config.image_token_id).sum())
    with torch.no_grad(), tokensieve.attach(model, "random(keep=3)") as sieve:
        model(**inputs)
    (image,) = sieve.last[0]
    assert (image.total, image.slots) == (visual, 3)


@pytest.mark.parametrize(("name", "rule"), [("qwen3_vl_moe", "in order"), ("kimi_k25", "raster")])
def test_the_discovered_token_of_each_patch_is_the_one_that_it_changes(name, rule):
    """Every patch by itself, at the encoder's end: exactly the token that the rule names changes."""
    model = zoo.tiny_model(name)
    inputs = zoo_prompts.draw(model, name, (3, 4), 0)
    base, tower = model.base_model, model.get_encoder(modality="image")
    call = EncodeCall(inputs)
    with torch.no_grad():
        call.output = base.get_image_features(**inputs, return_dict=True)
    sizes = [len(rows) for rows in call.output.pooler_output]
    assert discover_rules(model, tower, call, 48, sizes)[0] == rule
    unit = unit_of_row(rule, tower, inputs, 48, sizes)
    before, last = torch.cat(list(call.output.pooler_output)), (getattr(tower, "blocks", None) or tower.layers)[-1]
    for patch in range(48):
        row = torch.zeros(48, 1).index_fill(0, torch.tensor([patch]), 1)

        def disturb(layer, args, out, row=row):
            return out + row.view(*out.shape[:-1], 1) * out.roll(1, -1)  # a norm does not undo it

        handle = last.register_forward_hook(disturb)
        with torch.no_grad():
            after = torch.cat(list(base.get_image_features(**inputs, return_dict=True).pooler_output))
        handle.remove()
        changed = (after - before).abs().amax(-1) > 0
        assert changed.nonzero().flatten().tolist() == [int(unit[patch])]
