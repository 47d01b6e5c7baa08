"""The options of the commands that load a model: each through the real command, on tiny checkpoints in folders."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli.calling import Outcome, run, run_many
from tests.support import checkpoints
from tokensieve.errors import Refusal
from tokensieve.evaluate import Results
from tokensieve.loading import LoadOptions, Place, device_of, load_model, load_processor

QUESTION = "what is in the image ?"
OFFLOADED = {"model.vision_tower": "disk", "model.multi_modal_projector": "cpu", "model.language_model": "disk",
             "lm_head": "cpu"}  # fmt: skip
TURNS = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loading")
    checkpoints.save_llava(folder / "llava")
    checkpoints.save_adapter(folder / "adapter")
    checkpoints.save_adapter(folder / "wide", target_modules=["nonsuch", "q_proj"], layers_to_transform=[5])
    checkpoints.save_idefics3(folder / "idefics3")
    checkpoints.save_with_code(folder / "code")
    checkpoints.save_in_hub_cache(folder / "hub", "someone/tiny", "v1")
    (folder / "empty").mkdir()
    return folder


@pytest.fixture(scope="module")
def outcomes(folder: Path, photo: Path) -> dict[str, Outcome]:
    ask = ["ask", photo, QUESTION, "--max-new-tokens", "3", "--json", "--method", "uniform(keep=0.25)", "--model"]
    llava, idefics = folder / "llava", folder / "idefics3"
    two = ["--method", "vtc-cls(keep=36)", "--method", "fastv(keep=36)", "--json"]
    once = ["--methods", "uniform", "--keep", "36"]
    small = ["compare", "--model", llava, *once, "--limit", "3", "--max-new-tokens", "2", "--no-measure", "--no-report"]
    options = ["--dtype", "bfloat16", "--attn", "eager", "--adapter", folder / "adapter"]
    comparison = [*small, "--output", folder / "out", *options]
    environment = f"import os; os.environ.update(HF_HUB_CACHE={str(folder / 'hub')!r}, HF_HUB_OFFLINE='1', "
    environment += f"HF_MODULES_CACHE={str(folder / 'modules')!r})\n"
    return run_many({
        "plain": [*ask, llava],
        "adapter": [*ask, llava, "--adapter", folder / "adapter"],
        "tiles": [*ask, idefics],
        "one tile": [*ask, idefics, "--processor", "do_image_splitting=False"],
        "refused code": [*ask, folder / "code"],
        "code": [*ask, folder / "code", "--trust-remote-code"],
        "hub": [*ask, "someone/tiny", "--revision", "v1"],
        "no such revision": [*ask, "someone/tiny", "--revision", "v2"],
        "4bit": ["check", llava, "--quantize", "4bit", *two],
        "8bit": ["check", llava, "--quantize", "8bit", *two],
        "offloaded": ["check", llava, "--device-map", json.dumps(OFFLOADED), *two],
        "lora": ["check", llava, "--adapter", folder / "adapter", *two],
        "half": ["check", llava, "--dtype", "float16", "--method", "fastv(keep=36)", "--json"],
        "bench": ["bench", "--model", llava, *once, "--repeats", "1", "--json", "--device-map", json.dumps(OFFLOADED)],
        "compare": comparison,
        "compare 4bit": [*small, "--output", folder / "4bit", "--quantize", "4bit"],
        "compare offloaded": [*small, "--output", folder / "offloaded", "--device-map", json.dumps(OFFLOADED)],
        "compare as it is": [*small, "--output", folder / "as it is"],
        "other system prompt": [*comparison, "--system", "be brief"],
        "calibrate": ["calibrate", "vtw", "--model", llava, "--limit", "1", "--threshold", "100", "--attn", "eager",
                      "--output", folder / "vtw.json"],
    }, before=environment)  # fmt: skip


def answer(outcomes: Mapping[str, Outcome], name: str) -> dict[str, Any]:
    assert outcomes[name].code == 0, outcomes[name].err
    return dict(json.loads(outcomes[name].out))


def test_an_adapter_answers_as_peft_runs_it(outcomes: dict[str, Outcome], folder: Path, photo: Path) -> None:
    from peft import PeftModel

    from tokensieve.commands.loading import inputs_of
    from tokensieve.evaluate import Sample

    model, processor = load_model(str(folder / "llava"))
    inputs = inputs_of(model, processor, [Sample("ask", photo, QUESTION, ())])
    model = PeftModel.from_pretrained(model, str(folder / "adapter")).eval()
    with torch.inference_mode():
        ids = model.generate(**inputs, max_new_tokens=3, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    expected = processor.decode(ids, skip_special_tokens=True).strip()
    assert answer(outcomes, "adapter")["answer_full"] == expected
    assert answer(outcomes, "plain")["answer_full"] != expected


def test_processor_options_decide_the_tokens(outcomes: dict[str, Outcome]) -> None:
    assert answer(outcomes, "tiles")["tokens_before"] == 80
    assert answer(outcomes, "one tile")["tokens_before"] == 16


def test_code_of_a_checkpoint_runs_only_where_it_is_allowed(outcomes: dict[str, Outcome], folder: Path) -> None:
    line = outcomes["refused code"].refused()
    assert "runs code that comes with it" in line
    assert "--trust-remote-code" in line
    assert answer(outcomes, "code")["answer_full"] == answer(outcomes, "plain")["answer_full"]


def test_a_revision_is_found_in_the_cache(outcomes: dict[str, Outcome]) -> None:
    assert answer(outcomes, "hub") == {**answer(outcomes, "plain"), "image": answer(outcomes, "hub")["image"]}
    assert "no model someone/tiny at revision 'v2'" in outcomes["no such revision"].refused()


@pytest.mark.parametrize(
    ("name", "recorded"),
    [
        ("4bit", {"quantize": "4bit"}),
        ("8bit", {"quantize": "8bit"}),
        ("offloaded", {"device_map": OFFLOADED}),
        ("lora", {"adapter": "adapter"}),
        ("half", {"dtype": "float16"}),
    ],
)
def test_the_laws_hold_on_a_model_loaded_so(outcomes: dict[str, Outcome], name: str, recorded: dict[str, Any]) -> None:
    checked = answer(outcomes, name)
    assert checked["loading"] == recorded
    statuses = {(v["method"], v["law"]): v["status"] for v in checked["verdicts"]}
    assert set(statuses.values()) <= {"pass", "skipped"}, statuses
    for method in {method for method, _ in statuses}:
        assert (statuses[method, "identity"], statuses[method, "oracle"]) == ("pass", "pass")


def test_the_libraries_of_these_options_are_silent(outcomes: dict[str, Outcome]) -> None:
    assert (outcomes["8bit"].err, outcomes["4bit"].err, outcomes["offloaded"].err) == ("", "", "")


def test_an_offloaded_model_can_be_measured(outcomes: dict[str, Outcome]) -> None:
    full, reduced = json.loads(outcomes["bench"].out)
    assert reduced["flops"] < full["flops"]


def test_results_name_how_the_model_was_loaded_and_no_folder(outcomes: dict[str, Outcome], folder: Path) -> None:
    assert outcomes["compare"].code == 0, outcomes["compare"].err
    results = Results.load(folder / "out" / "results.json")
    expected = {"dtype": "bfloat16", "attn": "eager", "adapter": "adapter"}
    assert results.settings["loading"] == expected
    assert (results.environment["dtype"], results.environment["attention"]) == ("bfloat16", "eager")
    assert str(folder) not in (folder / "out" / "results.json").read_text("utf-8")


def predictions(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text("utf-8").splitlines()]


def test_an_offloaded_or_quantised_model_can_be_compared(outcomes: dict[str, Outcome], folder: Path) -> None:
    for name in ("compare 4bit", "compare offloaded", "compare as it is"):
        assert outcomes[name].code == 0, outcomes[name].err
    (first, *offloaded), (second, *plain) = predictions(folder / "offloaded"), predictions(folder / "as it is")
    assert offloaded == plain
    assert first["setup"] == second["setup"], "the weights on disk are read, too"
    assert predictions(folder / "4bit")[0]["setup"]["weights"] != second["setup"]["weights"]


def test_answers_to_another_prompt_are_not_reused(outcomes: dict[str, Outcome]) -> None:
    assert "(processor differ)" in outcomes["other system prompt"].refused()


def test_calibration_takes_the_options(outcomes: dict[str, Outcome]) -> None:
    assert outcomes["calibrate"].code == 0, outcomes["calibrate"].err


REFUSED = {
    "no such dtype": (["--dtype", "int7"], ["--dtype", "bfloat16"]),
    "no such device": (["--device", "moon"], ["device must be auto, cpu, cuda", "'moon'"]),
    "device that is not there": (["--device", "cuda:63"], ["'cuda:63'"]),
    "device without numbers": (["--device", "meta"], ["device must be auto, cpu, cuda", "'meta'"]),
    "system prompt that is no text": (["--system", "a\ud800"], ["the system prompt is not valid text", "'a\\ud800'"]),
    "device and map": (["--device", "cpu", "--device-map", "auto"], ["not both"]),
    "no such map": (["--device-map", "corner"], ["auto, balanced, balanced_low_0, sequential", "'corner'"]),
    "no such attention": (["--attn", "fast"], ["eager", "flash_attention_2", "sdpa", "'fast'"]),
    "no such quantisation": (["--quantize", "3bit"], ["'4bit'", "'8bit'"]),
    "revision of a folder": (["--revision", "v1"], ["is a folder", "'v1'"]),
    "no adapter": (["--adapter", "{folder}/gone"], ["no adapter at", "does not exist"]),
    "folder without adapter": (["--adapter", "{folder}/empty"], ["no adapter_config.json"]),
    "adapter of another model": (
        ["--adapter", "{folder}/adapter", "--model", "{folder}/idefics3"],
        ["does not fit Idefics3ForConditionalGeneration"],
    ),
    "no key": (["--processor", "401408"], ["--processor takes key=value, as in max_pixels=401408"]),
    "unknown processor option": (["--processor", "crop_sise=3"], ["no option 'crop_sise'", "did you mean crop_size"]),
    "processor option of no use": (["--processor", "size={'shortest_edge': 'x'}"], ["does not work with size="]),
    "unknown template option": (["--chat", "enable_thinking=False"], ["the chat template reads no 'enable_thinking'"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def refusals(folder: Path, photo: Path) -> dict[str, Outcome]:
    ask = ["ask", photo, QUESTION, "--model", folder / "llava"]
    calls = {
        name: [*ask, *(o.replace("{folder}", str(folder)) for o in options)] for name, (options, _) in REFUSED.items()
    }
    calls["adapter on disk"] = [*ask, "--adapter", folder / "adapter", "--device-map", json.dumps(OFFLOADED)]
    calls["random and quantised"] = ["check", folder / "llava", "--random", "--quantize", "4bit"]
    calls["train"] = ["train", "pumer", "--task", "vqa", "--model", "vilt-reference", "--data", "reference:train",
                      "--processor", "pixels=3", "--output", folder / "train"]  # fmt: skip
    return run_many(calls)


@pytest.mark.parametrize("name", REFUSED)
def test_a_wrong_value_is_one_line(refusals: dict[str, Outcome], name: str) -> None:
    line = refusals[name].refused()
    assert [words for words in REFUSED[name][1] if words not in line] == [], line


def test_options_that_do_not_go_together_are_one_line(refusals: dict[str, Outcome]) -> None:
    assert "leave quantize out" in refusals["random and quantised"].refused()
    assert "cannot be put on offloaded weights" in refusals["adapter on disk"].refused()
    assert "has no option 'pixels'" in refusals["train"].refused()


@pytest.mark.parametrize(
    ("option", "package", "extra"),
    [
        (["--quantize", "4bit"], "bitsandbytes", "quantize"),
        (["--adapter", "gone"], "peft", "peft"),
        (["--device-map", "auto"], "accelerate", "train"),
    ],
)
def test_a_missing_package_is_named(model: str, option: list[str], package: str, extra: str) -> None:
    calls = {"bench": ["bench", "--model", model, *option]}
    line = run_many(calls, before=f"import sys; sys.modules[{package!r}] = None\n")["bench"].refused()
    assert f'needs {package}: in the checkout, pip install -e ".[{extra}]"' in line


@pytest.mark.parametrize("command", ["ask", "bench", "calibrate average", "calibrate vtw", "check", "compare"])
def test_every_command_has_the_same_options(command: str) -> None:
    shown = run(*command.split(), "--help").out
    options = ("dtype", "device", "device-map", "attn", "revision", "quantize", "trust-remote-code", "adapter",
               "processor", "chat", "system")  # fmt: skip
    assert [option for option in options if f"--{option} " not in shown] == []


# -- from Python -----------------------------------------------------------------------------------------------------


def rendered(folder: Path, options: LoadOptions, **variables: Any) -> str:
    processor = load_processor(Place(str(folder / "idefics3")), options)
    return str(processor.apply_chat_template(TURNS, add_generation_prompt=True, tokenize=False, **variables))


def test_chat_options_render_as_variables_of_the_call_do(folder: Path) -> None:
    plain = rendered(folder, LoadOptions())
    quiet = rendered(folder, LoadOptions(chat={"enable_thinking": False}))
    assert quiet == rendered(folder, LoadOptions(), enable_thinking=False) != plain
    assert rendered(folder, LoadOptions(chat={"enable_thinking": True})) == plain


def test_a_system_prompt_stands_before_every_conversation(folder: Path) -> None:
    text = """be "brief" {{ and }} don't"""
    assert rendered(folder, LoadOptions(system=text)) == f"[INST]system {text}[/INST] {rendered(folder, LoadOptions())}"


