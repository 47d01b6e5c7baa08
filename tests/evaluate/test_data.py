"""Data sets of users: the samples that are read, and the error of each mistake."""

import json
import struct
import sys
import zlib

import pytest
from PIL import Image

from tokensieve.evaluate import DataError, load_data, open_image

GOOD = {"image": "0.png", "question": "what is it?", "answer": "a cup"}


def png_header(width: int, height: int) -> bytes:
    """Return a PNG whose header has this size, without pixels."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    empty = b"IDAT" + zlib.compress(b"")
    chunks = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (chunk, empty)]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_jsonl(write, tmp_path):
    first, second = load_data(write([GOOD, GOOD | {"id": 0, "type": "name", "answer": ["cup", "mug", 2]}]))
    assert (first.id, first.image, first.question, first.answers) == (
        "1",
        tmp_path / "0.png",
        "what is it?",
        ("a cup",),
    )
    assert (second.id, second.type, second.answers) == ("0", "name", ("cup", "mug", "2"))
    assert first.open().mode == "RGB"
    assert first.open().size == (90, 60)


def test_csv(write, tmp_path):
    write([])
    path = tmp_path / "data.csv"
    path.write_text('﻿picture,ask,reply\n0.png,"what, here?",cup\n1.png,who?,"[""a"", ""b""]"\n', encoding="utf-8")
    found = load_data(path, image_column="picture", question_column="ask", answer_column="reply")
    assert [(s.question, s.answers) for s in found] == [("what, here?", ("cup",)), ("who?", ("a", "b"))]


def test_parquet_with_files_and_with_bytes(write, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    write([])
    data = (tmp_path / "2.png").read_bytes()
    annotators = [{"answer": "cup"}, {"answer": "mug"}]  # as in VQAv2
    for name, image in (("files", "2.png"), ("bytes", {"bytes": data, "path": None})):
        table = pyarrow.table({"image": [image], "question": ["what?"], "answer": [annotators]})
        parquet.write_table(table, tmp_path / f"{name}.parquet")
        (sample,) = load_data(tmp_path / f"{name}.parquet")
        assert sample.answers == ("cup", "mug")
        assert sample.open().size == (90, 100)


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "data.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r'pip install "tokensieve\[data\]"'):
        load_data(tmp_path / "data.parquet")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"img": "0.png", "question": "what?", "answer": "x"}, "line 2: no column 'image' among .*mean 'img'"),
        ({"image": "0.png", "question": "what?"}, "line 2: no column 'answer' among 'image', 'question'$"),
        (GOOD | {"question": "  "}, "line 2: the question is empty"),
        (GOOD | {"question": 7}, "line 2: a question is text"),
        (GOOD | {"answer": []}, "line 2: an answer is text"),
        (GOOD | {"answer": ["cup", ""]}, "line 2: an answer is text"),
        (GOOD | {"image": "9.png"}, "line 2: .*9.png: no such image file"),
        (GOOD | {"image": "data.jsonl"}, "line 2: .*data.jsonl: not an image"),
        (GOOD | {"image": "."}, "line 2: .*cannot be read"),
        (GOOD | {"image": None}, "line 2: the image is a file name"),
        (GOOD | {"image": "big.png"}, "line 2: .*big.png: 12000 x 9000 px is too large"),
        (GOOD | {"image": "huge.png"}, "line 2: .*huge.png: 900,000,000 pixels are too many; the limit is 100,"),
        (GOOD | {"id": 1}, "line 2: the id '1' is used twice"),
        ([1], "line 2: a JSON object"),
    ],
)
def test_a_bad_row_is_named(write, tmp_path, row, message):
    (tmp_path / "big.png").write_bytes(png_header(12_000, 9_000))
    (tmp_path / "huge.png").write_bytes(png_header(30_000, 30_000))
    path = write([GOOD, row])
    with pytest.raises(DataError, match=message) as caught:
        load_data(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.jsonl", json.dumps(GOOD) + '\n\n{"image": "0.png",\n', "line 3: not valid JSON"),
        ("data.jsonl", "", "data.jsonl: no rows"),
        ("data.jsonl", json.dumps(GOOD).encode("utf-16"), "this is UTF-16 text; save it as UTF-8"),
        ("data.jsonl", json.dumps(GOOD).encode("utf-16-le"), "this is UTF-16 text"),
        (
            "data.jsonl",
            json.dumps(GOOD).encode() + b'\n{"a": "\xe9"}',
            r"line 2: not UTF-8 text \(byte 0xe9 at column 8\)",
        ),
        ("data.csv", "image,question,answer\n0.png,what?,café\n".encode("latin-1"), "line 2: not UTF-8 text"),
        ("data.csv", "image,question,answer\n0.png,what?\n", "line 2: 2 cells, but the header has 3"),
        ("data.csv", "image,question,answer\n0.png,what?,a,b\n", "line 2: 4 cells, but the header has 3"),
        ("data.csv", 'image,question,answer\n0.png,"what"?,a\n', "line 2: not valid CSV"),
        ("data.parquet", "not parquet", "data.parquet: not a parquet file"),
        ("data.xml", "", "ending in .jsonl, .json, .csv, .tsv, .parquet, or a folder"),
    ],
)
def test_a_bad_file_is_named(write, tmp_path, name, content, message):
    write([])
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        load_data(tmp_path / name)


def test_a_missing_file_and_a_bad_limit(tmp_path, write):
    with pytest.raises(DataError, match=r"none\.csv: no such file"):
        load_data(tmp_path / "none.csv")
    with pytest.raises(DataError, match="limit must be at least 1; got 0"):
        load_data(write([GOOD]), limit=0)


def test_a_limit_takes_whole_images_and_a_larger_one_contains_it(write):
    path = write([GOOD | {"image": f"{i % 4}.png"} for i in range(12)])
    few, more = load_data(path, limit=3), load_data(path, limit=7)
    assert len(few) == 3
    assert len({sample.image for sample in few}) == 1
    assert {s.id for s in few} < {s.id for s in more}
    assert [s.id for s in more] == sorted((s.id for s in more), key=int)


def test_a_truncated_jpeg_is_found_when_it_is_opened(write, tmp_path):
    write([])
    Image.open(tmp_path / "0.png").save(tmp_path / "whole.jpg")
    data = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "half.jpg").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=r"half\.jpg: the image cannot be read .*truncated"):
        open_image(tmp_path / "half.jpg")


def test_a_photograph_is_turned_upright(tmp_path):
    image = Image.new("RGB", (40, 20))
    exif = image.getexif()
    exif[0x0112] = 6  # the camera was held upright
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").size == (20, 40)
