"""The journal: lines that survive a crash, a full disk and a changed set-up."""

import json
import resource

import pytest

from tokensieve.evaluate import OutputError, ResumeError
from tokensieve.evaluate.journal import Answer, Journal
from tokensieve.evaluate.results import Skipped

SETUP = {"model": "m", "prompt": "{question}"}
FIRST = Answer("1 aa", "red", 144, 16, 16.0, (12, 12), {"total": 144, "anchors": [3]})
SECOND = Answer("2 bb", "grün", 144, 16, 48.5)


def test_everything_is_read_back(tmp_path):
    journal = Journal(tmp_path / "new" / "folder", SETUP)
    journal.add("uniform", [FIRST])
    journal.add("uniform", [SECOND])
    journal.add_cost("uniform", {"flops": 3})
    again = Journal(tmp_path / "new" / "folder", SETUP)
    assert again.answers == journal.answers == {"uniform": {"1 aa": FIRST, "2 bb": SECOND}}
    assert again.costs == {"uniform": {"flops": 3}}


@pytest.mark.parametrize("cut", [1, 20])
def test_an_incomplete_line_is_cut_off_and_the_others_kept(tmp_path, cut):
    journal = Journal(tmp_path, SETUP)
    journal.add("uniform", [FIRST, SECOND])
    whole = journal.path.read_bytes()
    journal.path.write_bytes(whole[:-cut])
    again = Journal(tmp_path, SETUP)
    assert again.answers == {"uniform": {"1 aa": FIRST}}
    again.add("uniform", [SECOND])
    assert again.path.read_bytes() == whole


def test_an_incomplete_header_starts_anew(tmp_path):
    Journal(tmp_path, SETUP).path.write_bytes(b'{"setup": {"mo')
    assert Journal(tmp_path, SETUP).answers == {}
    assert Journal(tmp_path, SETUP).setup == {"format": 2} | SETUP


def test_another_setup_is_refused_and_named(tmp_path):
    journal = Journal(tmp_path, SETUP)
    before = journal.path.read_bytes()
    with pytest.raises(ResumeError, match=r"another set-up \(prompt, seed differ\).*choose another output folder"):
        Journal(tmp_path, {"model": "m", "prompt": "x", "seed": 1})
    assert journal.path.read_bytes() == before


@pytest.mark.parametrize("content", ["hello\n", "[1]\n", '{"a": 1}\n'])
def test_a_file_of_something_else_is_refused_and_kept(tmp_path, content):
    (tmp_path / "predictions.jsonl").write_text(content + "unfinished")
    with pytest.raises(ResumeError, match="is not a file of predictions"):
        Journal(tmp_path, SETUP)
    assert (tmp_path / "predictions.jsonl").read_text() == content + "unfinished"


def test_a_damaged_line_is_named(tmp_path):
    journal = Journal(tmp_path, SETUP)
    with journal.path.open("a") as file:
        file.write(json.dumps({"run": "uniform", "colour": 1}) + "\n")
    with pytest.raises(ResumeError, match="line 2: cannot be read"):
        Journal(tmp_path, SETUP)


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot use the output folder .*: "):
        Journal(tmp_path / "file", SETUP)


def test_a_full_disk_keeps_the_lines_before(tmp_path):
    journal = Journal(tmp_path, SETUP)
    journal.add("uniform", [FIRST])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (journal.path.stat().st_size + 10, hard))  # room for 10 more bytes
    try:
        with pytest.raises(OutputError, match="what was written before is kept"):
            journal.add("uniform", [SECOND])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    again = Journal(tmp_path, SETUP)
    assert again.answers == {"uniform": {"1 aa": FIRST}}
    again.add("uniform", [SECOND])
    assert len(Journal(tmp_path, SETUP).answers["uniform"]) == 2


def test_skipped_samples_are_read_back(tmp_path):
    journal = Journal(tmp_path, SETUP)
    journal.skip({"3 cc": Skipped("3", "data.jsonl, line 3", "3.png: grün")})
    journal.skip({})
    assert Journal(tmp_path, SETUP).skipped == {"3 cc": Skipped("3", "data.jsonl, line 3", "3.png: grün")}


def test_a_file_of_another_format_is_refused(tmp_path):
    (tmp_path / "predictions.jsonl").write_text(json.dumps({"setup": SETUP}) + "\n")
    with pytest.raises(ResumeError, match=r"another set-up \(format differ\)"):
        Journal(tmp_path, SETUP)


def test_a_copy_of_another_process_writes_nothing(tmp_path):
    journal = Journal(tmp_path, SETUP)
    journal.writes = False
    journal.add("uniform", [FIRST])
    journal.skip({"3 cc": Skipped("3", "", "")})
    assert "uniform" in journal.answers
    assert Journal(tmp_path, SETUP).answers == Journal(tmp_path, SETUP).skipped == {}


@pytest.mark.parametrize("garbage", [b"\0" * 40, b"\xff\xfe\x00{", b'{"run": "uniform", "sample": "\xc3'])
def test_garbage_at_the_end_is_cut_off(tmp_path, garbage):
    journal = Journal(tmp_path, SETUP)
    journal.add("uniform", [FIRST])
    whole = journal.path.read_bytes()
    journal.path.write_bytes(whole + garbage)
    assert Journal(tmp_path, SETUP).answers == {"uniform": {"1 aa": FIRST}}
    assert journal.path.read_bytes() == whole


@pytest.mark.parametrize("garbage", [b"\0" * 40, b"\xff\xfe\x00{", b"[" * 100_000, b"3", b"[]", b'{"skipped": []}'])
def test_garbage_in_the_middle_is_named(tmp_path, garbage):
    journal = Journal(tmp_path, SETUP)
    whole = journal.path.read_bytes()
    journal.path.write_bytes(whole + garbage + b"\n")
    before = journal.path.read_bytes()
    with pytest.raises(ResumeError, match=r"predictions\.jsonl, line 2: cannot be read; delete the line or the file"):
        Journal(tmp_path, SETUP)
    assert journal.path.read_bytes() == before