def test_text_informed_methods_do_not_take_the_system_prompt_for_the_users_words(folder: Path) -> None:
    from tokensieve.engine.prompt.user_text import UserTextFinder

    model, processor = load_model(str(folder / "idefics3"), LoadOptions(system="be brief on the table"))
    ids = processor.tokenizer(rendered(folder, LoadOptions(system="be brief on the table")))["input_ids"]
    columns = UserTextFinder(model, processor).columns(ids, before_image=True)
    assert processor.tokenizer.decode([ids[column] for column in columns]) == QUESTION


def test_training_takes_processor_options() -> None:
    from tokensieve import reference
    from tokensieve.train.pumer.models import load_processors

    _, images = load_processors(str(reference.path("vilt-reference")), options={"size": {"shortest_edge": 64}})
    assert images.size["shortest_edge"] == 64


def test_a_template_without_a_system_turn_is_refused(folder: Path) -> None:
    processor = load_processor(Place(str(folder / "idefics3")))
    processor.chat_template = "{% for m in messages if m['role'] == 'user' %}{{ m['content'][1]['text'] }}{% endfor %}"
    processor.save_pretrained(folder / "no system")
    with pytest.raises(Refusal, match="no place for a system prompt"):
        load_processor(Place(str(folder / "no system")), LoadOptions(system="be brief"))


def test_the_defaults_are_recorded_as_nothing() -> None:
    assert LoadOptions().to_json() == {}
    with pytest.raises(Refusal, match=re.escape("dtype must be one of auto, float32, bfloat16, float16; got 'int8'")):
        LoadOptions(dtype="int8")  # type: ignore[arg-type]


def test_inputs_go_where_an_offloaded_model_runs(folder: Path) -> None:
    model, _ = load_model(str(folder / "llava"), LoadOptions(device_map=OFFLOADED))
    assert model.device.type == "meta"
    assert device_of(model).type == "cpu"


def test_a_checkpoint_with_missing_weights_is_refused(folder: Path) -> None:
    """Transformers draws such weights at random and only logs it, and the command silences its log."""
    from safetensors.torch import load_file, save_file

    target = checkpoints.save_llava(folder / "part")
    weights = load_file(target / "model.safetensors")
    dropped = [name for name in weights if "projector" in name]
    save_file({name: w for name, w in weights.items() if name not in dropped}, target / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    with pytest.raises(Refusal, match=f"lacks {len(dropped)} of the model's weights, such as .*projector"):
        load_model(str(target))
