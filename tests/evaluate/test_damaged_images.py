"""Images that cannot be read: their questions are skipped in every row, counted, listed and remembered."""

import json
from dataclasses import replace

import pytest
from PIL import Image

from tokensieve.evaluate import DataError, Results, Skipped, compare, load_data
from tokensieve.evaluate.compare import skipped_note

METHODS = ["vtc-cls", "random"]


@pytest.fixture
def data(write, tmp_path):
    """``data(*damaged)``: eight questions about four images, of which the numbered ones are cut off."""
    rows = [{"image": f"{i % 4}.png", "question": f"is it red {'now ' * (i % 4)}?", "answer": "red"} for i in range(8)]

    def data(*damaged):
        path = write(rows)
        for number in damaged:
            cut(tmp_path / f"{number}.png")
        return load_data(path)

    return data


def cut(image):
    content = image.read_bytes()
    image.write_bytes(content[: len(content) // 2])


@pytest.fixture
def run(model, processor, tmp_path):
    def run(samples, methods=METHODS, **changes):
        options = {"output": tmp_path / "out", "batch_size": 3, "max_new_tokens": 2, "measure": False, "seeds": 2}
        return compare(model, processor, samples, methods, [9], **options | changes)

    return run


def without(samples, *images):
    return [sample for sample in samples if sample.image.name not in {f"{number}.png" for number in images}]


@pytest.mark.parametrize("damaged", [(0,), (2,), (0, 1, 3)])
def test_the_others_are_scored_as_without_the_damaged_ones(run, data, tmp_path, damaged):
    samples = data(*damaged)
    expected = run(without(samples, *damaged), output=tmp_path / "readable")
    with pytest.warns(UserWarning, match="of 8 questions skipped") as notes:
        results = run(samples)
    assert len(notes) == 1
    assert results.rows == expected.rows
    assert results.questions == expected.questions
    assert {row.samples for row in results.rows} == {8 - 2 * len(damaged)}
    assert [entry.id for entry in results.skipped] == [s.id for s in samples if int(s.image.stem) in damaged]
    first = results.skipped[0]
    assert first.where == f"data.jsonl, line {damaged[0] + 1}"
    assert first.reason == f"{damaged[0]}.png: the image cannot be read (image file is truncated)"
    assert Results.load(tmp_path / "out" / "results.json") == results
    assert str(tmp_path) not in (tmp_path / "out" / "results.json").read_text()
    assert len(results.examples) == 4 - len(damaged)


def test_the_note_names_file_lines_and_a_reason(run, data):
    with pytest.warns(UserWarning, match="skipped") as notes:
        run(data(1))
    assert str(notes[0].message) == (
        "2 of 8 questions skipped: images cannot be read (data.jsonl, lines 2, 6: "
        "1.png: the image cannot be read (image file is truncated))"
    )


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        (["a.jsonl, line 2"], "a.jsonl, line 2: broken"),
        (["a.parquet, row 2", "a.parquet, row 9"], "a.parquet, rows 2, 9: broken"),
        (["", ""], "questions 0, 1: broken"),
        (
            [f"a.jsonl, line {i}" for i in range(12)],
            "a.jsonl, lines 0, 1, 2, 3, 4, 5, 6, 7, 8, 9; 2 more in results.json: broken",
        ),
    ],
)
def test_the_note_is_short(run, data, places, expected):
    skipped = tuple(Skipped(str(i), where, "broken") for i, where in enumerate(places))
    results = replace(run(data(), []), skipped=skipped)
    assert skipped_note(results).endswith(f"of {8 + len(places)} questions skipped: images cannot be read ({expected})")


@pytest.mark.filterwarnings("ignore:.*questions skipped")
def test_the_cost_is_measured_on_a_readable_sample(run, data):
    results = run(data(0), ["uniform"], measure=True)
    *timed, blind = results.rows
    assert all(row.prefill_ms > 0 for row in timed)
    assert (blind.method, blind.samples, blind.prefill_ms) == ("blind", 6, None)


@pytest.mark.filterwarnings("ignore:.*questions skipped")
def test_a_resumed_run_skips_the_same_questions(run, data, tmp_path):
    results = run(data(0))
    journal = tmp_path / "out" / "predictions.jsonl"
    lines = journal.read_bytes()
    assert run(load_data(tmp_path / "data.jsonl")) == results
    assert journal.read_bytes() == lines


@pytest.mark.filterwarnings("ignore:.*questions skipped")
def test_a_mended_image_is_back_in_every_row(run, data, tmp_path):
    whole = run(data(), output=tmp_path / "whole")
    good = (tmp_path / "0.png").read_bytes()
    assert len(run(data(0)).skipped) == 2
    (tmp_path / "0.png").write_bytes(good)
    mended = run(load_data(tmp_path / "data.jsonl"))
    assert mended.skipped == ()
    assert mended.rows == whole.rows


