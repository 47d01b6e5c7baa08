"""Data sets of users: the samples that are read, and the error of each mistake."""

import base64
import json
import math
import struct
import sys
import zlib
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
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
    with pytest.raises(ImportError, match=r'pip install -e "\.\[data\]"'):
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
        (GOOD | {"answer": math.nan}, "line 2: an answer is text or a number; got nan"),
        (GOOD | {"answer": [1, math.inf]}, "line 2: an answer is text or a number; got inf"),
        (GOOD | {"answer": True}, "line 2: an answer is text or a number; got True"),
        (GOOD | {"answer": None}, "line 2: an answer is text or a list of texts, none empty; got None"),
        (GOOD | {"answer": {"text": "cup"}}, "line 2: an answer is text or a list of texts, none empty; got {"),
        (GOOD | {"question": "what \ud83c?"}, r"line 2: the question is not valid text: half of a character .*ud83c"),
        (GOOD | {"question": "what\0?"}, "line 2: the question is not valid text: a NUL"),
        (GOOD | {"answer": ["a", "\udfff"]}, "line 2: an answer is not valid text: half of a character"),
        (GOOD | {"type": "\ud800"}, "line 2: a type is not valid text"),
        (GOOD | {"id": "\ud800"}, "line 2: an id is not valid text"),
        (GOOD | {"id": [1]}, "line 2: an id is text or a number"),
        (GOOD | {"choices": ["a", "\ud800"]}, "line 2: a choice is not valid text"),
        (GOOD | {"choices": "a"}, "line 2: choices are a list of texts; got 'a'"),
        (GOOD | {"choices": ["a", " "]}, "line 2: choices are at most 26 texts, none empty"),
        (GOOD | {"choices": list(range(27))}, "line 2: choices are at most 26 texts"),
        (
            GOOD | {"choices": ["tea", "x"]},
            "line 2: an answer is the text of a choice or its letter, A to B; got 'a cup'",
        ),
        (GOOD | {"choices": ["tea", "x"], "answer": 1}, "line 2: an answer is the text of a choice .* got '1'"),
        (GOOD | {"choices": ["tea", "x"], "answer": "C"}, "line 2: an answer is the text of a choice .* got 'C'"),
        (GOOD | {"image": "a\nb.png"}, "line 2: .*a b.png: no such image file"),
        (GOOD | {"image": []}, "line 2: the list of images is empty"),
        (GOOD | {"image": ["0.png", "9.png"]}, "line 2: .*9.png: no such image file"),
        (GOOD | {"image": ["0.png", None]}, "line 2: the image is a file name; got None"),
        (GOOD | {"image": [["0.png"]]}, "line 2: the image is a file name; got \\['0.png'"),
        (GOOD | {"image": "\ud800.png"}, "line 2: .*cannot be read|line 2: .*no such image file"),
        (GOOD | {"image": "a\0.png"}, "line 2: .*cannot be read .*null"),
        (GOOD | {"image": "data:image/png;base64,!!!"}, "line 2: the image: not valid base64"),
        (GOOD | {"image": "data:image/png;base64"}, "line 2: the image: a data: URI has a comma"),
        (GOOD | {"image": "data:image/png;base64,aGVsbG8="}, "line 2: the image: not an image"),
        (GOOD | {"image": "data:text/plain,hello"}, "line 2: the image: not an image"),
        (GOOD | {"image": "é" * 5000}, "line 2: the image: not valid base64"),
        ({"image": "0.png", "conversations": "x"}, "line 2: conversations are a list"),
        ({"image": "0.png", "conversations": [{"from": "gpt", "value": "x"}]}, "line 2: a conversation has a 'human'"),
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
        ("data.tsv", "image\tquestion\tanswer\n0.png\twhat?\n", "line 2: 2 cells, but the header has 3"),
        ("data.csv", "image,question,answer\n0.png,wh\0at?,a\n", "line 2: .*NUL"),
        ("data.json", json.dumps(GOOD), "data.json: a list of objects is expected"),
        ("data.json", '{"data": 7}', "data.json: a list of objects is expected"),
        ("data.json", json.dumps([GOOD, 1]), "data.json, item 2: a JSON object is expected"),
        ("data.json", json.dumps([GOOD, GOOD | {"answer": ""}]), "data.json, item 2: an answer is text"),
        ("data.json", "[\n{},\n{]", "data.json: not valid JSON .*line 3, column 2"),
        ("data.json", "[" * 200_000, "data.json: not valid JSON"),
        ("data.jsonl", '{"answer": ' + "9" * 5000 + "}\n", "line 1: a number has more than 4300 digits"),
        ("data.json", "[]", "data.json: no rows"),
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


def test_types_are_kept_before_the_limit(write):
    path = write([GOOD | {"type": "where" if i % 2 else "read"} for i in range(8)])
    assert [sample.type for sample in load_data(path, types=["read"], limit=3)] == ["read"] * 3
    assert len(load_data(path, types=["read", "where"])) == 8
    with pytest.raises(DataError, match="no question of type 'hop'; they are read, where"):
        load_data(path, types=["read", "hop"])
    with pytest.raises(DataError, match="no question of type 'hop'; the data have no column 'type'"):
        load_data(write([GOOD]), types=["hop"])


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


