"""Several processes share a comparison, here as threads that meet where processes would: rows as of one process."""

import copy
import pickle
import sys
import threading
import warnings

import pytest
import torch

from tokensieve import Refusal
from tokensieve.errors import MissingExtra, OutputError
from tokensieve.evaluate import Processes, compare


class Thread(Processes):
    """One of several processes, as a thread."""

    def __init__(self, rank, count, barrier, items):
        super().__init__(rank, count)
        self.barrier, self.items = barrier, items

    def _gather(self, item):
        self.items[self.rank] = pickle.dumps(item)
        self.barrier.wait(60)  # a broken barrier is a RuntimeError, as the end of a process is
        items = [pickle.loads(other) for other in self.items]
        self.barrier.wait(60)
        return items


@pytest.fixture
def share(model, processor, samples, tmp_path):
    """``share(count, prepare)`` compares in so many threads; returns the results or the error of each."""

    def share(count, prepare=lambda rank, model: {}, **changes):
        barrier, items, outcomes = threading.Barrier(count), [None] * count, [None] * count
        options = {
            "output": tmp_path / f"out{count}",
            "batch_size": 2,
            "max_new_tokens": 2,
            "measure": False,
            "seeds": 1,
        }

        def process(rank):
            own = copy.deepcopy(model)
            changed = {"samples": samples, "seeds": 1} | changes | prepare(rank, own)
            shown = changed.pop("samples")
            methods = changed.pop("methods", ["vtc-cls", "random"])
            try:
                processes = Thread(rank, count, barrier, items)
                outcomes[rank] = compare(own, processor, shown, methods, [9], processes=processes, **options | changed)
            except BaseException as error:
                outcomes[rank] = error
                if not isinstance(error, Refusal):  # the end of a process
                    barrier.abort()

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            threads = [threading.Thread(target=process, args=(rank,)) for rank in range(count)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(120)
        return outcomes

    return share


def lines(folder):
    return sorted((folder / "predictions.jsonl").read_text().splitlines())


@pytest.mark.parametrize("count", [2, 3, 7])
def test_the_rows_are_those_of_one_process(share, tmp_path, count):
    (one,) = share(1)
    results = share(count)
    for other in results:
        assert (other.rows, other.scores, other.questions) == (one.rows, one.scores, one.questions)
    assert lines(tmp_path / f"out{count}") == lines(tmp_path / "out1")


def test_each_process_answers_a_part(share):
    answered = [[], []]

    def count_prompts(rank, model):
        generate = model.generate
        model.generate = lambda **inputs: (answered[rank].append(len(inputs["input_ids"])), generate(**inputs))[1]
        return {}

    share(2, count_prompts, methods=["vtc-cls"], referee=False)
    assert [sum(sizes) for sizes in answered] == [2 * 6, 2 * 4]  # ten questions in batches of two, twice


def test_memory_that_runs_out_in_one_process_makes_the_batches_of_all_smaller(share, tmp_path):
    sizes = [[], []]

    def little_memory(rank, model):
        generate = model.generate

        def limited(**inputs):
            sizes[rank].append(len(inputs["input_ids"]))
            if rank == 1 and sizes[rank][-1] > 1:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return generate(**inputs)

        model.generate = limited
        return {}

    (one,) = share(1, batch_size=4, referee=False)
    for results in share(2, little_memory, batch_size=4, referee=False):
        assert results.rows == one.rows
    assert max(sizes[0][1:]) == 1
    assert lines(tmp_path / "out2") == lines(tmp_path / "out1")


@pytest.mark.parametrize("damaged", range(4))
def test_a_damaged_image_is_skipped_by_all(share, samples, tmp_path, damaged):
    image = tmp_path / f"{damaged}.png"
    image.write_bytes(image.read_bytes()[:1000])
    (one,) = share(1, examples=0)
    for results in share(2, examples=0):
        assert (results.rows, results.skipped) == (one.rows, one.skipped)
    assert len(one.skipped) in (2, 3)
    assert lines(tmp_path / "out2") == lines(tmp_path / "out1")


def test_a_mistake_of_one_process_ends_all(share, samples):
    other_data = share(2, lambda rank, model: {"samples": samples[: 10 - rank]})
    assert {str(error) for error in other_data} == {"the processes do not compare the same model on the same data"}

    def change(rank, model):
        if rank:
            next(model.parameters()).data += 1
        return {}

    weights = share(2, change)
    assert {str(error) for error in weights} == {"the processes do not compare the same model on the same data"}


def test_a_refusal_in_mid_run_ends_all_and_keeps_the_answers(share, tmp_path):
    def refuse(rank, model):
        generate, calls = model.generate, []

        def refusing(**inputs):
            calls.append(1)
            if rank == 1 and len(calls) > 1:
                raise Refusal("no such grid")
            return generate(**inputs)

        model.generate = refusing
        return {}

    errors = share(2, refuse)
    assert [type(error) for error in errors] == [Refusal, Refusal]
    assert str(errors[0]) == str(errors[1])
    assert "no such grid; the answers so far are kept" in str(errors[0])
    assert len(lines(tmp_path / "out2")) == 1 + 2 * 2 + 2  # header, the first round of both, the second of one


def test_a_bug_in_one_process_is_noticed_by_the_others(share, tmp_path):
    def fail(rank, model):
        if rank == 1:
            model.generate = lambda **inputs: 1 / 0
        return {}

    first, second = share(2, fail)
    assert isinstance(second, ZeroDivisionError)
    assert isinstance(first, Refusal)
    (one,) = share(1)
    for results in share(2):  # and the folder is free for the next call
        assert results.rows == one.rows


def test_a_folder_in_use_is_refused_in_all(share, tmp_path):
    from tokensieve.evaluate.lock import locked

    with locked(tmp_path / "out2"):
        errors = share(2)
    assert all("another comparison writes to" in str(error) for error in errors)
    assert isinstance(errors[0], OutputError)


def test_without_a_launcher_there_is_one_process(monkeypatch):
    Processes.launched.__func__.cache_clear()
    alone = Processes.launched()
    assert (alone.rank, alone.count, alone.first) == (0, 1, True)
    assert alone.exchange(3) == [3]
    with pytest.raises(Refusal, match=r"^no$"), alone.together():
        raise Refusal("no")


def test_several_processes_need_accelerate(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    Processes.launched.__func__.cache_clear()
    with pytest.raises(
        MissingExtra, match=r'several processes need accelerate: in the checkout, pip install -e "\.\[train\]"'
    ):
        Processes.launched()