@pytest.mark.filterwarnings("ignore:.*questions skipped")
def test_an_image_damaged_in_mid_run_leaves_the_earlier_rows_too(run, data, tmp_path):
    samples = data()
    expected = run(without(samples, 0), METHODS, output=tmp_path / "readable")

    def damage(done, total, label):
        if label.startswith("vtc-cls") and done == 8:  # full is complete
            cut(tmp_path / "0.png")

    # batches of two other sizes: nothing of the first run is in the memory of the second
    results = run(samples, progress=damage, batch_size=2, examples=0)
    assert results.skipped == ()  # its pixels are in memory still
    results = run(load_data(tmp_path / "data.jsonl"), examples=0)
    assert [entry.id for entry in results.skipped] == ["1", "5"]
    assert results.scores == expected.scores
    # without examples there is no overlap of kept places
    plain = [[replace(row, referee=None) for row in rows] for rows in (results.rows, expected.rows)]
    assert plain[0] == plain[1]


@pytest.mark.filterwarnings("ignore:.*questions skipped")
def test_a_later_row_may_be_the_first_to_see_the_damage(run, data, tmp_path, monkeypatch):
    samples = data()
    expected = run(without(samples, 0), output=tmp_path / "readable", examples=0)
    monkeypatch.setattr("tokensieve.evaluate.answer.CACHE_BYTES", 0)

    def damage(done, total, label):
        if label.startswith("vtc-cls") and done == 8:
            cut(tmp_path / "0.png")

    results = run(samples, progress=damage, examples=0)
    assert [entry.id for entry in results.skipped] == ["1", "5"]
    assert results.rows == expected.rows
    assert results.scores == expected.scores


def test_all_damaged_is_refused(run, data):
    with pytest.raises(DataError, match=r"none of the 8 images can be read; data\.jsonl, line 1: 0\.png: "):
        run(data(0, 1, 2, 3))
    with pytest.raises(DataError, match="none of the 8"):  # without examples the images are opened later
        run(data(0, 1, 2, 3), examples=0)


def test_strict_ends_at_the_first(run, data, tmp_path):
    samples = data(2)
    with pytest.raises(DataError, match=r"^data\.jsonl, line 3: 2\.png: the image cannot be read"):
        run(samples, strict=True, examples=1, batch_size=1)
    kept = (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()
    assert len([line for line in kept if '"run"' in line]) == 4
    with pytest.raises(DataError, match=r"line 3"):  # the journal remembers
        run(samples, strict=True, examples=1)


def test_an_image_that_cannot_be_opened_has_a_key(run, data, tmp_path):
    samples = data()
    (tmp_path / "3.png").unlink()
    with pytest.warns(UserWarning, match=r"lines 4, 8: 3\.png: no such image file"):
        assert len(run(samples).skipped) == 2


def test_a_changed_image_of_equal_name_and_size_gets_new_answers(run, data, tmp_path):
    samples = data()
    pixels = Image.open(tmp_path / "1.png")
    for sample in samples:  # uncompressed: other pixels take as many bytes
        pixels.save(sample.image, format="BMP")
    run(samples, [])
    journal = tmp_path / "out" / "predictions.jsonl"
    size, answers = (tmp_path / "1.png").stat().st_size, journal.read_text().count("\n")
    pixels.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "1.png", format="BMP")
    assert (tmp_path / "1.png").stat().st_size == size
    run(load_data(tmp_path / "data.jsonl"), [])
    changed = [json.loads(line) for line in journal.read_text().splitlines()[answers:]]
    # full and blind; a later image is no example, so that nothing was moved
    assert sorted(line["sample"].split()[0] for line in changed) == ["2", "2", "6", "6"]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_an_image_that_the_processor_refuses_is_skipped(run, data, processor, monkeypatch, tmp_path, batch_size):
    samples = data()
    expected = run(without(samples, 2), output=tmp_path / "readable")
    narrow = Image.open(tmp_path / "2.png").size
    call = type(processor.image_processor).__call__

    def strict(self, images, *args, **options):
        flat = [image for group in images for image in (group if isinstance(group, list) else [group])]
        if any(image.size == narrow for image in flat):
            raise ValueError("absolute aspect ratio must be smaller than 200, got 500")
        return call(self, images, *args, **options)

    monkeypatch.setattr(type(processor.image_processor), "__call__", strict)
    with pytest.warns(UserWarning, match=r"lines 3, 7: the processor refuses the image \(absolute aspect ratio"):
        results = run(samples, batch_size=batch_size)
    assert (results.rows, results.scores) == (expected.rows, expected.scores)


def test_a_bug_of_the_processor_is_no_damaged_image(run, data, processor, monkeypatch):
    def broken(*args, **options):
        raise ValueError("broken")

    monkeypatch.setattr(type(processor), "__call__", broken)
    with pytest.raises(ValueError, match=r"^broken$"):
        run(data())


@pytest.mark.filterwarnings("ignore:.*questions skipped")
def test_the_oracle_skips_an_image_damaged_in_mid_run(run, data, tmp_path):
    samples = [replace(sample, boxes=((0, 0, 9, 9),)) for sample in data()]
    expected = run(without(samples, 3), ["pool"], output=tmp_path / "readable")

    def damage(done, total, label):
        if label.startswith("pool") and done == 16:
            cut(tmp_path / "3.png")

    results = run(samples, ["pool"], progress=damage)  # the processed images are in memory, the oracle asks for a size
    assert [row.method for row in results.rows] == ["full", "pool", "oracle", "blind"]
    assert results.rows == expected.rows
    assert [entry.id for entry in results.skipped] == ["4", "8"]
