"""The input is cut into parts, and each part reads its rows alone."""

import json

import pytest
from PIL import Image

from tokensieve.batch.source import REFERENCE, Columns, files_of, parts_of, read_part
from tokensieve.errors import DataError


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    return tmp_path


def row(number, **others):
    return {"image": "red.png", "question": f"what is number {number}?", **others}


def rows_of(data, size):
    return [row for part in parts_of(str(data), size) for row in read_part(part, Columns(), fetch_images=False)]


def questions_of(rows):
    return [row.sample.question if row.sample else None for row in rows]


def write_parquet(path, rows, group):
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=group)


@pytest.mark.parametrize("size", [1, 3, 4, 100])
def test_each_row_is_in_one_part_whatever_the_format(folder, size):
    rows = [row(n, id=f"row {n}") for n in range(11)]
    text = "".join(json.dumps(r) + ("\n\n" if n == 4 else "\n") for n, r in enumerate(rows))
    (folder / "a.jsonl").write_text("﻿" + text.rstrip("\n"), "utf-8")
    (folder / "a.json").write_text(json.dumps(rows))
    (folder / "a.csv").write_text("id,image,question\n" + "".join(f"{r['id']},red.png,{r['question']}\n" for r in rows))
    write_parquet(folder / "a.parquet", rows, group=4)
    for ending in ("jsonl", "json", "csv", "parquet"):
        data = folder / f"a.{ending}"
        parts = parts_of(str(data), size)
        assert [part.number for part in parts] == list(range(len(parts)))
        assert max(part.rows for part in parts) <= size
        read = rows_of(data, size)
        assert questions_of(read) == [r["question"] for r in rows], ending
        assert [r.id for r in read] == [r["id"] for r in rows]
        assert len({r.source for r in read}) == len(rows)
    sources = [r.source for r in rows_of(folder / "a.jsonl", size)]
    assert sources[:6] == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3", "a.jsonl:4", "a.jsonl:5", "a.jsonl:7"]


def test_folders_and_patterns_name_their_shards_in_order(folder):
    for name in ("b/two.jsonl", "a/one.jsonl", "a/notes.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps({**row(0), "image": "../red.png"}) + "\n")
    assert [name for name, _ in files_of(str(folder))] == ["a/one.jsonl", "b/two.jsonl"]
    assert [name for name, _ in files_of(str(folder / "*" / "*.jsonl"))] == ["a/one.jsonl", "b/two.jsonl"]
    read = rows_of(folder, 5)
    assert [r.id for r in read] == ["a/one.jsonl:1", "b/two.jsonl:1"]  # no ids: the places
    assert all(r.sample is not None for r in read)
    assert [r.images for r in read] == [("red.png",)] * 2  # one image, named from two folders
    with pytest.raises(DataError, match="ends in"):
        files_of(str(folder / "a" / "*"))


def test_a_row_that_cannot_be_read_keeps_its_place(folder):
    lines = [
        json.dumps(row(1, id="good")),
        '{"image": "red.png", "question"',
        json.dumps(row(3, id="blank", question=" ")),
        json.dumps({"image": "missing.png", "question": "?", "id": "gone"}),
        '"text"',
        json.dumps(row(6)),
    ]
    (folder / "a.jsonl").write_text("\n".join(lines))
    read = rows_of(folder / "a.jsonl", 4)
    assert [r.id for r in read] == ["good", "a.jsonl:2", "blank", "gone", "a.jsonl:5", "a.jsonl:6"]
    assert [r.error is None for r in read] == [True, False, False, False, False, True]
    assert "not valid JSON" in read[1].error
    assert "empty" in read[2].error
    assert read[3].error == "missing.png: no such image file"
    assert str(folder) not in " ".join(r.error or "" for r in read)


def test_parquet_holds_images_as_bytes_and_lists(folder):
    content = (folder / "red.png").read_bytes()
    rows = [{"image": {"bytes": content, "path": None}, "question": "one?", "answer": "a"}] * 3
    write_parquet(folder / "bytes.parquet", rows, group=2)
    one, two, _ = rows_of(folder / "bytes.parquet", 2)
    assert one.sample.open().size == (8, 8)
    assert one.images == two.images
    write_parquet(folder / "several.parquet", [{"image": ["red.png", "red.png"], "question": "two?"}], group=1)
    (several,) = rows_of(folder / "several.parquet", 2)
    assert len(several.sample.images) == 2
    assert several.sample.answers == ()


def test_the_bundled_benchmark_is_cut_too():
    parts = parts_of(REFERENCE, 1000)
    assert [part.rows for part in parts] == [1000, 1000, 1000, 900]
    (first, *_) = read_part(parts[1], Columns(), fetch_images=False)
    assert first.sample.answers
    assert first.source == first.id


def test_nothing_to_read_is_refused(folder):
    (folder / "empty.jsonl").write_text("\n\n")
    for data, reason in [
        (folder / "empty.jsonl", "no rows"),
        (folder / "none.jsonl", "no such file"),
        (folder / "red.png", "ends in"),
    ]:
        with pytest.raises(DataError, match=reason):
            parts_of(str(data), 5)
    (folder / "shards").mkdir()
    with pytest.raises(DataError, match="no shards"):
        parts_of(str(folder / "shards"), 5)
    (folder / "broken.parquet").write_text("text")
    with pytest.raises(DataError, match="not a parquet file"):
        parts_of(str(folder / "broken.parquet"), 5)
