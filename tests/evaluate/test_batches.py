"""Batches: smaller ones where memory runs out, larger ones where it allows, and equal answers with all of them."""

import json
import sys
import warnings
from dataclasses import dataclass

import pytest
import torch

from tokensieve import Method, Refusal
from tokensieve.evaluate import compare, encode
from tokensieve.evaluate.answer import AUTO, LARGEST, Answerer, in_order, is_out_of_memory
from tokensieve.evaluate.plan import Settings

ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 18432 bytes."),
    MemoryError(),
]


@pytest.fixture
def run(model, processor, samples, tmp_path):
    def run(methods=("vtc-cls",), **changes):
        options = {
            "output": tmp_path / "out",
            "batch_size": 8,
            "max_new_tokens": 2,
            "measure": False,
            "referee": False,
        } | changes
        return compare(model, processor, samples, list(methods), [9], **options)

    return run


@pytest.fixture
def memory(model, monkeypatch):
    """``memory(largest, error)`` lets ``generate`` fail on larger batches; returns the sizes that were tried."""
    generate, sizes = type(model).generate, []

    def memory(largest, error):
        def limited(self, **inputs):
            sizes.append(len(inputs["input_ids"]))
            if sizes[-1] > largest:
                raise error
            return generate(self, **inputs)

        monkeypatch.setattr(type(model), "generate", limited)
        return sizes

    return memory


def answers(folder):
    lines = (folder / "predictions.jsonl").read_text().splitlines()
    return sorted(lines)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: f"{type(error).__name__} {str(error)[:20]}")
def test_a_batch_that_does_not_fit_is_answered_in_parts(run, memory, tmp_path, error):
    whole = run(output=tmp_path / "whole")
    sizes = memory(3, error)
    with pytest.warns(UserWarning, match="memory") as notes:
        results = run()
    assert [str(note.message) for note in notes] == [
        "a batch of 8 questions does not fit into memory; continuing with 2"
    ]
    # full: 8 fails, 4 fails, and from then on it is known that 2 fit; the method starts with 2
    assert sizes == [8, 4, 2, 2, 2, 2, 2] + [2] * 5
    assert (results.rows, results.scores) == (whole.rows, whole.scores)
    assert answers(tmp_path / "out") == answers(tmp_path / "whole")


def test_one_question_that_does_not_fit_is_refused_and_the_others_kept(run, memory, samples, tmp_path):
    memory(0, MemoryError())
    with pytest.raises(Refusal, match=r"full: .*data\.jsonl, line \d+: one question alone does not fit into memory"):
        run(batch_size=1)


def test_other_errors_keep_their_traceback(run, memory):
    memory(0, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1"):
        run()
    assert not is_out_of_memory(RuntimeError("shape mismatch"))


def test_the_memory_of_a_failed_batch_is_free_before_the_next(run, memory, monkeypatch):
    alive = []
    sizes = memory(4, MemoryError())
    inputs = Answerer._batch_inputs

    def watched(self, batch):
        alive.append(len(self._inputs))
        return inputs(self, batch)

    monkeypatch.setattr(Answerer, "_batch_inputs", watched)
    with pytest.warns(UserWarning, match="continuing with 4"):
        run(methods=())
    assert sizes == [8, 4, 4, 2]
    assert alive == [0, 0, 1, 2]  # the inputs of the batch of 8 are gone


def test_any_batch_size_gives_the_same_answers(run, tmp_path):
    runs = {size: run(output=tmp_path / str(size), batch_size=size) for size in (1, 3, 16, "auto")}
    for size, results in runs.items():
        assert results.rows == runs[1].rows
        assert answers(tmp_path / str(size)) == answers(tmp_path / "1")


@pytest.fixture
def answerer(model, processor, samples):
    def answerer(size, device="cuda"):
        made = Answerer(model, processor, samples, Settings(batch_size=size), {})
        made._grows = size == "auto" and device != "cpu"
        return made

    return answerer


def test_automatic_batches_grow_until_memory_runs_out(answerer):
    growing = answerer("auto")
    sizes = [growing.size]
    for _ in range(3):
        growing.adapt([growing.size])
        sizes.append(growing.size)
    assert sizes == [AUTO, 2 * AUTO, 4 * AUTO, 8 * AUTO]
    with pytest.warns(UserWarning, match="continuing with 64"):
        growing.adapt([4 * AUTO, 8 * AUTO])  # of two processes one had too little memory
    growing.adapt([growing.size])
    assert growing.size == 4 * AUTO
    growing = answerer("auto")
    for _ in range(9):
        growing.adapt([growing.size])
    assert growing.size == LARGEST


def test_other_batches_do_not_grow(answerer):
    for fixed in (answerer(5), answerer("auto", "cpu")):
        size = fixed.size
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fixed.adapt([size])
        assert fixed.size == size


def test_a_method_that_refuses_one_image_names_it_and_loses_nothing(run, registry, model, processor, samples, tmp_path):
    pixels = encode(processor, samples[2:3])["pixel_values"]
    with torch.no_grad():
        refused = torch.stack(list(model.base_model.get_image_features(pixel_values=pixels).pooler_output))[0]

    @registry.register("picky", paper="none")
    @dataclass(frozen=True)
    class Picky(Method):
        def reduce(self, image):
            if any(torch.allclose(features, refused, atol=1e-4) for features in image.features):
                raise Refusal("this image has no edges")
            return image.keep(torch.arange(9).expand(image.features.shape[0], 9))

    with pytest.raises(Refusal) as caught:
        run(["picky"])
    line = str(caught.value)
    assert line.startswith("picky: ")
    assert "data.jsonl, line 3: this image has no edges; the answers so far are kept in " in line
    assert line.count("\n") == 0
    kept = [json.loads(text) for text in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()[1:]]
    ordered = [sample.id for sample in in_order(samples)]
    before = ordered.index("3")
    assert [k["sample"].split()[0] for k in kept if k["run"].startswith("picky")] == ordered[:before]
    assert len([k for k in kept if k["run"] == "full"]) == len(samples)


def test_an_empty_answer_is_an_answer(run, model, monkeypatch):
    texts = Answerer.texts
    monkeypatch.setattr(Answerer, "texts", lambda self, inputs: ["" for _ in texts(self, inputs)])
    results = run()
    assert [row.accuracy for row in results.rows] == [0, 0]
    monkeypatch.undo()
    assert run() == results  # and is not asked for again


def test_ids_that_are_used_twice_are_refused(run, model, processor, samples, tmp_path):
    with pytest.raises(Refusal, match="the id '1' is used twice"):
        compare(model, processor, [*samples, samples[0]], [], [], output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: f"{type(error).__name__} {str(error)[:20]}")
def test_costs_that_do_not_fit_are_refused_in_one_line_and_the_answers_stay(run, monkeypatch, error):
    def measure_costs(*args, **options):
        raise error

    monkeypatch.setattr(sys.modules["tokensieve.evaluate.costs"], "measure_costs", measure_costs)
    with pytest.raises(Refusal, match=r"memory ran out while the costs .*--no-measure"):
        run(measure=True)
    assert run().complete