# -- values that mean the same ----------------------------------------------------------------------------------------


def test_a_byte_order_mark_is_no_part_of_the_text(write, tmp_path):
    path = write([GOOD])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load_data(path)[0].question == "what is it?"


def test_whole_numbers_are_written_without_a_point(write):
    rows = [GOOD | {"answer": value, "id": n} for n, value in enumerate((3, 3.0, 2.5, "3.0"))]
    assert [sample.answers for sample in load_data(write(rows))] == [("3",), ("3",), ("2.5",), ("3.0",)]


def test_json_is_a_list_or_has_it_under_data(write, tmp_path):
    write([])
    for content in ([GOOD, GOOD], {"info": {}, "data": [GOOD, GOOD]}):
        (tmp_path / "data.json").write_text(json.dumps(content))
        assert [sample.where[-6:] for sample in load_data(tmp_path / "data.json")] == ["item 1", "item 2"]


def test_the_first_turns_of_a_conversation(write):
    turns = [("human", "<image>\nWhat is it?\n<image>"), ("gpt", "a cup"), ("human", "And now?"), ("gpt", "tea")]
    row = {"id": "7", "image": ["0.png", "1.png"], "conversations": [{"from": f, "value": v} for f, v in turns]}
    (sample,) = load_data(write([row]))
    assert (sample.question, sample.answers, len(sample.images)) == ("What is it?", ("a cup",), 2)


def test_images_inside_the_data(write, tmp_path):
    write([])
    content = (tmp_path / "2.png").read_bytes()
    text = base64.b64encode(content).decode()
    assert len(text) > 4096
    for image in (f"data:image/png;base64,{text}", f"DATA:image/png;BASE64,{text}", text):
        first, second = load_data(write([GOOD | {"image": image}] * 2))
        assert first.image == second.image
        assert first.open().size == (90, 100)
    (tmp_path / "data.tsv").write_text(f"image\tquestion\tanswer\n{text}\twhat?\tcup\n")
    assert load_data(tmp_path / "data.tsv")[0].image == first.image


def test_a_stored_image_that_is_damaged_further_in_names_its_row(write, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    write([])
    content = (tmp_path / "2.png").read_bytes()
    table = {"image": [content, content[:2000]], "question": ["a?", "b?"], "answer": ["x", "y"]}
    parquet.write_table(pyarrow.table(table), tmp_path / "data.parquet")
    good, bad = load_data(tmp_path / "data.parquet")
    assert good.open().size == (90, 100)
    with pytest.raises(DataError, match=r"data\.parquet, row 2: the image: the image cannot be read .*truncated"):
        bad.open()
    for wrong, message in ((b"", "not an image"), (b"hello", "not an image"), (None, "the image is a file name")):
        table["image"] = [content, wrong]
        parquet.write_table(pyarrow.table(table), tmp_path / "data.parquet")
        with pytest.raises(DataError, match=rf"data\.parquet, row 2: .*{message}"):
            load_data(tmp_path / "data.parquet")


def test_equal_bytes_are_one_image(write, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    write([])
    contents = [(tmp_path / f"{number}.png").read_bytes() for number in (0, 1, 0)]
    table = {"image": contents, "question": ["a?", "b?", "c?"], "answer": ["x"] * 3}
    parquet.write_table(pyarrow.table(table), tmp_path / "data.parquet")
    first, second, third = load_data(tmp_path / "data.parquet")
    assert first.image == third.image != second.image


def test_every_failure_of_an_image_is_one_error_with_its_place(write, tmp_path):
    (sample,) = load_data(write([GOOD]))
    (tmp_path / "0.png").unlink()
    with pytest.raises(DataError, match=r"line 1: .*0\.png: no such image file"):
        sample.open()

    def gone():
        raise OSError(5, "Input/output error")

    for image, message in ((gone, "cannot be read .Input/output error"), (lambda: "0.png", "expected; got str")):
        with pytest.raises(DataError, match=f"line 1: the image: .*{message}"):
            replace(sample, image=image).open()
    both = replace(sample, image=(lambda: Image.new("RGBA", (2, 2)), gone))
    assert both.open().getpixel((0, 0)) == (255, 255, 255)  # the images of functions are converted, too
    with pytest.raises(DataError, match="line 1"):
        both.open_all()


def test_choices(write, tmp_path):
    (sample,) = load_data(write([GOOD | {"choices": ["a cup", 2, "tea"], "answer": "A"}]))
    assert sample.choices == ("a cup", "2", "tea")
    assert sample.text == "what is it?\nA. a cup\nB. 2\nC. tea"
    for answer in ("Tea", "b", "(C)", ["none of them", "2"]):
        load_data(write([GOOD | {"choices": ["a cup", 2, "tea"], "answer": answer}]))
    text = 'image,question,answer,choices\n0.png,what?,A,"[""x"", ""y""]"\n1.png,what?,B,\n'
    (tmp_path / "data.csv").write_text(text)
    assert [sample.choices for sample in load_data(tmp_path / "data.csv")] == [("x", "y"), ()]


ANY_TEXT = st.text(st.characters(), max_size=8)  # surrogates and NUL included
ANY_VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT | st.just("0.png"),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.sampled_from(["answer", "path", "bytes"]), values),
    max_leaves=4,
)
COLUMNS = ("image", "question", "answer", "id", "type", "choices", "conversations")


@settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.dictionaries(st.sampled_from(COLUMNS), ANY_VALUE))
def test_any_json_is_a_sample_or_one_line_with_file_and_line(write, row):
    path = write([GOOD, row, GOOD | row])
    try:
        samples = load_data(path)
    except DataError as error:
        message = str(error)
    else:
        message = ""
        for sample in samples:
            "".join((sample.id, sample.type, sample.text, *sample.answers)).encode()
            assert sample.question
            assert all(sample.answers)
            assert len(sample.open_all()) == len(sample.images)
    assert not message or (f"{path}, line " in message and "\n" not in message)


# -- the datasets library ---------------------------------------------------------------------------------------------


@pytest.fixture
def table(write, tmp_path):
    """A table of the datasets library: three questions about two images, answers as classes."""
    datasets = pytest.importorskip("datasets")
    write([])
    columns = {
        "image": [str(tmp_path / f"{number}.png") for number in (0, 1, 0)],
        "question": ["a?", "b?", "c?"],
        "answer": [0, 1, 0],
    }
    features = {"image": datasets.Image(), "question": datasets.Value("string")}
    features["answer"] = datasets.ClassLabel(names=["no", "yes"])
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def test_a_folder_of_save_to_disk(table, tmp_path):
    table.save_to_disk(tmp_path / "saved")
    for number in range(2):
        (tmp_path / f"{number}.png").unlink()  # the folder holds the images
    first, second, third = load_data(tmp_path / "saved")
    assert [sample.answers for sample in (first, second, third)] == [("no",), ("yes",), ("no",)]
    assert first.image == third.image != second.image
    assert second.open().size == (90, 80)
    assert second.where.endswith("saved, row 2")
    with pytest.raises(DataError, match="saved: this is one table without splits; got 'test'"):
        load_data(tmp_path / "saved", split="test")


def test_splits(table, tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.DatasetDict(train=table, test=table.select([1])).save_to_disk(tmp_path / "saved")
    (sample,) = load_data(tmp_path / "saved", split="test")
    assert (sample.question, sample.where[-11:]) == ("b?", "test, row 1")
    with pytest.raises(DataError, match="saved: the splits are train, test; choose one with --split"):
        load_data(tmp_path / "saved")
    with pytest.raises(DataError, match="saved: the splits are train, test; got 'val'"):
        load_data(tmp_path / "saved", split="val")
    for source in ("reference", tmp_path / "0.jsonl"):
        (tmp_path / "0.jsonl").write_text("")
        with pytest.raises(DataError, match="split"):
            load_data(source, split="val")


def test_a_folder_of_parquet_files_as_on_the_hub(table, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "hub" / "data").mkdir(parents=True)
    for split in ("train", "test"):
        table.to_parquet(tmp_path / "hub" / "data" / f"{split}-00000-of-00001.parquet")
    assert [sample.question for sample in load_data(tmp_path / "hub", split="test")] == ["a?", "b?", "c?"]


def test_several_images_in_a_table(table, tmp_path):
    datasets = pytest.importorskip("datasets")
    names = [str(tmp_path / f"{number}.png") for number in range(3)]
    columns = {"image": [names, names[:1]], "question": ["a?", "b?"], "answer": ["x", "y"]}
    features = {"image": datasets.List(datasets.Image())} | {
        name: datasets.Value("string") for name in ("question", "answer")
    }
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).save_to_disk(tmp_path / "saved")
    first, second = load_data(tmp_path / "saved")
    assert [image.size for image in first.open_all()] == [(90, 60), (90, 80), (90, 100)]
    assert second.image == first.images[0]


def test_folders_that_are_no_data_sets(table, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"the data set .*empty does not load: "):
        load_data(tmp_path / "empty")
    table.save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "dataset_info.json").write_text("{")
    with pytest.raises(DataError, match=r"the data set .*saved does not load: ") as caught:
        load_data(tmp_path / "saved")
    assert "\n" not in str(caught.value)


def test_a_name_of_the_hub_without_a_network(monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)  # read from the environment at its first import

    def offline(self, *args, **options):
        raise OSError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", offline)
    with pytest.raises(DataError, match=r"no data set someone/data: it is no folder, .*\(Name or service not known\)"):
        load_data("someone/data")


def test_a_folder_without_the_library_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r'pip install -e "\.\[data\]"'):
        load_data(tmp_path)
