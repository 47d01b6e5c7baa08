"""The comparison from end to end: rows, resuming, and what goes wrong on the way."""

import importlib
import json
import sys
from dataclasses import dataclass, fields, replace

import pytest
import torch
from PIL import Image

import tokensieve
from tests.support.clocks import Cpu, Ticking
from tokensieve import Method, attach, reference
from tokensieve.evaluate import (
    METRICS,
    DataError,
    OutputError,
    Results,
    ResumeError,
    Row,
    compare,
    decode,
    encode,
    wilson,
)
from tokensieve.evaluate.compare import Comparison
from tokensieve.evaluate.plan import Settings
from tokensieve.evaluate.provenance import code_digest, model_identity, model_name, sample_key
from tokensieve.measure import measure_costs

PINNED = (
    "method, keep, tokens_before, tokens_after, tokens_average, samples, accuracy, accuracy_low, accuracy_high, "
    "flops_ratio, prefill_ms, prefill_speedup, method_ms, decode_ms_per_token, peak_activation_mb, kv_mb"
)
TIMING = (
    "prefill_ms_low, prefill_ms_high, prefill_speedup_low, prefill_speedup_high, method_ms_low, method_ms_high, "
    "decode_ms_per_token_low, decode_ms_per_token_high, decode_speedup, decode_speedup_low, decode_speedup_high, "
    "break_even_tokens, break_even_low, break_even_high, break_even, timing_note"
)
METHODS = ["vtc-cls", "random", "pool"]
MODULE = sys.modules["tokensieve.evaluate.costs"]


@pytest.fixture
def run(model, processor, samples, tmp_path, monkeypatch):
    """``run(…)`` compares and returns (rows, batches that were generated)."""
    calls = []
    generate = type(model).generate
    monkeypatch.setattr(type(model), "generate", lambda *args, **kw: (calls.append(1), generate(*args, **kw))[1])

    def run(methods=METHODS, keeps=(9,), **changes):
        options = {"output": tmp_path / "out", "batch_size": 4, "max_new_tokens": 2, "measure": False, "referee": False}
        options |= changes
        calls.clear()
        results = compare(model, processor, options.pop("samples", samples), methods, list(keeps), **options)
        assert Results.load(options["output"] / "results.json") == results
        return list(results.rows), len(calls)

    return run


@pytest.fixture
def sessions(monkeypatch):
    """The methods of each session of measurements, on a clock that ticks; no call is timed for real."""
    sessions = []

    def measured(model, inputs, methods, **options):
        sessions.append([str(method) for method in methods])
        return measure_costs(model, inputs, methods, **options, repeats=5, warmup=0, clock=Ticking(), read=Cpu())

    monkeypatch.setattr(MODULE, "measure_costs", measured)
    return sessions


def alone(model, processor, sample, spec, tokens=2):
    """Answer one question by itself, with only ``attach`` of Tokensieve."""
    inputs = encode(processor, [sample])
    with attach(model, spec, processor=processor), torch.no_grad():
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=tokens)
    return decode(processor, ids, inputs["input_ids"].shape[1])[0]


def test_the_fields_of_a_row_are_the_pinned_ones():
    expected = f"{PINNED}, {TIMING}".split(", ")
    assert [field.name for field in fields(Row)][: len(expected)] == expected


