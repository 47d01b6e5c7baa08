"""The recipes: the prompts of LLaVA-1.5's published question files, the columns of the hub, the table in the docs."""

import hashlib
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest
from PIL import Image

from tests.reproduce.toys import TOYS, picture, write, write_lines
from tokensieve.errors import DataError, Refusal
from tokensieve.evaluate import METRICS
from tokensieve.evaluate.plan import Settings
from tokensieve.methods import parse
from tokensieve.reproduce import BENCHMARKS, MODELS, find_target, published_rows
from tokensieve.reproduce.files import chosen
from tokensieve.reproduce.published import PUBLISHED
from tokensieve.reproduce.recipes import OFFICIAL
from tokensieve.reproduce.run import conversation, obstacles_of, padding
from tokensieve.reproduce.samples import prompt_of, questions, square

ROOT = Path(__file__).parents[2]
SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


@pytest.mark.parametrize(
    ("name", "row", "prompt"),
    [  # lines of the question files that LLaVA-1.5 published with its answers
        ("gqa", {"question": "Is it overcast?"}, "Is it overcast?" + SHORT),
        ("pope", {"question": "Is there a snowboard in the image?"}, "Is there a snowboard in the image?" + SHORT),
        (
            "mme",
            {"question": "Is a python code shown in the picture? Please answer yes or no."},
            "Is a python code shown in the picture?" + SHORT,
        ),
        (
            "textvqa",
            {"question": "what does the small white text spell?", "ocr_tokens": ["D", "RUPALCON"]},
            "What does the small white text spell?\nReference OCR token: D, RUPALCON" + SHORT,
        ),
        (
            "textvqa",
            {"question": "whats the lowest number yard line that you can see?", "ocr_tokens": []},
            "Whats the lowest number yard line that you can see?\nReference OCR token: " + SHORT,
        ),
        (
            "vizwiz",
            {"question": "What is this? And what color is it? "},
            "What is this? and what color is it? \n"
            "When the provided information is insufficient, respond with 'Unanswerable'." + SHORT,
        ),
        (
            "sqa",
            {"hint": "", "question": "What is the capital of Wyoming?", "choices": ["Phoenix", "Honolulu"]},
            "What is the capital of Wyoming?\nA. Phoenix\nB. Honolulu" + LETTER,
        ),
        (
            "sqa",
            {"hint": "Select the best answer.", "question": "Which property?", "choices": ["shiny", "opaque"]},
            "Context: Select the best answer.\nWhich property?\nA. shiny\nB. opaque" + LETTER,
        ),
        (
            "mmbench-en",
            {"hint": "Read.", "question": "Which?", "A": "one", "B": "two", "C": "nan", "D": None},
            "Read.\nWhich?\nA. one\nB. two" + LETTER,
        ),
        (
            "mmbench-cn",
            {"hint": None, "question": "哪个?", "A": "一", "B": "二", "C": float("nan"), "D": float("nan")},
            "哪个?\nA. 一\nB. 二\n请直接回答选项字母。",
        ),
        (
            "seed",
            {"question": "Which?", "choice_a": "1", "choice_b": "2", "choice_c": "3", "choice_d": "4"},
            "Which?\nA. 1\nB. 2\nC. 3\nD. 4" + LETTER,
        ),
        ("mm-vet", {"question": "What is x in the equation?"}, "What is x in the equation?"),
    ],
)
def test_prompts_are_those_of_the_papers(name, row, prompt):
    assert prompt_of(BENCHMARKS[name], row) == prompt


def test_the_conversation_is_vicuna_v1():
    system = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    )
    assert conversation(MODELS["llava-1.5-7b"], "Q") == f"{system} USER: <image>\nQ ASSISTANT:"


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_toy_data_have_the_columns_and_are_read(name, tmp_path):
    benchmark = BENCHMARKS[name]
    asked = questions(benchmark, write(name, tmp_path), colour=(1, 2, 3))
    assert asked.samples
    assert benchmark.metric in METRICS
    for sample in asked.samples:
        assert sample.open().size == (160, 160)  # padded to a square
        assert sample.open().getpixel((0, 0)) == (1, 2, 3)
    if benchmark.only:
        assert len(asked.samples) == sum(
            row[benchmark.only[0]] in benchmark.only[1] for rows in TOYS[name].values() for row in rows
        )


def test_questions_whose_images_are_apart(tmp_path):
    asked = questions(BENCHMARKS["gqa"], write("gqa", tmp_path))
    assert [sample.open().getpixel((0, 0))[0] for sample in asked.samples] == [0, 37, 74, 111]
    (tmp_path / "testdev_balanced_images/testdev-00000-of-00001.parquet").unlink()
    with pytest.raises(DataError, match=r"no file testdev_balanced_images/testdev-\*\.parquet"):
        questions(BENCHMARKS["gqa"], tmp_path)


