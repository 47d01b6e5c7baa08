"""Fine-tuning with reducers on: from pretrained to a model that answers, past bad images, resumed and distilled."""

import json
import logging
import random

import pytest
import torch
from PIL import Image
from transformers import BertTokenizer, ViltForQuestionAnswering, ViltImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from typer.testing import CliRunner

import tokensieve
from tests.support.crossmodal import batch, meter, vilt
from tokensieve.cli import app
from tokensieve.fusion.meter import MeterForQuestionAnswering

pytest.importorskip("accelerate")

from tokensieve.train.pumer import Recipe, train_pumer
from tokensieve.train.pumer.data import Records, read_records
from tokensieve.train.pumer.models import load_student
from tokensieve.train.pumer.recipe import PumerTrainer, groups
from tokensieve.train.pumer.tasks import task_named

COLOURS = {"red": (220, 30, 30), "green": (30, 220, 30), "blue": (30, 30, 220)}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "what", "colour", "is", "it", "?", "the", *COLOURS]
SPEC = "pumer(layers=(1, 3), prune=0.2, merge=0.3, merge_text=0.2)"
QUICK = Recipe(epochs=4, batch_size=8, rate=2e-3, head_rate=1, patience=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures of one colour each, records about them, and an untrained ViLT with its processors."""
    root = tmp_path_factory.mktemp("colours")
    lines = []
    for number in range(24):
        colour = list(COLOURS)[number % 3]
        Image.new("RGB", (32, 32), COLOURS[colour]).save(root / f"{number}.png")
        record = {"image": f"{number}.png", "question": "what colour is it ?", "answer": colour}
        lines.append(
            {**record, "text": f"the {colour}", "sentence": f"it is {colour}", "label": number % 2, "image2": "0.png"}
        )
    (root / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (root / "vocab.txt").write_text("\n".join(WORDS))
    model = vilt()
    model.config.id2label = {i: f"LABEL_{i}" for i in range(5)}
    model.save_pretrained(root / "model")
    BertTokenizer.from_pretrained(root).save_pretrained(root / "model")
    size = {"size": {"shortest_edge": 32}, "size_divisor": 8}
    ViltImageProcessor(**size).save_pretrained(root / "model")
    return root


@pytest.fixture(scope="module")
def teacher(folder):
    """The unreduced fine-tune."""
    train_pumer("vqa", str(folder / "model"), str(folder / "train.jsonl"), folder / "full", spec=None, recipe=QUICK)
    return folder / "full" / "model"


def test_learns_with_reducers_on(folder, teacher, tmp_path):
    data = str(folder / "train.jsonl")
    command = ["train", "pumer", "--task", "vqa", "--model", str(folder / "model"), "--data", data, "--json"]
    command += ["--teacher", str(teacher), "--evaluation", data, "--method", SPEC, "--output", str(tmp_path)]
    command += ["--epochs", "4", "--batch-size", "8", "--rate", "2e-3", "--head-rate", "1"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    model = ViltForQuestionAnswering.from_pretrained(tmp_path / "model")
    assert set(model.config.label2id) == set(COLOURS)
    assert json.loads(result.stdout)["eval_accuracy"] > 0.9
    stored = json.loads((tmp_path / "model" / "tokensieve.json").read_text())
    assert tokensieve.parse(stored["method"]) == tokensieve.parse(SPEC)


@pytest.mark.parametrize("task", ["nlvr2", "ve", "retrieval"])
def test_every_task_runs(folder, task, tmp_path):
    recipe = Recipe(epochs=1, batch_size=8, negatives=2)
    place = str(folder / "model")
    train_pumer(task, place, str(folder / "train.jsonl"), tmp_path, spec=SPEC, recipe=recipe)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["architectures"] == [task_named(task).models["vilt"].__name__]
    assert config["modality_type_vocab_size"] == (3 if task == "nlvr2" else 2)


def test_meter_trains(folder, tmp_path):
    model = meter()
    model.config.id2label = {i: f"LABEL_{i}" for i in range(5)}
    model.save_pretrained(tmp_path / "meter")
    BertTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "meter")
    square = {"height": 32, "width": 32}
    CLIPImageProcessorPil(size=square, crop_size=square).save_pretrained(tmp_path / "meter")
    spec, recipe = "pumer(layers=(0, 2))", Recipe.for_model("meter", epochs=1, batch_size=8)
    train_pumer("vqa", str(tmp_path / "meter"), str(folder / "train.jsonl"), tmp_path, spec=spec, recipe=recipe)
    assert MeterForQuestionAnswering.from_pretrained(tmp_path / "model").config.num_labels == 3


@pytest.mark.parametrize("make", [vilt, meter])
def test_a_second_image_starts_as_the_first(make, tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    pairs = load_student(str(tmp_path), task_named("nlvr2"), ["False", "True"])
    (kinds,) = (w for n, w in pairs.named_parameters() if n.endswith("token_type_embeddings.weight") and len(w) == 3)
    assert torch.equal(kinds[1], kinds[2])
    stored = {n: w for n, w in model.named_parameters() if n.endswith("token_type_embeddings.weight")}
    assert torch.equal(kinds[:2], next(weight for name, weight in stored.items() if "text" not in name))


def test_resumes(folder, tmp_path, monkeypatch):
    arguments = ("vqa", str(folder / "model"), str(folder / "train.jsonl"))
    train_pumer(*arguments, tmp_path / "once", spec=SPEC, recipe=QUICK)
    finish = PumerTrainer._save_checkpoint

    def interrupt(self, model, trial):
        finish(self, model, trial)
        if self.state.global_step == 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(PumerTrainer, "_save_checkpoint", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train_pumer(*arguments, tmp_path / "twice", spec=SPEC, recipe=QUICK)
    monkeypatch.undo()
    train_pumer(*arguments, tmp_path / "twice", spec=SPEC, recipe=QUICK)
    once, twice = (ViltForQuestionAnswering.from_pretrained(tmp_path / n / "model") for n in ("once", "twice"))
    for a, b in zip(once.parameters(), twice.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_unreadable_images_are_skipped_and_counted(folder, tmp_path, caplog):
    lines = (folder / "train.jsonl").read_text().splitlines()
    (tmp_path / "bad.png").write_bytes(b"no image")
    bad = [{"image": name, "question": "what colour is it ?", "answer": "red"} for name in ("bad.png", "gone.png")]
    bad.append({"image": str(folder / "1.png"), "question": " ", "answer": "red"})
    good = [{**json.loads(line), "image": str(folder / json.loads(line)["image"])} for line in lines[:5]]
    data = tmp_path / "train.jsonl"
    data.write_text("\n".join(map(json.dumps, bad + good)))
    with caplog.at_level(logging.WARNING):
        recipe = Recipe(epochs=1, batch_size=4)
        found = train_pumer("vqa", str(folder / "model"), str(data), tmp_path / "out", spec=SPEC, recipe=recipe)
    assert found["skipped"] == 3
    assert "record 2 skipped" in caplog.text
    assert "3 of 8 training records" in caplog.text


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
def test_no_damage_to_an_image_stops_a_run(kind, tmp_path):
    """Bytes overwritten and ends cut off: the record is used or skipped."""
    rng, whole = random.Random(0), tmp_path / f"whole.{kind}"
    Image.linear_gradient("L").resize((16, 16)).save(whole, kind)
    records = []
    for number in range(40):
        data = bytearray(whole.read_bytes())
        for _ in range(rng.randint(1, 5)):
            data[rng.randrange(min(len(data), 120))] = rng.randrange(256)
        path = tmp_path / f"{number}.{kind}"
        path.write_bytes(data[: rng.randint(1, len(data))])
        records.append({"image": path, "question": "what?", "answer": "red"})
    found = Records([*records, {**records[0], "image": whole}], task_named("vqa"), {"red": 0})
    assert all(found[number]["images"][0].mode == "RGB" for number in range(len(records)))
    assert found.skipped > 0


def test_records_are_converted_as_everywhere_and_half_characters_are_skipped(tmp_path):
    Image.new("LA", (8, 8), (0, 0)).save(tmp_path / "clear.png")
    record = {"image": tmp_path / "clear.png", "question": "what?", "answer": "red"}
    stored = {**record, "image": {"bytes": (tmp_path / "clear.png").read_bytes(), "path": None}}
    drawn = {**record, "image": Image.new("I;16", (8, 8), 65_535)}
    found = Records([record, stored, drawn, {**record, "question": "\ud83c?"}], task_named("vqa"), {"red": 0})
    assert [found[number]["images"][0].getpixel((0, 0)) for number in range(4)] == [(255, 255, 255)] * 4
    assert found.skipped == 1


def test_the_bundled_questions_as_records():
    records = read_records("reference:train[:9]", task_named("vqa"))
    assert len(records) == 9
    found = Records(records, task_named("vqa"), {record["answer"]: 0 for record in records})
    assert found[8]["images"][0].size == (120, 120)
    assert found.skipped == 0
    for source in ("reference:nowhere", "reference:train[3]"):
        with pytest.raises(ValueError, match="train"):
            read_records(source, task_named("vqa"))


def test_nothing_but_bad_images(tmp_path):
    task = task_named("vqa")
    records = [{"image": tmp_path / "gone.png", "question": "what?", "answer": "red"}] * 3
    with pytest.raises(ValueError, match="no record has images"):
        Records(records, task, {"red": 0})[1]


def test_a_full_disk_keeps_the_last_checkpoint(folder, tmp_path, monkeypatch, caplog):
    saved = PumerTrainer.save_model

    def full(self, output_dir=None, **options):
        saved(self, output_dir, **options)
        if output_dir and output_dir.endswith("-6"):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(PumerTrainer, "save_model", full)
    with caplog.at_level(logging.WARNING):
        recipe = Recipe(epochs=2, batch_size=8)
        train_pumer("vqa", str(folder / "model"), str(folder / "train.jsonl"), tmp_path, spec=SPEC, recipe=recipe)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    assert "the last good one stays" in caplog.text


def test_groups_of_learning_rates():
    model = meter()
    recipe = Recipe.for_model("meter")
    rates = {id(p): (group["lr"], group["weight_decay"]) for group in groups(model, recipe) for p in group["params"]}
    assert len(rates) == len(list(model.parameters()))
    wanted = {
        "classifier.0.weight": (5e-6 * 50, 0.01),
        "classifier.0.bias": (5e-6 * 50, 0.0),
        "meter.cross_modal_text_layers.0.output.dense.weight": (5e-6 * 5, 0.01),
        "meter.text_model.embeddings.LayerNorm.weight": (5e-6, 0.0),
    }
    for name, expected in wanted.items():
        assert rates[id(model.get_parameter(name))] == pytest.approx(expected)


def test_soft_scores():
    task, labels = task_named("vqa"), {"red": 0, "blue": 1}
    assert task.scores(["red"], labels).tolist() == [1, 0]
    assert task.scores(["red"] * 2 + ["blue"] * 7 + ["pink"], labels).tolist() == pytest.approx([2 / 3, 1])
    assert task.scores(["pink"], labels).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"task": "captioning"}, "unknown task 'captioning'"),
        ({"data": "nothing.jsonl"}, "no such data file"),
        ({"model": "nothing/here"}, "no model at"),
        ({"teacher": "model"}, "names other classes"),
        ({"spec": "pumer(layers=(7,))"}, r"layers 0 to 4; got layers=\(7,\); layers=\(2,\) fit"),
        ({"spec": "pumer(prune=2)"}, "prune must be a share"),
    ],
)
def test_impossible_trainings_are_refused_before_they_start(folder, change, said, tmp_path):
    given = {"task": "vqa", "model": "model", "data": "train.jsonl", "spec": SPEC, "teacher": None, **change}
    places = {key: given[key] and str(folder / given[key]) for key in ("model", "data", "teacher")}
    with pytest.raises(ValueError, match=said):
        train_pumer(given["task"], output=tmp_path, spec=given["spec"], recipe=QUICK, **places)


@pytest.mark.parametrize(
    ("line", "said"),
    [("not json", "line 1: not a JSON object"), ('{"image": "a.png"}', "no column 'question'"), ("", "no records")],
)
def test_bad_records(line, said, tmp_path):
    (tmp_path / "data.jsonl").write_text(line)
    with pytest.raises(ValueError, match=said):
        read_records(str(tmp_path / "data.jsonl"), task_named("vqa"))


@pytest.mark.parametrize("setting", [{"precision": "fp8"}, {"rate": 0.0}, {"warmup": 1.0}, {"epochs": -1}])
def test_bad_settings(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        Recipe(**setting)


def test_meter_losses():
    model, inputs = meter(), batch(rows=2)
    hard = model(**inputs, labels=torch.tensor([1, 2])).loss
    soft = model(**inputs, labels=torch.eye(5)[[1, 2]]).loss
    assert hard.isfinite()
    assert soft.isfinite()
    assert hard != soft


def test_records_are_lines_of_utf8(tmp_path):
    file, record = tmp_path / "records.jsonl", {"image": "a.png", "question": "one\u2028or two?", "answer": "two"}
    file.write_text("\ufeff" + json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")
    (read,) = read_records(str(file), task_named("vqa"))
    assert read["question"] == record["question"]
    for content, message in (
        (b"\xff\xfe{}", "not UTF-8 text .* at byte 0"),
        (b"[" * 99999, "line 1: not a JSON object"),
    ):
        file.write_bytes(content)
        with pytest.raises(tokensieve.Refusal, match=message):
            read_records(str(file), task_named("vqa"))