def test_rows_score_the_answers_to_each_question_alone(run, model, processor, samples):
    accepted = [{alone(model, processor, s, "full")} for s in samples]
    assert len(set.union(*accepted)) > 2
    for i, sample in enumerate(samples[:6]):  # makes some answers of the methods right
        spec = "vtc-cls(keep=9)" if i < 4 else "random(keep=9, seed=1)"
        accepted[i].add(alone(model, processor, sample, spec))
    answered = [replace(s, answers=tuple(answers)) for s, answers in zip(samples, accepted, strict=True)]
    rows, _ = run(samples=answered)
    assert [(row.method, row.keep) for row in rows] == [("full", None), ("vtc-cls", 9), ("random", 9), ("pool", 9)]
    full, vtc, random, _ = rows
    # ten questions about four images, all right: at worst as good as independent questions fewer by Kish's 26 / 10
    assert (full.accuracy, full.accuracy_low, full.accuracy_high) == pytest.approx((1, *wilson(100 / 26, 100 / 26)))
    assert full.tokens_after == 144
    assert vtc.tokens_before == 144
    assert vtc.tokens_after == vtc.tokens_average == 9

    def right(spec):
        return sum(METRICS["exact"](alone(model, processor, s, spec), s.answers) for s in answered) / len(answered)

    assert 0 < vtc.accuracy < 1
    assert vtc.accuracy == right("vtc-cls(keep=9)")
    seeds = [right(f"random(keep=9, seed={seed})") for seed in range(5)]
    assert random.accuracy == pytest.approx(sum(seeds) / 5)
    assert random.accuracy_low < random.accuracy < random.accuracy_high
    assert vtc.prefill_ms is None


def test_results_hold_types_differences_and_examples(run, samples, tmp_path):
    rows, _ = run(examples=3)
    results = Results.load(tmp_path / "out" / "results.json")
    assert results.complete
    assert list(results.rows) == rows
    assert [row.to_json() for row in rows] == json.loads(json.dumps([row.to_json() for row in rows]))
    assert [[(score.type, score.samples) for score in row.types] for row in rows] == [[("even", 5), ("odd", 5)]] * 4
    assert rows[0].difference is None
    for row in rows[1:]:
        assert sum(score.accuracy for score in row.types) / 2 == pytest.approx(row.accuracy)
        assert row.difference == pytest.approx(row.accuracy - rows[0].accuracy)
        assert row.difference_low < row.difference < row.difference_high
        assert sum(score.difference for score in row.types) / 2 == pytest.approx(row.difference)
        assert results.paired(row, rows[0]).difference == row.difference
    assert [row.random is None for row in rows] == [True, False, True, False]  # full, vtc-cls, random, pool
    for row in (rows[1], rows[3]):
        assert (row.random.tokens, row.random.accuracy) == (9, rows[2].accuracy)
        assert row.random.difference == pytest.approx(row.accuracy - rows[2].accuracy)
    assert [question.cluster for question in results.questions] == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    assert [len(seeds) for seeds in results.scores] == [1, 1, 5, 1]
    assert len(results.examples) == 3
    for example in results.examples:
        assert Image.open(tmp_path / "out" / example.image).size[0] == 90
        assert [(kept["method"], kept["keep"]) for kept in example.kept] == [(row.method, row.keep) for row in rows]
        assert [len(kept["reductions"][0]["anchors"]) for kept in example.kept] == [144, 9, 9, 9]
    assert results.settings["samples"] == 10
    assert str(tmp_path) not in (tmp_path / "out" / "results.json").read_text()


def test_yes_no_refuses_answers_that_are_neither(run, samples):
    """Every text without a no counts as a yes, so "two" for "red" would be right."""
    with pytest.raises(
        DataError, match=r"data\.jsonl, line 1: the metric yes_no needs the answer yes or no; got 'red'"
    ):
        run(["pool"], metric="yes_no")
    said = ("yes", "No.", "Yes, two", "there is not")
    asked = [replace(sample, answers=(answer,)) for sample, answer in zip(samples, said, strict=False)]
    assert run(["pool"], metric="yes_no", samples=asked)[0][0].samples == 4


@pytest.mark.parametrize(
    ("name", "where", "foreign"),
    [
        (str(reference.path()), "data.jsonl, line 1", True),
        (str(reference.path()), "", False),
        ("other/model", "x", False),
    ],
)
def test_results_of_the_bundled_model_on_a_users_file_are_marked(
    name, where, foreign, run, model, samples, tmp_path, monkeypatch
):
    """The report is read without the terminal, where a note says the same."""
    monkeypatch.setattr(model.config, "name_or_path", name, raising=False)
    run(["pool"], samples=[replace(sample, where=where) for sample in samples[:2]])
    settings = Results.load(tmp_path / "out" / "results.json").settings
    assert settings.get("foreign_images", False) == foreign