def test_json_lines_with_images_in_files(tmp_path):
    rows = [{"category": "random", "question": "Is it?", "answer": "yes", "image": picture(i)} for i in range(3)]
    asked = questions(BENCHMARKS["pope"], write_lines(rows, tmp_path, "test.jsonl"), colour=(0, 0, 0))
    assert [sample.type for sample in asked.samples] == ["random"] * 3
    assert asked.samples[1].open().size == (160, 160)
    assert len({sample.image for sample in asked.samples}) == 3


def test_a_limit_keeps_whole_groups_and_grows(tmp_path):
    benchmark, folder = BENCHMARKS["mme"], write("mme", tmp_path)
    smaller, larger = ({s.id for s in questions(benchmark, folder, limit=limit).samples} for limit in (7, 12))
    assert len(smaller) == 6
    assert smaller < larger
    assert len({questions(benchmark, folder).groups[name] for name in smaller}) == 3
    with pytest.raises(Refusal, match="--limit 1 holds no whole question"):
        questions(benchmark, folder, limit=1)


def test_a_limit_keeps_the_rotations_of_a_question_together(tmp_path):
    asked = questions(BENCHMARKS["mmbench-en"], write("mmbench-en", tmp_path), limit=3)
    first, second = asked.groups.values()
    assert int(second) - int(first) == 1_000_000


def test_the_number_of_an_option_becomes_its_letter(tmp_path):
    asked = questions(BENCHMARKS["sqa"], write("sqa", tmp_path))
    assert [sample.answers for sample in asked.samples] == [("A",), ("B",), ("C",), ("A",)]


def test_padding_is_that_of_llava():
    image = Image.new("RGB", (5, 2), (9, 9, 9))
    padded = square(image, (1, 2, 3))
    assert padded.size == (5, 5)
    assert [padded.getpixel((2, y))[0] for y in range(5)] == [1, 9, 9, 1, 1]  # 1 px above, 2 px below
    processor = SimpleNamespace(image_processor=SimpleNamespace(image_mean=[0.48145466, 0.4578275, 0.40821073]))
    assert padding(MODELS["llava-1.5-7b"], processor) == (122, 116, 104)


def test_files_of_the_hub_are_chosen_by_config_and_split():
    names = [
        "README.md",
        "data/test-00000-of-00002.parquet",
        "data/test-00001-of-00002-a25d.parquet",
        "Full/test-0.parquet",
    ]
    names += ["en/dev-00000-of-00001.parquet", "cn/dev-00000-of-00001.parquet", "data/testdev-00000-of-00001.parquet"]
    assert chosen(names, None, "test") == names[1:3]
    assert chosen(names, "cn", "dev") == ["cn/dev-00000-of-00001.parquet"]
    assert chosen(names, None, "testdev") == ["data/testdev-00000-of-00001.parquet"]


# -- the hub ---------------------------------------------------------------------------------------------------------

HUB = """
import json, sys
from tokensieve.reproduce import BENCHMARKS
from tokensieve.reproduce.files import fetch, on_the_hub
print(json.dumps([str(on_the_hub(BENCHMARKS["pope"])), str(fetch(BENCHMARKS["pope"]))]))
"""
COMMIT = "a" * 40


def test_files_are_fetched_once_and_then_found_without_a_network(tmp_path):
    """Fetch from a server that answers as the hub does; a README and another config stay there."""
    root = write("pope", tmp_path / "hub")
    names = [path.relative_to(root).as_posix() for path in root.rglob("*.parquet")]
    sent = []

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            path = self.path.partition("?")[0]
            if path == "/api/datasets/lmms-lab-encoder/POPE":
                siblings = [{"rfilename": name, "size": (root / name).stat().st_size} for name in names]
                body, headers = (
                    json.dumps({"id": "lmms-lab-encoder/POPE", "sha": COMMIT, "siblings": siblings}).encode(),
                    {},
                )
            else:
                name = path.partition("/resolve/main/")[2]
                body = (root / name).read_bytes()
                headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": COMMIT}
                sent.append((self.command, name))
            self.send_response(200)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    settings = {
        "HF_ENDPOINT": address,
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1",
    }

    def call(**more):
        program = [sys.executable, "-c", HUB]
        environment = os.environ | settings | more
        done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    try:
        listed, folder = call()
        assert listed == "2 files, 0.00 GB"
        assert len(questions(BENCHMARKS["pope"], Path(folder)).samples) == 6
        gets = [name for command, name in sent if command == "GET"]
        assert sorted(gets) == ["data/test-00000-of-00002.parquet", "data/test-00001-of-00002.parquet"]
        assert call()[1] == folder
        assert [name for command, name in sent if command == "GET"] == gets
    finally:
        server.shutdown()
        server.server_close()
    listed, cached = call(HF_HUB_OFFLINE="1")
    assert cached == folder
    assert listed.startswith("size unknown")


# -- published rows --------------------------------------------------------------------------------------------------


def test_every_published_row_names_a_recipe():
    rows = published_rows()
    assert len(rows) > 300
    assert {row.benchmark for row in rows} <= set(BENCHMARKS)
    assert {row.model for row in rows} <= set(MODELS)
    for table in json.loads(PUBLISHED.read_text("utf-8"))["tables"]:
        assert len(table.get("benchmarks", table["columns"])) == len(table["columns"])


