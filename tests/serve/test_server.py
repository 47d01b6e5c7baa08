"""`tokensieve serve` as a process: the answers, the stream, several images, faults beside good requests, the end."""

import json
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import tokensieve
from tests.cli.calling import run_many
from tests.serve.asgi import bomb, chat, data_url, png
from tests.serve.server import Server, free_port
from tokensieve import reference
from tokensieve.evaluate import decode
from tokensieve.reference.benchmark import Row, benchmark
from tokensieve.reference.vilt import ASKED

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
ROWS = benchmark(scenes=6, types=ASKED)[:40]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    limits = "--concurrency 4 --queue 8 --max-body-seconds 1 --max-images 3 --max-answer 300 --max-body 300000"
    choice = "--keep 36 --allow-keep --allow-method trsm --allow-method divprune --allow-method full"
    with Server(folder, *limits.split(), *choice.split()) as process:
        yield process


def expected(rows: tuple[Row, ...] | list[Row], method: str, **parameters: Any) -> list[str]:
    """Return the answers of the attached model, each question alone."""
    model, processor = reference.load()
    answers = []
    with tokensieve.attach(model, method, processor=processor, **parameters), torch.inference_mode():
        for row in rows:
            inputs = prompt(processor, [row.image], row.question)
            generated = model.generate(**inputs, max_new_tokens=4, do_sample=False)
            answers += decode(processor, generated, inputs["input_ids"].shape[1])
    return answers


def prompt(processor: Any, images: list[Any], question: str) -> Any:
    content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": question}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def question(row: Row, **more: Any) -> dict[str, Any]:
    return chat(data_url(row.image), text=row.question, **more)


def test_answers_equal_those_of_attach(server: Server) -> None:
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda row: server.answer(question(row)), ROWS))
    assert answers == expected(ROWS, "vtc-cls", keep=36)


@pytest.mark.parametrize(("method", "keep"), [("trsm", 16), ("divprune", 0.25), ("full", None)])
def test_a_request_chooses_method_and_budget(server: Server, method: str, keep: float | None) -> None:
    choice = {"tokensieve_method": method} | ({} if keep is None else {"tokensieve_keep": keep})
    answers = [server.answer(question(row, mm_processor_kwargs=choice)) for row in ROWS[:12]]
    assert answers == expected(ROWS[:12], method, **({} if keep is None else {"keep": keep}))


def test_a_stream_is_the_answer_in_pieces(server: Server) -> None:
    row = ROWS[0]
    with server.connect(question(row, stream=True) | {"max_tokens": 3}) as connection:
        text = read_until(connection, b"0\r\n\r\n").decode()
    assert "text/event-stream" in text
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    answer = "".join(event["choices"][0]["delta"].get("content", "") for event in events)
    assert answer.strip() == expected([row], "vtc-cls", keep=36)[0]
    assert events[-1]["choices"][0]["finish_reason"] in ("stop", "length")
    assert events[-1]["usage"]["completion_tokens"] >= 1


def test_the_client_of_openai(server: Server) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0)
    body = question(ROWS[3])
    answer = client.chat.completions.create(**body)
    assert answer.choices[0].message.content.strip() == expected([ROWS[3]], "vtc-cls", keep=36)[0]
    chunks = client.chat.completions.create(**body, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text.strip() == answer.choices[0].message.content.strip()
    assert [model.id for model in client.models.list()] == ["reference"]
    with pytest.raises(openai.BadRequestError, match="the limit is 3"):
        client.chat.completions.create(**chat(*[data_url(png())] * 4))


def test_the_example_of_the_page_runs(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("openai")
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "serving.md").read_text("utf-8"), re.S)
    exec(compile(code.replace(":8000", f":{server.port}"), "serving.md", "exec"), {"__name__": "serving.md"})
    assert capsys.readouterr().out.strip() == "what colour is the 1? green"


def test_two_images(server: Server) -> None:
    first, second = ROWS[0], ROWS[-1]
    model, processor = reference.load()
    inputs = prompt(processor, [first.image, second.image], first.question)
    with tokensieve.attach(model, "vtc-cls", keep=36, processor=processor), torch.inference_mode():
        generated = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    before = server.metrics()
    answer = server.answer(chat(data_url(first.image), data_url(second.image), text=first.question))
    assert answer == decode(processor, generated, inputs["input_ids"].shape[1])[0]
    after = server.metrics()
    grown = {
        name: after[name] - before[name] for name in before if name.startswith(("tokensieve_im", "tokensieve_vis"))
    }
    assert grown['tokensieve_images_total{method="vtc-cls"}'] == 2
    assert grown['tokensieve_visual_tokens_before_total{method="vtc-cls"}'] == 288
    assert grown['tokensieve_visual_tokens_after_total{method="vtc-cls"}'] == 72


