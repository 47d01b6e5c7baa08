"""The guard before a small app: every limit, every kind of wrong request, and the requests beside them."""

import asyncio
import json
import time
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from tests.serve.asgi import Answer, bomb, chat, data_url, picture, png, post
from tokensieve import tally
from tokensieve.errors import Refusal
from tokensieve.serve import Limits, Settings, fetch
from tokensieve.serve.guard import Guard
from tokensieve.serve.metrics import Prefill

LIMITS = Limits(
    body_bytes=100_000,
    body_seconds=0.5,
    images=2,
    pixels=10_000,
    prompt_characters=100,
    answer_tokens=50,
    concurrency=2,
    queue=1,
)


class Engine:
    """Answers with the texts of a request, when it may; remembers what it received."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.running = self.most = self.cancelled = 0
        self.status = 200

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["method"] == "GET":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"ok"})
            return
        message = await receive()
        declared = dict(scope["headers"])[b"content-length"]
        assert int(declared) == len(message["body"])
        assert not message["more_body"]
        self.bodies.append(json.loads(message["body"]))
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await send({"type": "http.response.start", "status": self.status, "headers": []})
            for number in range(3):
                await self.may_answer.wait()
                block = b"data: %d\n\n" % number
                await send({"type": "http.response.body", "body": block, "more_body": number < 2})
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1


class House:
    def __init__(self, **changes: Any) -> None:
        self.registry, self.engine = CollectorRegistry(), Engine()
        self.settings = Settings(models=("reference",), **{"limits": LIMITS, **changes})
        self.guard = Guard(self.engine, self.settings, self.registry, Prefill())

    async def post(self, *args: Any, **kwargs: Any) -> Answer:
        return await post(self.guard, *args, **kwargs)

    def metrics(self) -> str:
        return generate_latest(self.registry).decode()


def refused(body: Any, house: House | None = None, **request: Any) -> tuple[int, str, str]:
    """Return status, reason and message of a refused request; a good request beside it is answered."""

    async def both() -> tuple[Answer, Answer, House]:
        server = house or House()
        wrong, right = await asyncio.gather(server.post(body, **request), server.post(chat(data_url(png()))))
        return wrong, right, server

    wrong, right, server = asyncio.run(both())
    assert right.status == 200
    assert b"".join(right.blocks) == b"data: 0\n\ndata: 1\n\ndata: 2\n\n"
    error = wrong.error
    assert set(error) == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]
    assert len(error["message"]) < 400
    assert f'tokensieve_rejected_total{{reason="{error["code"]}"}} 1.0' in server.metrics()
    assert 'tokensieve_requests_total{outcome="answered"} 1.0' in server.metrics()
    assert len(server.engine.bodies) == 1  # the engine did not receive the wrong one
    return wrong.status, error["code"], error["message"]


GOOD = data_url(png())
TOO_BIG = chat(data_url(png(101, 100)))
WRONG: dict[str, tuple[Any, int, str, list[str]]] = {
    "no JSON": (b'{"model": ', 400, "not_json", ["not JSON", "line 1"]),
    "no UTF-8": (b'{"model": "\xff"}', 400, "not_json", ["utf-8"]),
    "NaN": (b'{"model": "reference", "temperature": NaN}', 400, "not_json", ["NaN"]),
    "nested": (b'{"model": ' + b"[" * 50_000, 400, "not_json", ["nested"]),
    "a long integer": (b'{"seed": 1' + b"0" * 9_000 + b"}", 400, "not_json", ["not JSON"]),
    "a list": ([1], 400, "wrong_type", ["a JSON object", "a list"]),
    "no model": ({"messages": []}, 400, "wrong_type", ["model", "nothing", "reference"]),
    "another model": (chat(model="gpt-5"), 404, "unknown_model", ["'gpt-5'", "served: reference"]),
    "no messages": (chat(messages=[]), 400, "wrong_type", ["messages", "at least one"]),
    "messages text": (chat(messages="hello"), 400, "wrong_type", ["messages", "hello"]),
    "role": (chat(messages=[{"role": "king", "content": "x"}]), 400, "wrong_type", ["messages[0]", "king", "user"]),
    "content": (chat(messages=[{"role": "user", "content": 3}]), 400, "wrong_type", ["messages[0].content", "3"]),
    "part": (chat(messages=[{"role": "user", "content": [{"type": "video_url"}]}]), 400, "wrong_type", ["video_url"]),
    "text part": (
        chat(messages=[{"role": "user", "content": [{"type": "text", "text": 3}]}]),
        400,
        "wrong_type",
        ["content[0].text", "3"],
    ),
    "a user's cache key": (
        chat(messages=[{"role": "user", "content": [{**picture(GOOD), "uuid": "yours"}]}]),
        400,
        "wrong_type",
        ["messages[0].content[0]"],
    ),
    "half a character": (chat(text="\ud800"), 400, "wrong_type", ["not valid text"]),
    "temperature": (chat(temperature="hot"), 400, "wrong_type", ["temperature", "hot", "0 to 2"]),
    "temperature range": (chat(temperature=9), 400, "wrong_type", ["temperature", "9"]),
    "max_tokens": (chat(max_tokens=51), 400, "wrong_type", ["max_tokens", "51", "1 to 50"]),
    "max_tokens true": (chat(max_tokens=True), 400, "wrong_type", ["max_tokens", "true"]),
    "max_completion_tokens": (chat(max_completion_tokens=0), 400, "wrong_type", ["max_completion_tokens"]),
    "seed": (chat(seed=2**70), 400, "wrong_type", ["seed"]),
    "stream": (chat(stream="yes"), 400, "wrong_type", ["stream", "yes"]),
    "stop": (chat(stop=[""]), 400, "wrong_type", ["stop"]),
    "tools": (chat(tools=["x"]), 400, "wrong_type", ["tools"]),
    "tool calls": (
        chat(messages=[{"role": "assistant", "tool_calls": "x"}]),
        400,
        "wrong_type",
        ["messages[0].tool_calls", "x"],
    ),
    "arguments of a call": (
        chat(messages=[{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]),
        400,
        "wrong_type",
        ["messages[0].tool_calls", "JSON of an object"],
    ),
    "long tools": (chat(tools=[{"description": "x" * 101}]), 400, "prompt_too_long", ["100"]),
    "keep": (chat(mm_processor_kwargs={"tokensieve_keep": 3}), 400, "wrong_option", ["tokensieve_keep", "no choice"]),
    "method": (chat(mm_processor_kwargs={"tokensieve_method": "trsm"}), 400, "wrong_option", ["trsm", "no choice"]),
    "pixels by request": (chat(mm_processor_kwargs={"max_pixels": 9}), 400, "wrong_type", ["max_pixels"]),
    "two answers": (chat(n=2), 400, "wrong_type", ["n must be 1", "2"]),
    "top_k": (chat(top_k=10**30), 400, "wrong_type", ["top_k", "1000000"]),
    "all logprobs": (chat(logprobs=True, top_logprobs=-1), 400, "wrong_type", ["top_logprobs", "0 to 20"]),
    "logprobs": (chat(logprobs=5), 400, "wrong_type", ["logprobs", "true or false"]),
    "min_tokens": (chat(min_tokens=51), 400, "wrong_type", ["min_tokens", "0 to 50"]),
    "an infinite penalty": (
        json.dumps(chat(repetition_penalty=7)).replace("7}", "1e999}").encode(),
        400,
        "wrong_type",
        ["repetition_penalty", "0.1 to 10"],
    ),
    "many biases": (
        chat(logit_bias={str(token): 1 for token in range(1025)}),
        400,
        "wrong_type",
        ["logit_bias", "at most 1,024"],
    ),
    "a long grammar": (
        chat(response_format={"type": "json_schema", "json_schema": {"schema": {"pattern": "x" * 101}}}),
        400,
        "prompt_too_long",
        ["100"],
    ),
    "text in a name": (
        chat(messages=[{"role": "user", "content": "x", "name": "x" * 101}]),
        400,
        "prompt_too_long",
        ["102", "100"],
    ),
    "text in an unknown field": (
        chat(messages=[{"role": "user", "content": "x", "documents": "x"}]),
        400,
        "unknown_field",
        ["messages[0].documents"],
    ),
    "a line of pixels": (chat(data_url(png(1, 201))), 400, "image_too_large", ["1 x 201", "200 times"]),
    "long text": (chat(text="x" * 101), 400, "prompt_too_long", ["101", "100"]),
    "three images": (chat(*[GOOD] * 3), 400, "too_many_images", ["3", "2"]),
    "a thousand images": (chat(*["data:,"] * 1000), 400, "too_many_images", ["1,000", "2"]),
    "a large image": (TOO_BIG, 400, "image_too_large", ["101 x 100", "10,000"]),
    "a bomb": (chat(data_url(bomb())), 400, "image_too_large", ["2,500,000,000 pixels", "limit is 10,000 pixels"]),
    "a second bomb": (
        chat(GOOD, data_url(bomb(9_000, 9_000))),
        400,
        "image_too_large",
        ["content[1]", "9,000 x 9,000"],
    ),
    "no base64": (chat("data:image/png;base64,***"), 400, "broken_image", ["content[0]", "base64"]),
    "no image": (chat(data_url(b"hello")), 400, "broken_image", ["content[0]", "not an image", "PNG"]),
    "empty image": (chat(data_url(b"")), 400, "broken_image", ["content[0]"]),
    "PostScript": (chat(data_url(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")), 400, "broken_image", ["PNG"]),
    "no comma": (chat("data:image/png"), 400, "broken_image", ["data URL"]),
    "a path": (chat("/etc/passwd"), 400, "broken_image", ["data URL", "/etc/passwd"]),
    "a file URL": (chat("file:///etc/passwd"), 400, "broken_image", ["data URL"]),
    "a remote image": (chat("http://example.com/x.png"), 400, "remote_image", ["--allow-urls"]),
    "image_url number": (
        chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": 3}]}]),
        400,
        "wrong_type",
        ["image_url", "3"],
    ),
    "large body": (b" " * 100_001, 413, "body_too_large", ["100,001", "100,000"]),
}


UNKNOWN = {
    "chat_template": "{{ messages }}",
    "chat_template_kwargs": {"chat_template": "x"},
    "documents": [{"text": "x"}],
    "add_generation_prompt": False,
    "add_special_tokens": False,
    "continue_final_message": True,
    "media_io_kwargs": {"image": {"image_mode": "L"}},
    "multi_modal_data": {"image": "x"},
    "multi_modal_uuids": {"image": ["yours"]},
    "prompt_embeds": "x",
    "truncate_prompt_tokens": 9,
    "priority": -9,
    "best_of": 9,
    "use_beam_search": True,
    "prompt_logprobs": 9,
    "logprob_token_ids": [1],
    "stop_token_ids": [10**9],
    "allowed_token_ids": [1],
    "bad_words": ["x"],
    "logits_processors": ["os.system"],
    "structured_outputs": {"regex": "(a*)*b"},
    "guided_regex": "(a*)*b",
    "kv_transfer_params": {"do_remote_prefill": True},
    "ec_transfer_params": {"x": 1},
    "vllm_xargs": {"x": 1},
    "request_id": "yours",
    "generation_config": '{"num_beams": 99}',
    "cheese": 1,
}


@pytest.mark.parametrize("key", UNKNOWN)
def test_a_field_that_no_check_bounds_does_not_reach_the_engine(key: str) -> None:
    status, reason, message = refused(chat(**{key: UNKNOWN[key]}))
    assert (status, reason) == (400, "unknown_field")
    assert key in message


@pytest.mark.parametrize(
    "body",
    [
        chat(text="<image> what?"),
        chat(messages=[{"role": "system", "content": "<image>"}]),
        chat(tools=[{"description": "<image>"}]),
    ],
    ids=["part", "string", "tool"],
)
def test_a_text_may_not_hold_the_place_of_an_image(body: Any) -> None:
    status, reason, message = refused(body, House(placeholders=("<image>", "<video>")))
    assert (status, reason) == (400, "placeholder")
    assert "<image>" in message


def test_fields_that_concern_one_answer_are_passed_on() -> None:
    fields = {
        "n": 1,
        "min_tokens": 2,
        "top_k": 5,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "ignore_eos": True,
        "skip_special_tokens": False,
        "stream_options": {"include_usage": True},
        "logprobs": True,
        "top_logprobs": 3,
        "logit_bias": {"7": 1},
        "response_format": {"type": "json_object"},
        "user": "u",
        "cache_salt": "s",
        "chat_template": None,
    }
    # an answer of the openai package, sent back as it is
    earlier = {"role": "assistant", "content": "red", "refusal": None, "annotations": [], "audio": None}
    house, body = House(), chat(**fields)
    body["messages"] = [{"role": "user", "content": "x"}, earlier, *body["messages"]]
    assert asyncio.run(house.post(body)).status == 200
    assert house.engine.bodies == [body]


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_request_gets_one_clear_line(name: str) -> None:
    body, status, reason, words = WRONG[name]
    outcome = refused(body)
    assert outcome[:2] == (status, reason)
    for word in words:
        assert word in outcome[2]


def test_a_body_without_a_length_is_cut_at_the_limit() -> None:
    status, reason, message = refused(b" " * 300_000, headers={"content-length": ""}, block=50_000)
    assert (status, reason) == (413, "body_too_large")
    assert "100,000" in message


@pytest.mark.parametrize(
    ("headers", "word"), [({"content-type": "text/plain"}, "text/plain"), ({"content-encoding": "gzip"}, "gzip")]
)
def test_bodies_are_plain_json(headers: dict[str, str], word: str) -> None:
    status, reason, message = refused(chat(), headers=headers)
    assert (status, reason) == (415, "not_json")
    assert word in message


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/responses", "/load_model", "/v1/chat/completions/"])
def test_other_paths_are_not_served(path: str) -> None:
    status, reason, message = refused(chat(), path=path)
    assert (status, reason) == (404, "not_served")
    assert "/v1/chat/completions" in message


def test_an_allowed_path_is_passed_on() -> None:
    house = House(paths=("/v1/completions",))
    answer = asyncio.run(house.post({"prompt": "anything"}, path="/v1/completions"))
    assert answer.status == 200
    assert house.engine.bodies == [{"prompt": "anything"}]


def test_a_slow_body_gets_408_in_time() -> None:
    start = time.monotonic()
    status, reason, message = refused(chat(), pace=lambda _: 0.05, block=1)
    assert (status, reason) == (408, "slow_body")
    assert "0.5 seconds" in message
    assert time.monotonic() - start < 2


def test_slow_bodies_take_no_place_in_the_engine() -> None:
    async def run() -> None:
        house = House()
        slow = [asyncio.ensure_future(house.post(chat(), pace=lambda _: 0.05, block=1)) for _ in range(20)]
        await asyncio.sleep(0.05)
        start = time.monotonic()
        assert (await house.post(chat())).status == 200
        assert time.monotonic() - start < 0.3
        assert {answer.status for answer in await asyncio.gather(*slow)} == {408}

    asyncio.run(run())


def test_the_number_of_arriving_bodies_is_bounded() -> None:
    async def run() -> None:
        house = House(limits=Limits(body_seconds=0.3, receiving=3))
        slow = [asyncio.ensure_future(house.post(chat(), pace=lambda _: 0.05, block=1)) for _ in range(3)]
        await asyncio.sleep(0.05)
        answer = await house.post(chat())
        assert answer.status == 503
        assert answer.headers["retry-after"] == "1"
        await asyncio.gather(*slow)
        assert (await house.post(chat())).status == 200

    asyncio.run(run())


def test_beyond_the_queue_requests_get_429_and_the_others_an_answer() -> None:
    async def run() -> None:
        house = House()
        house.engine.may_answer.clear()
        waiting = [asyncio.ensure_future(house.post(chat())) for _ in range(3)]
        await asyncio.sleep(0.2)
        text = house.metrics()
        assert "tokensieve_requests_running 2.0" in text
        assert "tokensieve_requests_waiting 1.0" in text
        answer = await house.post(chat())
        assert answer.status == 429
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.error["code"] == "busy"
        house.engine.may_answer.set()
        assert [answer.status for answer in await asyncio.gather(*waiting)] == [200] * 3
        assert house.engine.most == 2
        assert 'tokensieve_requests_total{outcome="answered"} 3.0' in house.metrics()

    asyncio.run(run())


@pytest.mark.parametrize("place", ["running", "waiting"])
def test_a_client_that_leaves_frees_its_place(place: str) -> None:
    async def run() -> None:
        house = House(limits=Limits(concurrency=1, queue=1))
        house.engine.may_answer.clear()
        leave = asyncio.Event()
        first = asyncio.ensure_future(house.post(chat(), leave=leave if place == "running" else None))
        await asyncio.sleep(0.1)
        second = asyncio.ensure_future(house.post(chat(), leave=leave if place == "waiting" else None))
        await asyncio.sleep(0.1)
        leave.set()
        await asyncio.sleep(0.1)
        assert house.engine.cancelled == (place == "running")
        house.engine.may_answer.set()
        answers = await asyncio.gather(first, second)
        assert sorted(len(answer.blocks) for answer in answers) == [0, 3]
        assert 'tokensieve_requests_total{outcome="cancelled"} 1.0' in house.metrics()
        assert (await house.post(chat())).status == 200

    asyncio.run(run())


def test_a_stream_passes_block_by_block() -> None:
    async def run() -> None:
        house = House()
        house.engine.may_answer.clear()
        blocks: list[bytes] = []
        answer = asyncio.ensure_future(house.post(chat(stream=True)))
        await asyncio.sleep(0.1)
        assert not answer.done()
        house.engine.may_answer.set()
        blocks = (await answer).blocks
        assert blocks == [b"data: 0\n\n", b"data: 1\n\n", b"data: 2\n\n"]

    asyncio.run(run())


def test_the_engine_receives_the_request_that_was_checked() -> None:
    house = House()
    twice = json.dumps(chat())[:-1] + ', "max_tokens": 7}'  # two values of one key
    asyncio.run(house.post(twice.encode()))
    assert house.engine.bodies == [chat(max_tokens=7)]


def test_errors_and_refusals_of_the_engine_are_counted() -> None:
    house = House()
    for house.engine.status in (500, 400):
        asyncio.run(house.post(chat()))
    assert 'tokensieve_requests_total{outcome="failed"} 1.0' in house.metrics()
    assert 'tokensieve_rejected_total{reason="engine"} 1.0' in house.metrics()


def test_a_request_chooses_among_what_is_allowed() -> None:
    house = House(methods=("vtc-cls", "divprune"), allow_keep=True)
    for choice in ({"tokensieve_keep": 16}, {"tokensieve_keep": 0.25, "tokensieve_method": "divprune"}):
        assert asyncio.run(house.post(chat(mm_processor_kwargs=choice))).status == 200
    assert [body["mm_processor_kwargs"] for body in house.engine.bodies][1]["tokensieve_method"] == "divprune"
    for choice, words in (
        ({"tokensieve_method": "random"}, ["random", "vtc-cls, divprune"]),
        ({"tokensieve_keep": 0}, ["0"]),
        ({"tokensieve_keep": 1.5}, ["1.5"]),
        ({"tokensieve_keep": True}, ["true"]),
        ({"tokensieve_keep": "64"}, ["64"]),
    ):
        answer = asyncio.run(house.post(chat(mm_processor_kwargs=choice)))
        assert answer.error["code"] == "wrong_option"
        assert all(word in answer.error["message"] for word in words)


def test_an_answer_with_tool_calls_may_stand_in_the_messages() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [call]}]
    house = House(limits=Limits())
    assert asyncio.run(house.post(chat(messages=messages))).status == 200


def test_web_sockets_are_closed() -> None:
    async def run() -> None:
        messages: list[Any] = []

        async def send(message: Any) -> None:
            messages.append(message)

        await House().guard({"type": "websocket", "path": "/v1/realtime"}, None, send)  # type: ignore[arg-type]
        assert [message["type"] for message in messages] == ["websocket.close"]

    asyncio.run(run())


def test_other_methods_than_post_are_read_or_refused() -> None:
    house = House()
    assert asyncio.run(house.post(b"", method="GET", path="/health")).blocks == [b"ok"]
    assert asyncio.run(house.post(b"", method="DELETE", path="/v1/models/x")).status == 404


def test_metrics_show_the_tally_and_the_estimate() -> None:
    before = tally.snapshot().get("metrics-test", tally.Counts())
    assert before.images == 0
    prefill, registry = Prefill(), CollectorRegistry()
    Guard(Engine(), Settings(models=("m",)), registry, prefill)
    prefill.add(tokens=100, seconds=0.5)
    prefill.add(tokens=300, seconds=1.5)
    dropped = sum(counts.before - counts.after for counts in tally.snapshot().values())
    tally.add("metrics-test", 144, 44)
    text = generate_latest(registry).decode()
    assert 'tokensieve_images_total{method="metrics-test"} 1.0' in text
    assert 'tokensieve_visual_tokens_before_total{method="metrics-test"} 144.0' in text
    assert 'tokensieve_visual_tokens_after_total{method="metrics-test"} 44.0' in text
    assert "tokensieve_prefill_tokens_total 400.0" in text
    (line,) = [line for line in text.splitlines() if line.startswith("tokensieve_prefill_seconds_saved ")]
    assert float(line.split()[1]) == pytest.approx((dropped + 100) * 0.005)


def test_beside_vllm_the_estimate_reads_its_metrics() -> None:
    from prometheus_client import Counter, Histogram

    registry = CollectorRegistry()
    tokens = Counter("vllm:prompt_tokens", "x", ["engine"], registry=registry)
    times = Histogram("vllm:request_prefill_time_seconds", "x", ["engine"], registry=registry)
    Guard(Engine(), Settings(models=("m",)), registry)
    tally.add("vllm-test", 300, 100)
    tokens.labels("0").inc(1000)
    times.labels("0").observe(2.0)
    dropped = sum(counts.before - counts.after for counts in tally.snapshot().values())
    assert f"tokensieve_prefill_seconds_saved {dropped * 0.002}" in generate_latest(registry).decode()


def test_settings_travel_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    more: dict[str, Any] = {"allow_urls": True, "allow_keep": True, "begin_of_text": True}
    settings = Settings(("a", "b"), LIMITS, methods=("x",), paths=("/p",), **more)
    with pytest.raises(Refusal, match="TOKENSIEVE_SERVE"):
        Settings.from_environment()
    for name, value in settings.to_environment().items():
        monkeypatch.setenv(name, value)
    assert Settings.from_environment() == settings
    assert Guard(Engine(), registry=CollectorRegistry())._settings == settings


@pytest.mark.parametrize("change", [{"concurrency": 0}, {"body_seconds": float("nan")}, {"images": -1}])
def test_wrong_limits_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(Refusal, match=next(iter(change))):
        Limits(**change)


# -- images on the web ------------------------------------------------------------------------------------------------


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Serve paths on a port of this machine: an image, a redirect, a slow and an endless answer."""
    import threading
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append((self.path, self.headers["Host"]))
            self.send_response(302 if self.path == "/redirect" else 404 if self.path == "/none" else 200)
            self.send_header("Location", "http://127.0.0.1/")
            self.end_headers()
            if self.path == "/image.png":
                self.wfile.write(png())
            if self.path == "/endless":
                for _ in range(100):
                    self.wfile.write(b"x" * 10_000)
            if self.path == "/slow":
                time.sleep(1)

        def log_message(self, *_: Any) -> None:
            pass

    seen: list[tuple[str, str]] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.seen = seen  # type: ignore[attr-defined]
    yield server
    server.shutdown()