def test_every_published_row_can_be_planned():
    for row in published_rows():
        target = find_target(row.name)
        assert row in target.published
        entries = Settings(keep_means=target.keep_means).plan([] if target.tokens is None else [target.method], [64])
        assert len(entries) == 1 + (target.tokens is not None)


def test_a_target_has_the_published_numbers_and_their_protocol():
    target = find_target("llava-1.5-7b/pope/vtc-cls@64")
    assert [(row.value, row.full) for row in target.published] == [(78.8, 85.9)]
    assert (target.method, target.tokens, target.keep_means, target.renumbers) == ("vtc-cls", 64, "final", True)
    inside = find_target("llava-1.5-7b/pope/fastv@64")
    assert sorted(row.value for row in inside.published) == [35.6, 37.2, 48.0]
    assert (inside.keep_means, inside.renumbers) == ("average", False)
    assert find_target("llava-1.5-7b/mme/full").published[0].value == 1510.7
    assert find_target("llava-1.5-7b/mme-total/divprune@64").published[0].value == 1674
    assert find_target("llava-1.5-7b/sqa/sparsevlm@64").method == "sparsevlm(appended=True)"
    assert find_target("llava-1.5-7b/pope/prumerge+@128").tokens == 128


@pytest.mark.parametrize("spec", OFFICIAL.values())
def test_official_specs_leave_the_budget_open(spec):
    assert parse(spec, keep=64)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pope", "a published row is named as in llava-1.5-7b/pope/vtc-cls@64"),
        ("llava-1.5-7b/pope/", "a published row is named as in"),
        ("llava-1.5-8b/pope/vtc-cls@64", "unknown model 'llava-1.5-8b'; did you mean llava-1.5-7b"),
        ("llava-1.5-7b/popee/vtc-cls@64", "unknown benchmark 'popee'; did you mean pope"),
        ("llava-1.5-7b/pope/vtc-clss@64", "vtc-clss"),
        ("llava-1.5-7b/pope/vtc-cls@63", "at 63 tokens on POPE with LLaVA-1.5-7B; published: vtc-cls@64, vtc-cls@128"),
        ("llava-1.5-7b/pope/vtc-cls", "lacks the number of tokens; published on POPE with LLaVA-1.5-7B: vtc-cls@64"),
        ("llava-1.5-7b/pope/vtc-cls@", "lacks the number of tokens"),
        ("llava-1.5-7b/pope/VTC-CLS@64", "unknown method 'VTC-CLS'; did you mean vtc-cls"),
        ("LLaVA-1.5-7b/POPE/vtc-cls@64", "unknown model 'LLaVA-1.5-7b'; did you mean llava-1.5-7b"),
        ("llava-1.5-7b/pope/evs@64", "no published number of evs on POPE"),
        ("llava-1.5-13b/pope/vtc-cls@64", "no published number of vtc-cls on POPE with LLaVA-1.5-13B; known: full"),
        ("llava-1.5-7b/pope/full@64", "the full model has no budget"),
    ],
)
def test_wrong_names_are_refused(name, message):
    with pytest.raises(Refusal, match=re.escape(message)):
        find_target(name)


# -- what the verdict depends on --------------------------------------------------------------------------------------


def llava(layers=32, width=4096):
    text = SimpleNamespace(num_hidden_layers=layers, hidden_size=width)
    vision = SimpleNamespace(image_size=336)
    return SimpleNamespace(
        config=SimpleNamespace(model_type="llava", get_text_config=lambda: text, vision_config=vision)
    )


def renders(text):
    return SimpleNamespace(apply_chat_template=lambda turns, add_generation_prompt: text)


def test_only_the_papers_model_and_prompt_leave_no_obstacle():
    target = find_target("llava-1.5-7b/pope/vtc-cls@64")
    prompt = conversation(target.model, "Q")
    assert obstacles_of(target, llava(), renders(prompt)) == []
    assert obstacles_of(target, llava(), renders(f"<s>{prompt} ")) == []
    assert obstacles_of(target, llava(layers=40, width=5120), renders(prompt)) == ["this model is not LLaVA-1.5-7B"]
    (prompted,) = obstacles_of(target, llava(), renders("USER: <image>\nQ ASSISTANT:"))
    assert "another prompt" in prompted
    judged = replace(target, benchmark=BENCHMARKS["mm-vet"])
    assert obstacles_of(judged, llava(), renders(prompt)) == ["scored by GPT-4 (the evaluator of MM-Vet)"]


def test_the_page_lists_every_recipe():
    page = (ROOT / "docs" / "reproduce.md").read_text("utf-8")
    for name, benchmark in BENCHMARKS.items():
        place = "/".join(filter(None, (benchmark.config, benchmark.split)))
        scored = "–" if benchmark.judge else f"`{benchmark.metric}`, {benchmark.total}"
        row = f"| `{name}` | {benchmark.title} | `{benchmark.dataset}` | {place} | {benchmark.questions:,} | {scored} |"
        assert row in page, row