def test_a_request_without_images_is_answered(server: Server) -> None:
    before = server.metrics()
    status, content = server.post(chat(text="what colour is the 1?", max_tokens=3))
    assert status == 200, content
    after = server.metrics()
    name = 'tokensieve_images_total{method="vtc-cls"}'
    assert after.get(name) == before.get(name)


def test_a_stop_string_ends_the_answer(server: Server) -> None:
    row = next(row for row in ROWS if row.type == "colour")
    colour = server.answer(question(row))
    body = question(row, stop=[colour], max_tokens=200)
    status, content = server.post(body)
    assert status == 200, content
    assert content["usage"]["completion_tokens"] == 1


def broken_png() -> bytes:
    """Return an image whose header is whole and whose pixels are not."""
    content = png(64, 64)
    return content[: len(content) // 2]


FAULTS: dict[str, tuple[Any, int, list[str]]] = {
    "malformed": (b'{"model": "reference",', 400, ["not JSON"]),
    "bomb": (chat(data_url(bomb())), 400, ["pixels", "the limit is"]),
    "broken pixels": (chat(data_url(broken_png())), 400, ["image 0", "cannot be read"]),
    "wrong base64": (chat("data:image/png;base64,@@"), 400, ["base64"]),
    "a thousand images": (chat(*["data:,"] * 1000), 400, ["1,000", "3"]),
    "placeholder": (chat(data_url(png()), text="<image> and?"), 400, ["leave <image> out"]),
    "unknown model": (chat(model="other"), 404, ["'other'", "reference"]),
    "large body": (b" " * 400_000, 413, ["400,000", "300,000"]),
    "unknown field": (chat(cheese=1), 400, ["cheese"]),
    "two answers": (chat(n=2), 400, ["n must be 1"]),
    "own template": (chat(chat_template_kwargs={"chat_template": "x"}), 400, ["chat_template_kwargs"]),
    "generation_config": (chat(generation_config='{"num_beams": 99}'), 400, ["generation_config"]),
    "too long together": (chat(text="what " * 1900, max_tokens=300), 400, ["tokens"]),
    "not allowed": (chat(mm_processor_kwargs={"tokensieve_method": "random"}), 400, ["random", "trsm"]),
    "logit_bias": (chat(logit_bias={"x": 1}), 400, ["logit_bias", "'x'"]),
    "logit_bias of no token": (chat(logit_bias={"99999": 1}), 400, ["logit_bias", "'99999'"]),
    "logit_bias text": (chat(logit_bias={"9": "x"}), 400, ["logit_bias", "x"]),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_harms_no_request_beside_it(server: Server, name: str) -> None:
    body, status, words = FAULTS[name]
    with ThreadPoolExecutor(2) as pool:
        wrong = pool.submit(server.post, body)
        right = pool.submit(server.answer, question(ROWS[1]))
        code, content = wrong.result()
        assert right.result() == expected([ROWS[1]], "vtc-cls", keep=36)[0]
    assert code == status, content
    message = content["error"]["message"]
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_a_slow_client_gets_408_and_harms_no_request_beside_it(server: Server) -> None:
    content = json.dumps(question(ROWS[0])).encode()
    with server.connect(question(ROWS[0]), sent=1) as connection:
        dripping = threading.Thread(target=drip, args=(connection, content[1:]), daemon=True)
        dripping.start()
        assert server.answer(question(ROWS[1])) == expected([ROWS[1]], "vtc-cls", keep=36)[0]
        answer = read_until(connection, b"}}")
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"slow_body" in answer


def drip(connection: socket.socket, content: bytes) -> None:
    """Send one byte after the other."""
    try:
        for byte in content:
            connection.sendall(bytes([byte]))
            time.sleep(0.05)
    except OSError:
        pass


def read_until(connection: socket.socket, end: bytes) -> bytes:
    received = b""
    while end not in received:
        block = connection.recv(1 << 16)
        if not block:
            break
        received += block
    return received


# A bias on "what" keeps the answer from ending before max_tokens.
def endless(row: Row, **more: Any) -> dict[str, Any]:
    _, processor = reference.load()
    (token,) = processor.tokenizer.convert_tokens_to_ids(["red"])
    return question(row, max_tokens=300, logit_bias={str(token): 100}, **more)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_stops_its_generation(server: Server, stream: bool) -> None:
    before = server.metrics()
    connection = server.connect(endless(ROWS[0], stream=stream))
    if stream:
        read_until(connection, b"content")
    else:
        time.sleep(0.2)
    connection.close()
    start = time.monotonic()
    assert server.answer(question(ROWS[1])) == expected([ROWS[1]], "vtc-cls", keep=36)[0]
    assert time.monotonic() - start < 10
    after = server.metrics()
    name = 'tokensieve_requests_total{outcome="cancelled"}'
    assert after[name] == before[name] + 1
    assert after["tokensieve_requests_running"] == 0


def test_metrics_equal_the_requests(server: Server) -> None:
    before = server.metrics()
    for row in ROWS[:5]:
        server.answer(question(row))
    server.post(chat("data:image/png;base64,@@"))
    after = server.metrics()

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0.0)

    assert grown('tokensieve_requests_total{outcome="answered"}') == 5
    assert grown('tokensieve_requests_total{outcome="rejected"}') == 1
    assert grown('tokensieve_rejected_total{reason="broken_image"}') == 1
    assert grown('tokensieve_images_total{method="vtc-cls"}') == 5
    assert grown('tokensieve_visual_tokens_before_total{method="vtc-cls"}') == 720
    assert grown('tokensieve_visual_tokens_after_total{method="vtc-cls"}') == 180
    _, processor = reference.load()
    lengths = [prompt(processor, [row.image], row.question)["input_ids"].shape[1] for row in ROWS[:5]]
    assert grown("tokensieve_prefill_tokens_total") == sum(length - 108 for length in lengths)
    dropped = sum(after[name] for name in after if name.startswith("tokensieve_visual_tokens_before_total"))
    dropped -= sum(after[name] for name in after if name.startswith("tokensieve_visual_tokens_after_total"))
    rate = after["tokensieve_prefill_seconds_total"] / after["tokensieve_prefill_tokens_total"]
    assert after["tokensieve_prefill_seconds_saved"] == pytest.approx(rate * dropped)


def test_sigterm_lets_a_stream_finish_within_the_grace(tmp_path: Any) -> None:
    model, processor = reference.load()
    model.save_pretrained(tmp_path / "mine")  # a folder is served under its last name
    processor.save_pretrained(tmp_path / "mine")
    options = ["--keep", "36", "--grace", "4", "--max-answer", "2000"]
    with Server(tmp_path, *options, model=str(tmp_path / "mine")) as process:
        short, long = (endless(ROWS[0], stream=True, model="mine") | {"max_tokens": most} for most in (60, 1800))
        with process.connect(short) as first:
            text = read_until(first, b'"content":')  # it generates: the second waits for its end
            second = process.connect(long)
            text_of_second = second.recv(1)  # its headers: the server has accepted it
            start = time.monotonic()
            process.process.send_signal(signal.SIGTERM)
            time.sleep(0.1)
            with pytest.raises(OSError, match="refused"):  # no new requests
                process.get("/health")
            text += read_until(first, b"0\r\n\r\n")
            assert b'"finish_reason":"length"' in text
            with second:
                assert b'"finish_reason":"' not in text_of_second + read_until(second, b"0\r\n\r\n")
        assert process.process.wait(20) == 0
        assert time.monotonic() - start < 10


def test_wrong_options_exit_with_one_line() -> None:
    transformers = ["--engine", "transformers"]
    with socket.socket() as used:
        used.bind(("127.0.0.1", 0))
        used.listen()
        port = used.getsockname()[1]
        calls = {
            "/no/such/model": ["/no/such/model", *transformers],
            "'vtc-clss'": ["reference", "--method", "vtc-clss"],
            "'many'": ["reference", "--keep", "many"],
            "tomee": ["reference", "--allow-method", "tomee"],
            "'v1'": ["reference", "--allow-path", "v1"],
            "body_seconds": ["reference", "--max-body-seconds", "-1"],
            f"127.0.0.1:{port}": ["reference", "--port", str(port), *transformers],
            "are for vLLM": ["reference", *transformers, "--", "--max-model-len", "99"],
            "chat requests only": ["reference", *transformers, "--allow-path", "/v1/completions"],
            "evs(keep=0.25)": ["reference", *transformers, "--port", str(free_port()), "--allow-method", "evs"],
        }
        outcomes = run_many({word: ["serve", *arguments] for word, arguments in calls.items()})
        for word, outcome in outcomes.items():
            assert word in outcome.refused()