def remote(url: str) -> dict[str, Any]:
    return asyncio.run(House(allow_urls=True).post(chat(url))).error


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "[::1]", "10.0.0.1", "192.168.1.1", "169.254.169.254", "[::ffff:127.0.0.1]", "0"]
)
def test_private_addresses_are_never_fetched(host: str, web: Any) -> None:
    error = remote(f"http://{host}:{web.server_port}/image.png")
    assert error["code"] == "remote_image"
    assert "not public" in error["message"]
    assert not web.seen


@pytest.mark.parametrize("url", ["http://", "http://user@example.com/", "http://x y/", "http://example.com:port/"])
def test_odd_urls_are_refused(url: str) -> None:
    assert remote(url)["code"] == "remote_image"


def test_images_on_the_web_reach_the_engine_as_data(web: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "is_public", lambda address: True)
    house, url = House(allow_urls=True), f"http://localhost:{web.server_port}/image.png"
    assert asyncio.run(house.post(chat(url))).status == 200
    part = house.engine.bodies[0]["messages"][0]["content"][0]
    assert part["image_url"]["url"].partition(",")[2] == data_url(png()).partition(",")[2]
    assert web.seen == [("/image.png", f"localhost:{web.server_port}")]


@pytest.mark.parametrize(
    ("path", "word"),
    [("/redirect", "redirect"), ("/none", "404"), ("/endless", "100,000 bytes"), ("/slow", "timed out")],
)
def test_redirects_errors_and_endless_answers_are_refused(
    path: str, word: str, web: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "is_public", lambda address: True)
    error = remote(f"http://127.0.0.1:{web.server_port}{path}")
    assert error["code"] == "remote_image"
    assert word in error["message"]


def test_a_name_with_one_private_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [(2, 1, 6, "", (address, 80)) for address in ("93.184.216.34", "10.0.0.7")]
    monkeypatch.setattr(fetch.socket, "getaddrinfo", lambda *args, **kwargs: entries)
    assert "10.0.0.7" in remote("http://example.com/x.png")["message"]
