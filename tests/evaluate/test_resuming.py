"""A comparison that was ended anywhere gives, when it is continued, the results of one that was not."""

import random

import pytest

from tokensieve import Refusal
from tokensieve.errors import OutputError
from tokensieve.evaluate import Results, compare, load_data


@pytest.fixture
def run(model, processor, samples, tmp_path):
    def run(**changes):
        options = {"output": tmp_path / "out", "batch_size": 4, "max_new_tokens": 2, "measure": False, "seeds": 2}
        return compare(model, processor, changes.pop("samples", samples), ["random", "pool"], [9], **options | changes)

    return run


def facts(results):
    """All of the results but the date."""
    return results.rows, results.questions, results.scores, results.skipped, results.settings, results.examples


@pytest.mark.filterwarnings("ignore:.*questions skipped")
@pytest.mark.parametrize("seed", range(12))
def test_killed_at_any_byte(run, write, samples, tmp_path, seed):
    """A killed process leaves a prefix of the journal, cut anywhere, and perhaps the results of some rows."""
    content = (tmp_path / "3.png").read_bytes()
    (tmp_path / "3.png").write_bytes(content[: len(content) // 2])
    whole = run(output=tmp_path / "whole", examples=2)
    journal = (tmp_path / "whole" / "predictions.jsonl").read_bytes()
    (tmp_path / "out").mkdir()
    cut = random.Random(seed).randrange(len(journal))
    (tmp_path / "out" / "predictions.jsonl").write_bytes(journal[:cut])
    if seed % 2:  # and another call is killed while it goes on
        stop = random.Random(seed + 100).randrange(1, 40)

        def kill(done, total, label):
            if done >= stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(examples=2, progress=kill)
    assert facts(run(examples=2)) == facts(whole)
    lines = (tmp_path / "out" / "predictions.jsonl").read_bytes().splitlines()
    assert sorted(lines) == sorted(journal.splitlines())


@pytest.mark.parametrize("content", ['{"version": 1}', "no results", '{"version": 99, "rows": []}', ""])
def test_results_of_another_version_are_replaced(run, tmp_path, content):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.json").write_text(content)
    results = run()
    assert Results.load(tmp_path / "out" / "results.json") == results


def test_changed_questions_get_new_answers_and_changed_references_do_not(run, write, samples, tmp_path):
    run()
    journal = tmp_path / "out" / "predictions.jsonl"
    lines = journal.read_text().splitlines()
    text = (tmp_path / "data.jsonl").read_text()
    (tmp_path / "data.jsonl").write_text(text.replace('"answer": "red"', '"answer": "blue"'))
    run(samples=load_data(tmp_path / "data.jsonl"))
    assert journal.read_text().splitlines() == lines
    (tmp_path / "data.jsonl").write_text(text.replace("is there a star?", "is there a moon?", 1))
    run(samples=load_data(tmp_path / "data.jsonl"))
    new = journal.read_text().splitlines()[len(lines) :]
    assert len(new) == 5  # one question: full, two seeds of random, pool, blind
    assert all('"sample": "2 ' in line for line in new)


@pytest.mark.parametrize("error", [OSError(30, "Read-only file system"), OSError(28, "No space left on device")])
def test_a_disk_that_fails_in_mid_run_is_one_line_and_the_run_continues(run, tmp_path, monkeypatch, error):
    whole = run(output=tmp_path / "whole")
    from tokensieve.evaluate.journal import Journal

    append, calls = Journal._append, []

    def failing(self, lines):
        calls.append(lines)
        if len(calls) == 5:
            with self.path.open("ab") as file:  # a part of the line is on the disk
                file.write(b'{"run": "random')
            raise OutputError(f"cannot write {self.path}: {error.strerror}")
        append(self, lines)

    with monkeypatch.context() as disk:
        disk.setattr(Journal, "_append", failing)
        with pytest.raises(Refusal, match=error.strerror):
            run()
    assert facts(run()) == facts(whole)