def test_an_interrupted_run_continues_where_it_was(run, tmp_path):
    whole, batches = run(output=tmp_path / "whole")
    assert batches == 8 * 3  # full, vtc-cls, five seeds, pool; three batches each

    def interrupt(done, total, label):
        assert total == 80
        if done >= 28:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(progress=interrupt)
    early = Results.load(tmp_path / "out" / "results.json")
    assert not early.complete
    # random has not run yet
    assert list(early.rows) == [replace(row, random=None, referee=None) for row in whole[:2]]

    progress = []
    rows, again = run(progress=lambda done, total, label: progress.append(done))
    assert rows == whole
    assert again == 24 - (3 + 3 + 2)  # full, vtc-cls and two batches of the first seed were there
    assert progress[-1] == 80
    assert run() == (whole, 0)


def test_answers_are_used_again_wherever_they_are_the_same(run, samples):
    run(samples=samples[:4])
    assert run(samples=samples[:4], metric="contains", seeds=2, methods=["random", "vtc-cls"])[1] == 0
    assert run(samples=samples[:4], methods=["vtc-cls(keep=8)"])[1] == 1
    changed = replace(samples[3], question="is it red?")
    _, batches = run(samples=[*samples[:3], changed], methods=[], keeps=[])
    assert batches == 1
    _, batches = run(samples=samples, methods=["vtc-cls"])
    assert 2 <= batches <= 6


def test_another_model_or_prompt_is_refused(run, model):
    run(methods=[])
    with pytest.raises(ResumeError, match=r"\(prompt differ\)"):
        run(methods=[], prompt="{question} is it red?")
    weight = next(model.parameters())
    weight.data += 1
    try:
        with pytest.raises(ResumeError, match=r"\(weights differ\)"):
            run(methods=[])
    finally:
        weight.data -= 1


