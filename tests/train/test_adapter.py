"""Adapters are trained under a schedule of methods, saved for PEFT, resumed, and leave the base as it was."""

import json
import logging
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tokensieve import Refusal, attach
from tokensieve.cli import app
from tokensieve.evaluate.prompt import encode
from tokensieve.loading import LoadOptions, load_model

pytest.importorskip("peft")
pytest.importorskip("accelerate")

import peft
from safetensors.torch import load_file

from tokensieve.train.adapter import Recipe, train_adapter
from tokensieve.train.adapter.data import read_samples
from tokensieve.train.adapter.run import AdapterTrainer
from tokensieve.train.adapter.schedule import Schedule

QUICK = Recipe(keeps=(0.25, 0.05), rank=2, epochs=2, batch_size=3, rate=1e-2, warmup=0.0, checkpoints=0.4)
DOCS = Path(__file__).parents[2] / "docs"


def train(llava, output, recipe=QUICK, **options):
    return train_adapter(str(llava), str(llava.parent / "train.jsonl"), output, recipe=recipe, **options)


@pytest.fixture(scope="module")
def tuned(llava, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    return folder, train(llava, folder)


def test_the_adapter_loads_in_both_ways_and_the_base_comes_back(llava, tuned):
    base, processor = load_model(str(llava))
    inputs = encode(processor, read_samples(str(llava.parent / "train.jsonl"))[0][:2])
    loaded, _ = load_model(str(llava), LoadOptions(adapter=str(tuned[0])))
    with torch.no_grad():
        before = base(**inputs).logits
        model = peft.PeftModel.from_pretrained(load_model(str(llava))[0], tuned[0]).eval()
        logits = []
        for one in (loaded, model):
            with attach(one, "pool(keep=16)"):
                logits.append(one(**inputs).logits)
        assert torch.equal(*logits)
        with attach(base, "pool(keep=16)"):
            assert not torch.allclose(logits[0], base(**inputs).logits, atol=1e-3)
        with model.disable_adapter():
            assert torch.equal(model(**inputs).logits, before)
        assert torch.equal(model.unload()(**inputs).logits, before)


def test_the_record_says_what_was_trained(llava, tuned):
    folder, record = tuned
    stored = json.loads((folder / "training.json").read_text())
    assert stored == json.loads(json.dumps({"format": 1, **record}))
    assert stored["schedule"] == [{"start": 0.0, "methods": ["pool(keep=0.25)", "pool(keep=0.05)"]}]
    assert [row["method"] for row in stored["metrics"]] == ["full", "pool(keep=0.25)", "pool(keep=0.05)"]
    assert (stored["step"], stored["held_out"]) == (6, 3)  # 9 of 12 questions twice, by 3; one image is held out
    assert str(llava.parent) not in (folder / "training.json").read_text()
    assert not list(folder.glob("*part*"))


@pytest.mark.parametrize("parts", ["projector", "lora", "all"])
def test_a_gradient_reaches_what_is_tuned_and_nothing_else_moves(parts, llava, tmp_path):
    recipe = Recipe(keeps=(0.25,), parts=parts, rank=2, batch_size=4, rate=1e-2, warmup=0.0)
    train(llava, tmp_path, recipe)
    base = load_model(str(llava))[0]
    if parts == "all":
        model = load_model(str(tmp_path / "model"))[0]
        moved = {n for n, w in base.state_dict().items() if not torch.equal(w, model.state_dict()[n])}
        assert moved == {name for name in base.state_dict() if "vision_tower" not in name}
        return
    weights = load_file(tmp_path / "adapter_model.safetensors")
    moved = {name for name, weight in weights.items() if "lora_B" in name and weight.abs().max() > 0}
    assert moved == {name for name in weights if "lora_B" in name}  # they start as zeros
    places = {re.search("projector|language_model|vision_tower", name)[0] for name in weights}
    assert places == ({"projector"} if parts == "projector" else {"projector", "language_model"})


def test_a_schedule_switches_at_its_steps():
    schedule = Schedule.of({0.0: ["pool-decoder(stride=8)"], 0.25: ["random"], 0.75: ["full"]}, [0.25, 0.1])
    names = [" + ".join(stage.info.name for stage in schedule.stages(step, 8, seed=0)[0]) for step in range(8)]
    assert names == ["pool-decoder"] * 2 + ["random"] * 4 + ["full"] * 2
    assert [stages[0].keep for stages in schedule.stages(3, 8, seed=0, joint=True)] == [0.25, 0.1]
    drawn = [schedule.stages(step, 800, seed=0)[0][0] for step in range(200, 400)]
    assert drawn == [schedule.stages(step, 800, seed=0)[0][0] for step in range(200, 400)]
    assert 60 < sum(method.keep == 0.1 for method in drawn) < 140
    assert len({method.seed for method in drawn}) > 190  # random dropping draws other places in each step


@pytest.mark.parametrize("starts", [(0.5,), (0.0, 0.5, 0.2), (0.0, 1.0)])
def test_a_schedule_that_does_not_rise_from_the_start_is_refused(starts):
    with pytest.raises(Refusal, match="rising shares from 0 to below 1"):
        Schedule.of({start: ["full"] for start in starts}, [])


def test_the_trainer_runs_the_scheduled_methods(llava, tmp_path, monkeypatch):
    steps, compute = [], AdapterTrainer.compute_loss

    def watch(self, *args, **options):
        before = self.schedule.stages

        def stages(step, steps_in_all, *rest, **more):
            steps.append((step, [str(stage) for stage in before(step, steps_in_all, *rest, **more)[0]]))
            return before(step, steps_in_all, *rest, **more)

        monkeypatch.setattr(self.schedule, "stages", stages)
        try:
            return compute(self, *args, **options)
        finally:
            monkeypatch.setattr(self.schedule, "stages", before)

    monkeypatch.setattr(AdapterTrainer, "compute_loss", watch)
    phases = {0.0: ("pool-decoder(stride=8, layer=1)",), 0.5: ("full",)}
    train(llava, tmp_path, Recipe(phases=phases, rank=2, batch_size=3, rate=1e-3))
    assert steps == [(0, ["pool-decoder(layer=1)"]), (1, ["pool-decoder(layer=1)"]), (2, ["full"])]


def test_resumes_past_a_broken_checkpoint(llava, tuned, tmp_path, monkeypatch):
    finish = AdapterTrainer._save_checkpoint

    def interrupt(self, model, trial):
        finish(self, model, trial)
        raise KeyboardInterrupt

    monkeypatch.setattr(AdapterTrainer, "_save_checkpoint", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(llava, tmp_path)
    monkeypatch.undo()
    (whole,) = tmp_path.glob("checkpoint-*")
    broken = tmp_path / "checkpoint-5"
    broken.mkdir()
    (broken / "adapter_model.safetensors").write_bytes(b"half")
    train(llava, tmp_path)
    once, twice = (load_file(folder / "adapter_model.safetensors") for folder in (tuned[0], tmp_path))
    assert whole.name == "checkpoint-3"
    assert once.keys() == twice.keys()
    for name, weight in once.items():
        assert torch.allclose(weight, twice[name], atol=1e-6)
    with pytest.raises(Refusal, match="a training with another recipe"):
        train(llava, tmp_path, replace(QUICK, rank=3))


def test_distillation_pulls_towards_the_unreduced_base(llava, tmp_path, tuned):
    """With a heavy weight, the teacher's words outweigh the answers: their loss falls less."""
    record = train(llava, tmp_path, replace(QUICK, distillation=50.0))
    pulled, alone = (found["metrics"][1]["loss"] for found in (record, tuned[1]))
    assert alone < pulled
    with pytest.raises(Refusal, match="without its adapter"):
        Recipe(parts="all", distillation=1.0)


def test_records_that_cannot_be_used_are_counted(llava, tmp_path, caplog):
    lines = [json.loads(line) for line in (llava.parent / "train.jsonl").read_text().splitlines()]
    (tmp_path / "none.png").write_bytes(b"no image")
    (tmp_path / "cut.png").write_bytes((llava.parent / lines[0]["image"]).read_bytes()[:-400])  # the header is whole
    bad = [{**lines[0], "image": str(tmp_path / name)} for name in ("none.png", "cut.png", "gone.png")]
    bad.append({**lines[0], "image": str(llava.parent / lines[0]["image"]), "question": " "})
    good = [{**line, "image": str(llava.parent / line["image"])} for line in lines]
    (tmp_path / "mixed.jsonl").write_text("\n".join(map(json.dumps, [*bad, *good])))
    held_out = str(llava.parent / "train.jsonl")
    recipe = Recipe(keeps=(0.25,), rank=2, batch_size=7)
    with caplog.at_level(logging.WARNING):
        data = str(tmp_path / "mixed.jsonl")
        record = train_adapter(str(llava), data, tmp_path / "out", recipe=recipe, evaluation=held_out)
    assert record["skipped"] == 4
    assert record["held_out"] == 12
    assert all(name in caplog.text for name in ("none.png", "cut.png", "gone.png", "the question is empty"))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--methods", "fastv"], "fastv goes by the end of the prompt, where the answer stands in training"),
        (["--methods", "pol"], "did you mean pool"),
        (["--schedule", "0: pool; 2: full"], "a phase is 'SHARE: METHODS'"),
        (["--schedule", "pool"], "a phase is 'SHARE: METHODS'"),
        (["--data", "gone.jsonl"], "gone.jsonl"),
        (["--data", "reference:train[7]"], r"reference:train\[:700\]"),
        (["--rate", "0"], "peak_rate must be larger than 0"),
    ],
)
def test_mistakes_end_in_one_line(options, text, llava, tmp_path):
    command = ["train", "adapter", "--model", str(llava), "--data", str(llava.parent / "train.jsonl")]
    result = CliRunner().invoke(app, [*command, "--output", str(tmp_path), *options])
    assert result.exit_code == 2
    error = result.stderr.strip().splitlines()
    assert len([line for line in error if line.startswith("tokensieve")]) <= 1
    assert re.search(text, result.stderr), result.stderr


def test_an_adapter_is_not_trained_on_another(llava, tuned, tmp_path):
    with pytest.raises(Refusal, match="a new adapter is trained on the model itself"):
        train(llava, tmp_path, loading=LoadOptions(adapter=str(tuned[0])))


def test_the_commands_of_the_page_run(llava, tmp_path, monkeypatch):
    """The page's worked example, at toy size: a tiny random LLaVA, and a few records."""
    monkeypatch.chdir(tmp_path)
    Path("llava").symlink_to(llava)
    for file in llava.parent.iterdir():
        if file.is_file():
            Path(file.name).symlink_to(file)
    (block,) = re.findall(r"<!-- example -->\n+```bash\n(.*?)```", (DOCS / "finetune.md").read_text("utf-8"), re.S)
    commands = [shlex.split(line) for line in block.replace("\\\n", " ").splitlines() if line.startswith("tokensieve")]
    for command in commands:
        quick = ["--limit", "3", "--no-referee"] if command[1] == "compare" else []
        result = CliRunner().invoke(app, [*command[1:], *quick])
        assert result.exit_code == 0, result.output
    assert [command[1] for command in commands] == ["train", "compare"]
    assert Path("runs/visionzip/adapter_config.json").is_file()
