"""Every mistake of a user is one line with the mistake, the value and the allowed ones, and exit code 2."""

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.calling import Outcome, run, run_many
from tokensieve.cli import users_error
from tokensieve.commands.loading import trained_spec
from tokensieve.errors import Refusal

QUESTION = "what colour is the cup?"


def png_header(width: int, height: int) -> bytes:
    """Return a PNG whose header has this size; its pixels are never decoded."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, photo: Path) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    (folder / "photo.jpg").write_bytes(photo.read_bytes())
    (folder / "text.jpg").write_text("this is no image")
    (folder / "cut.jpg").write_bytes(photo.read_bytes()[: photo.stat().st_size // 2])
    (folder / "huge.png").write_bytes(png_header(30_000, 30_000))
    good = '{"image": "photo.jpg", "question": "what is it?", "answer": "red"}\n'
    (folder / "column.jsonl").write_text(good + '{"image": "photo.jpg", "query": "what is it?", "answer": "red"}\n')
    (folder / "line.jsonl").write_text(good + good + '{"image": "photo.jpg", \n')
    (folder / "cut.jsonl").write_text(good.replace("photo", "cut"))
    (folder / "partly.jsonl").write_text(good + good.replace("photo", "cut"))
    (folder / "placeholder.jsonl").write_text(good + good.replace("what is", "<image> what is"))
    (folder / "empty.jsonl").write_text("")
    (folder / "surrogate.jsonl").write_text(good + good.replace("what", "\\ud83c"))
    (folder / "latin.csv").write_bytes("image,question,answer\nphoto.jpg,what?,café\n".encode("latin-1"))
    (folder / "utf16.jsonl").write_bytes(good.encode("utf-16"))
    (folder / "nan.jsonl").write_text(good + good.replace('"red"', "NaN"))
    (folder / "true.json").write_text(f"[{good}, {good.replace(chr(34) + 'red' + chr(34), 'true')}]")
    (folder / "web.jsonl").write_text(good + good.replace("photo.jpg", "https://example.org/cat.jpg"))
    (folder / "uri.jsonl").write_text(good + good.replace("photo.jpg", "data:image/png;base64,xxx"))
    (folder / "several.jsonl").write_text(good.replace('"photo.jpg"', '["photo.jpg", "photo.jpg"]'))
    (folder / "list.jsonl").write_text(good + good.replace('"photo.jpg"', '["photo.jpg", "gone.jpg"]'))
    for name, config in (("bert", '{"model_type": "bert"}'), ("strange", '{"model_type": "strange"}'), ("broken", "{")):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(config)
    (folder / "nothing").mkdir()
    return folder


def with_data(name: str, *more: str) -> Callable[[Path, str], list[str]]:
    """Return the arguments that compare on a file of the folder."""
    return lambda f, m: ["compare", "--model", m, "--data", f"{f}/{name}", "--output", f"{f}/out", *more]


CASES: dict[str, tuple[Callable[[Path, str], list[str]], list[str]]] = {
    "unknown method": (
        lambda f, m: ["compare", "--model", m, "--methods", "vtc-clss"],
        ["unknown method 'vtc-clss'", "did you mean vtc-cls"],
    ),
    "unknown parameter": (
        lambda f, m: ["ask", f"{f}/photo.jpg", QUESTION, "--method", "vtc-cls(first=1)"],
        ["vtc-cls has no parameter 'first'", "first_layer"],
    ),
    "average without a threshold, before the model": (
        lambda f, m: ["ask", f"{f}/photo.jpg", QUESTION, "--method", "scope", "--keep", "average:9", "--model", "no/m"],
        ["keep='average:9' has no threshold yet", "tokensieve calibrate average"],
    ),
    "unreadable spec": (
        lambda f, m: ["bench", "--methods", "vtc-cls(keep=3"],
        ["cannot read the method spec 'vtc-cls(keep=3'"],
    ),
    "missing method": (lambda f, m: ["compare", "--methods", "vtc-cls,,pool"], ["a method is missing"]),
    "keep 0": (lambda f, m: ["compare", "--keep", "0"], ["keep", "got 0", ">= 1", "(0, 1]"]),
    "keep 1.5": (lambda f, m: ["compare", "--keep", "64, 1.5"], ["keep", "got 1.5", "(0, 1]"]),
    "keep no number": (lambda f, m: ["bench", "--keep", "many"], ["keep", "'many'"]),
    "ask keep 0": (lambda f, m: ["ask", f"{f}/photo.jpg", QUESTION, "--keep", "0"], ["keep", "got 0"]),
    "word for a number": (
        lambda f, m: ["check", m, "--method", "fastv(layer='x')"],
        ["layer must be a number; got 'x'"],
    ),
    "unknown rule for separators": (
        lambda f, m: ["ask", f"{f}/photo.jpg", QUESTION, "--separators", "some"],
        ["some", "kept-lines", "none"],
    ),
    "unknown repair": (lambda f, m: ["ask", f"{f}/photo.jpg", QUESTION, "--repair", "both"], ["both", "restore"]),
    "unknown scope": (lambda f, m: ["ask", f"{f}/photo.jpg", QUESTION, "--budget-scope", "photo"], ["photo", "sample"]),
    "scope of an encoder method": (
        lambda f, m: ["ask", f"{f}/photo.jpg", QUESTION, "--method", "downsample", "--budget-scope", "sample"],
        ["budget_scope='sample' is not for methods that act in the encoder"],
    ),
    "scope without a score": (
        lambda f, m: ["compare", "--model", m, "--budget-scope", "sample-score"],
        ["divprune", "does not choose by a score alone", "use budget_scope='sample'"],
    ),
    "bench of such a scope": (
        lambda f, m: ["bench", "--model", m, "--methods", "fastv", "--budget-scope", "tile"],
        ["budget_scope='tile' is not for methods that act in the decoder"],
    ),
    "overlay no picture": (
        lambda f, m: ["ask", f"{f}/photo.jpg", QUESTION, "--model", m, "--overlay", f"{f}/kept.txt"],
        ["kept.txt", "name it .png"],
    ),
    "overlay in no folder": (
        lambda f, m: ["ask", f"{f}/photo.jpg", QUESTION, "--model", m, "--overlay", f"{f}/gone/kept.png"],
        ["kept.png", "there is no folder"],
    ),
    "placeholder in a question": (
        lambda f, m: ["ask", f"{f}/photo.jpg", "<image> what is it?", "--model", m],
        ["leave <image> out"],
    ),
    "placeholder in data": (
        lambda f, m: ["compare", "--model", m, "--data", f"{f}/placeholder.jsonl", "--output", f"{f}/out"],
        ["placeholder.jsonl, line 2: leave <image> out", "'<image> what is it?'"],
    ),
    "placeholder in the prompt": (
        lambda f, m: ["compare", "--model", m, "--prompt", "<image> {question}", "--output", f"{f}/out"],
        ["the prompt: leave <image> out"],
    ),
    "share above 1": (lambda f, m: ["bench", "--methods", "fastvid(context=5.0)"], ["context must be a share"]),
    "no method to reduce a classifier with": (
        lambda f, m: ["ask", f"{f}/photo.jpg", QUESTION, "--model", "vilt-reference"],
        ["vilt-reference was not fine-tuned with a method", "layers 0 to 7", "layers=(2, 4, 6) fit", "name one"],
    ),
    "check of a classifier": (
        lambda f, m: ["check", "pumer-reference"],
        ["a cross-modal encoder", "ask, bench and compare"],
    ),
    "training from no model": (
        lambda f, m: ["train", "pumer", "--task", "vqa", "--model", f"{f}/gone", "--data", "reference:train"],
        ["no model at", "gone: it does not exist"],
    ),
    "unknown meaning of a budget": (
        lambda f, m: ["compare", "--model", m, "--keep-means", "kept"],
        ["--keep-means", "'kept' is not one of 'final', 'average'"],
    ),
    "no image": (lambda f, m: ["ask", f"{f}/gone.jpg", QUESTION, "--model", m], ["gone.jpg"]),
    "text as image": (lambda f, m: ["ask", f"{f}/text.jpg", QUESTION, "--model", m], ["text.jpg", "not an image"]),
    "truncated image": (lambda f, m: ["ask", f"{f}/cut.jpg", QUESTION, "--model", m], ["cut.jpg"]),
    "huge image": (
        lambda f, m: ["ask", f"{f}/huge.png", QUESTION, "--model", m],
        ["huge.png", "900,000,000 pixels are too many", "100,000,000 pixels"],
    ),
    "empty question": (lambda f, m: ["ask", f"{f}/photo.jpg", "  ", "--model", m], ["the question is empty"]),
    "no question": (lambda f, m: ["ask", f"{f}/photo.jpg", "--model", m], ["the question is empty; ask something"]),
    "missing column": (
        lambda f, m: ["compare", "--model", m, "--data", f"{f}/column.jsonl"],
        ["column.jsonl", "line 2", "question"],
    ),
    "bad line": (lambda f, m: ["compare", "--model", m, "--data", f"{f}/line.jsonl"], ["line.jsonl", "line 3"]),
    "no rows": (lambda f, m: ["compare", "--model", m, "--data", f"{f}/empty.jsonl"], ["empty.jsonl", "no rows"]),
    "no data": (lambda f, m: ["compare", "--model", m, "--data", f"{f}/gone.jsonl"], ["gone.jsonl"]),
    "damaged image in data": (
        lambda f, m: ["compare", "--model", m, "--data", f"{f}/cut.jsonl", "--output", f"{f}/out"],
        ["none of the 1 images can be read; cut.jsonl, line 1: cut.jpg: the image cannot be read"],
    ),
    "damaged image under --strict": (
        lambda f, m: ["compare", "--model", m, "--data", f"{f}/partly.jsonl", "--output", f"{f}/strict", "--strict"],
        ["tokensieve: partly.jsonl, line 2: cut.jpg: the image cannot be read"],
    ),
    "batch size no number": (
        lambda f, m: ["compare", "--model", m, "--batch-size", "many"],
        ["--batch-size is 'auto' or a number; got 'many'"],
    ),
    "batch size 0": (lambda f, m: ["compare", "--model", m, "--batch-size", "0"], ["batch_size must be", "got 0"]),
    "question that is no text": (
        lambda f, m: ["ask", f"{f}/photo.jpg", "caf\udce9?", "--model", m],
        ["the question is not valid text: a byte that is not UTF-8 ('\\udce9')"],
    ),
    "bench of no text": (
        lambda f, m: ["bench", "--question", "caf\udce9?", "--model", m],
        ["the question is not valid text"],
    ),
    "prompt that is no text": (
        lambda f, m: ["compare", "--model", m, "--limit", "1", "--prompt", "{question} \udcff", "--output", f"{f}/out"],
        ["the prompt is not valid text"],
    ),
    "half of a character in data": (
        with_data("surrogate.jsonl"),
        ["surrogate.jsonl, line 2: the question is not valid text: half of a character ('\\ud83c')"],
    ),
    "latin-1": (with_data("latin.csv"), ["latin.csv, line 2: not UTF-8 text (byte 0xe9 at column 20)"]),
    "utf-16": (with_data("utf16.jsonl"), ["utf16.jsonl: this is UTF-16 text; save it as UTF-8"]),
    "NaN as answer": (with_data("nan.jsonl"), ["nan.jsonl, line 2: an answer is text or a number; got nan"]),
    "true as answer": (with_data("true.json"), ["true.json, item 2: an answer is text or a number; got True"]),
    "image on the web": (
        with_data("web.jsonl"),
        ["web.jsonl, line 2: https://example.org/cat.jpg: images on the web are not fetched; --fetch-images"],
    ),
    "ask about an image on the web": (
        lambda f, m: ["ask", "https://example.org/cat.jpg", QUESTION, "--model", m],
        ["https://example.org/cat.jpg: images on the web are not fetched; save the image to a file"],
    ),
    "no data: URI": (with_data("uri.jsonl"), ["uri.jsonl, line 2: the image: not valid base64"]),
    "one of several images": (with_data("list.jsonl"), ["list.jsonl, line 2: ", "gone.jpg: no such image file"]),
    "several images for a classifier": (
        with_data("several.jsonl", "--model", "pumer-reference"),
        ["several.jsonl, line 1: this model answers questions about one image; got 2"],
    ),
    "splits of a file": (
        with_data("several.jsonl", "--split", "test"),
        ["several.jsonl: a file has no splits; got split 'test'"],
    ),
    "folder that is no data": (with_data("nothing"), ["nothing does not load"]),
    "unknown metric": (
        lambda f, m: ["compare", "--model", m, "--limit", "1", "--metric", "exacte", "--output", f"{f}/out"],
        ["exacte", "did you mean exact"],
    ),
    "model without config": (
        lambda f, m: ["ask", f"{f}/photo.jpg", QUESTION, "--model", f"{f}/nothing"],
        ["nothing", "no config.json"],
    ),
    "text-only model": (
        lambda f, m: ["ask", f"{f}/photo.jpg", QUESTION, "--model", f"{f}/bert"],
        ["'bert' model", "llava_next"],
    ),
    "unknown model type": (
        lambda f, m: ["ask", f"{f}/photo.jpg", QUESTION, "--model", f"{f}/strange"],
        ["does not load", "strange"],
    ),
    "broken config": (lambda f, m: ["bench", "--model", f"{f}/broken"], ["does not load", "JSON"]),
    "an image as model": (lambda f, m: ["bench", "--model", f"{f}/photo.jpg"], ["is not a folder"]),
    "unknown option": (lambda f, m: ["compare", "--metod", "x"], ["--metod"]),
    "unknown command": (lambda f, m: ["comapre"], ["comapre"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def outcomes(folder: Path, model: str) -> dict[str, Outcome]:
    return run_many({name: arguments(folder, model) for name, (arguments, _) in CASES.items()})


@pytest.mark.parametrize("name", CASES)
def test_is_one_clear_line(name: str, outcomes: dict[str, Outcome]) -> None:
    line = outcomes[name].refused()
    for words in CASES[name][1]:
        assert words in line
    assert len(line) < 400


def test_the_installed_command_exits_the_same_way() -> None:
    assert "did you mean" in run("compare", "--methods", "fastvlm").refused()


def test_a_hub_name_offline_is_refused_at_once(photo: Path) -> None:
    outcome = run("ask", photo, QUESTION, "--model", "someone/some-model", HF_HUB_OFFLINE="1")
    assert "no model someone/some-model" in outcome.refused()


def test_a_missing_extra_is_named_before_the_work(model: str, folder: Path) -> None:
    calls = {"compare": ["compare", "--model", model, "--output", folder / "out"]}
    hidden = "import sys; sys.modules['jinja2'] = None\n"
    assert 'pip install -e ".[report]"' in run_many(calls, before=hidden)["compare"].refused()


def test_a_damaged_note_of_the_training_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for text in ("{", "[]", "{}"):
        (tmp_path / "tokensieve.json").write_text(text)
        with pytest.raises(Refusal, match=r"tokensieve\.json is not a file of `tokensieve train pumer`"):
            trained_spec(str(tmp_path), None)


def test_only_the_type_of_an_error_tells_a_mistake_from_a_bug() -> None:
    def caught(call: Callable[[], object]) -> Exception:
        with pytest.raises(Exception) as info:  # noqa: PT011
            call()
        return info.value

    from tokensieve.budget import parse_budget

    assert users_error(caught(lambda: parse_budget("0"))) is not None
    assert users_error(caught(lambda: int("x"))) is None
    assert users_error(caught(lambda: {}["x"])) is None
    assert users_error(ImportError("cannot import name 'x'")) is None
    assert users_error(OSError(28, "No space left on device", "a.json")) == "a.json: No space left on device"