def test_a_full_disk_on_the_results_keeps_the_predictions(run, tmp_path, monkeypatch):
    def no_space(self, *args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full_disk:
        full_disk.setattr("pathlib.Path.write_text", no_space)
        with pytest.raises(
            OutputError, match=r"cannot write .*results\.json: No space left on device; the predictions"
        ):
            run(methods=["pool"])
    assert run(methods=["pool"])[1] == 3  # full is there


def test_the_oracle_keeps_the_tokens_in_the_boxes(run, samples, tmp_path):
    rows, _ = run(samples=[replace(samples[0], boxes=((0, 0, 8, 5),))], methods=["pool"], keeps=[1, 16])
    assert [(row.method, row.keep, row.tokens_after) for row in rows[3:]] == [("oracle", 1, 1), ("oracle", 16, 16)]
    kept = Results.load(tmp_path / "out" / "results.json").examples[0].kept
    assert kept[3]["reductions"][0]["anchors"] == [0]
    assert "oracle" in kept[3]["reductions"][0]["notes"][0]


def test_the_oracle_looks_into_the_last_of_several_images(run, samples, tmp_path):
    two = replace(samples[0], image=(samples[1].image, samples[0].image), boxes=((0, 0, 8, 5),), id="two")
    rows, _ = run(samples=[two, samples[2]], methods=["pool"], keeps=[1])
    assert [(row.method, row.tokens_after) for row in rows[2:]] == [("oracle", 1.5)]
    (joined,) = Results.load(tmp_path / "out" / "results.json").examples[0].kept[2]["reductions"]
    assert joined["anchors"] == [72, 144]  # the middle of the first image, the corner of the second


def test_the_oracle_has_the_positions_of_the_other_rows(model, processor, samples, tmp_path, monkeypatch):
    positions = []

    def attach(*arguments, **options):
        positions.append(options["positions"])
        return tokensieve.attach(*arguments, **options)

    monkeypatch.setattr(importlib.import_module("tokensieve.evaluate.answer"), "attach", attach)
    settings = Settings(measure=False, referee=False, max_new_tokens=1, positions="contiguous")
    boxed = [replace(samples[0], boxes=((0, 0, 8, 5),))]
    Comparison(model, processor, boxed, settings).run(["pool"], [4], tmp_path / "out")
    assert positions.count("contiguous") == len(positions) > 2


def test_measured_rows_are_full_of_numbers_and_measured_once(run, sessions):
    rows, _ = run(methods=["uniform", "downsample"], measure=True)
    full, uniform, downsample = rows
    assert full.flops_ratio == full.prefill_speedup == full.decode_speedup == 1
    assert full.method_ms is full.break_even is None
    assert uniform.kv_mb < full.kv_mb
    assert 0 < downsample.flops_ratio < uniform.flops_ratio < 1
    assert uniform.method_ms is not None
    assert uniform.method_ms_low <= uniform.method_ms <= uniform.method_ms_high
    assert downsample.method_ms is downsample.method_ms_low is None
    for row in rows:
        assert min(row.prefill_ms, row.prefill_speedup, row.decode_ms_per_token, row.peak_activation_mb) > 0
        assert row.prefill_ms * row.prefill_speedup == pytest.approx(full.prefill_ms)
        assert row.decode_ms_per_token * row.decode_speedup == pytest.approx(full.decode_ms_per_token)
        assert row.prefill_speedup_low <= row.prefill_speedup <= row.prefill_speedup_high
    assert uniform.break_even == "not told apart"  # every call takes one tick
    assert run(methods=["uniform", "downsample"], measure=True) == (rows, 0)
    assert len(sessions) == 1


def test_rows_of_two_sessions_are_never_mixed(run, sessions, samples, tmp_path):
    few = {"samples": samples[:4], "measure": True}
    run(methods=["uniform"], **few)
    more, _ = run(methods=["uniform", "pool"], **few)
    assert [len(session) for session in sessions] == [1, 2], "a new row is measured together with the old ones"
    fewer, batches = run(methods=["pool"], **few)
    plain = [replace(row, referee=None) for row in (more[0], more[2])]  # the referee sees other rows beside them
    assert ([replace(row, referee=None) for row in fewer], batches, len(sessions)) == (plain, 0, 2)
    run(methods=["pool"], samples=samples[1:4], measure=True)
    assert len(sessions) == 3, "another prompt is measured anew"
    lines = (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()
    assert sum('"cost"' in line for line in lines) == 3


def test_costs_come_after_the_answers_and_an_interruption_keeps_those(run, sessions, tmp_path, monkeypatch):
    with monkeypatch.context() as interrupted:

        def interrupt(*args, **options):
            raise KeyboardInterrupt

        interrupted.setattr(MODULE, "measure_costs", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(methods=["uniform"], measure=True)
    early = Results.load(tmp_path / "out" / "results.json")
    assert not early.complete
    assert [(row.method, row.prefill_ms) for row in early.rows] == [("full", None), ("uniform", None)]
    labels = []
    rows, _ = run(methods=["uniform"], measure=True, progress=lambda done, total, label: labels.append(label))
    assert labels[-1] == "timing"
    assert rows[1].prefill_ms is not None
    results = Results.load(tmp_path / "out" / "results.json")
    assert (results.complete, list(results.rows)) == (True, rows)


def test_the_oracle_is_measured_as_a_replay(run, sessions, samples):
    rows, _ = run(samples=[replace(samples[0], boxes=((0, 0, 8, 5),))], methods=["pool"], keeps=[16], measure=True)
    full, pool, oracle = rows
    assert oracle.method == "oracle"
    assert oracle.kv_mb == pool.kv_mb < full.kv_mb
    assert oracle.prefill_ms * oracle.prefill_speedup == pytest.approx(full.prefill_ms)
    assert oracle.method_ms is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ["vtc-clss"]}, "did you mean vtc-cls"),
        ({"metric": "exactly"}, "unknown metric 'exactly'; did you mean exact"),
        ({"samples": []}, "no samples"),
        ({"batch_size": 0}, "batch_size must be 'auto' or a number of at least 1; got 0"),
        ({"prompt": "what?"}, "the prompt must contain {question}"),
        ({"keeps": [0]}, "keep must be"),
        ({"methods": ["vtc-cls(first_layer=7)"]}, "no encoder layer"),
    ],
)
def test_mistakes_are_found_before_anything_runs(run, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(**changes)
    assert not (tmp_path / "out").exists()


def test_budgets_may_mean_the_average_over_the_layers(run, samples, tmp_path):
    for keep_means, average in (("final", 122), ("average", 100)):
        output = tmp_path / keep_means
        rows, _ = run(["fastv(layer=1)"], [100], keep_means=keep_means, samples=samples[:1], output=output)
        assert (rows[1].keep, rows[1].tokens_average) == (100, average)
        assert Results.load(output / "results.json").settings["keep_means"] == keep_means


def test_a_bug_in_a_method_keeps_its_type_and_the_answers(run, registry, tmp_path):
    @registry.register("buggy", paper="none")
    @dataclass(frozen=True)
    class Buggy(Method):
        def reduce(self, image):
            b, n = image.features.shape  # noqa: RUF059

    with pytest.raises(ValueError, match="too many values to unpack") as caught:
        run(["buggy"])
    assert type(caught.value) is ValueError
    results = Results.load(tmp_path / "out" / "results.json")
    assert (results.complete, [row.method for row in results.rows]) == (False, ["full"])
    assert run(["pool"])[1] == 3  # the answers of full are there


def test_a_model_in_training_mode_is_refused(run, model):
    model.train()
    try:
        with pytest.raises(ValueError, match="training mode"):
            run()
    finally:
        model.eval()


def test_identities(model, samples, write, tmp_path):
    same = model_identity(model)
    assert same == model_identity(model)
    assert len({sample_key(sample) for sample in samples}) == len(samples)
    assert sample_key(samples[0]) != sample_key(replace(samples[0], question="is it red?"))
    (tmp_path / "0.png").write_bytes((tmp_path / "1.png").read_bytes())
    assert sample_key(samples[0]) not in {sample_key(s) for s in samples[1:]}
    # another image of the same name, size in bytes and time of change is noticed
    pixels, before = tmp_path / "2.bmp", []
    for colour in ("red", "blue"):
        Image.new("RGB", (9, 9), colour).save(pixels)
        before.append(sample_key(replace(samples[0], image=pixels)))
    assert before[0] != before[1]
    pixels.unlink()
    assert sample_key(replace(samples[0], image=pixels)) not in before  # opening it gives the error
    assert model_name(model) == "LlavaForConditionalGeneration"
    model.config.name_or_path = str(tmp_path)
    assert model_name(model) == tmp_path.name
    model.config.name_or_path = "someone/some-model"
    assert model_name(model) == "someone/some-model"
    model.config.name_or_path = ""


def test_answers_of_other_code_are_not_reused(run, monkeypatch):
    run(methods=["uniform"])
    monkeypatch.setattr(sys.modules["tokensieve.evaluate.provenance"], "code_digest", lambda: "edited")
    with pytest.raises(ResumeError, match=r"\(code differ\)"):
        run(methods=["uniform"])


def test_an_edit_of_what_answers_depend_on_changes_the_digest_of_the_code(tmp_path):
    for name in ("methods/own.py", "report/page.py", "tokens.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("old")
    digest = code_digest(tmp_path)
    (tmp_path / "report" / "page.py").write_text("new")
    assert code_digest(tmp_path) == digest
    for name in ("methods/own.py", "tokens.py"):
        (tmp_path / name).write_text("new")
        assert code_digest(tmp_path) != digest
        digest = code_digest(tmp_path)
    assert code_digest() == code_digest()
