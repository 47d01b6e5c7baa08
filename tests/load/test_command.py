"""``tokensieve bench --server`` as users call it, against servers of this process."""

import json
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.cli.calling import COMMAND, ENVIRONMENT, run_many
from tests.load.server import FakeServer

SMALL = ("--image-sizes", "32", "--prompt-words", "3", "--output-tokens", "2", "--concurrency", "2", "--requests", "4")


@pytest.fixture
def server():
    fake = FakeServer(budgets=True)
    with fake.in_a_thread():
        yield fake


def test_two_servers_as_a_table_as_json_and_resumed(server: FakeServer, tmp_path: Path):
    against = FakeServer()
    with against.in_a_thread():
        sides = ("--server", f"{server.url}/v1", "--against", against.url)
        common = ("bench", *sides, *SMALL, "--repeats", "5", "--output", str(tmp_path))
        calls = {
            "table": common,
            "json": (*common, "--rates", "200", "--json"),
            "limit": (*common, "--repeats", "1000000", "--limit-seconds", "1"),
        }
        outcomes = run_many(calls)
    for outcome in outcomes.values():
        assert outcome.code == 0, outcome.err
    table, report = outcomes["table"], json.loads(outcomes["json"].out)
    assert re.search(r"^ ?32 +3 +2 +2 users +110 → 110 ", table.out, re.M)
    assert re.search(r"^Reducing .*pay.* at 2 users, 3 words and 2 output tokens\.$", table.out, re.M)
    assert "note: both sides count 110 prompt tokens" in table.err
    assert "32 px, 3 words, 2 tokens, 2 users: " in table.err
    closed, opened = report["cells"]
    assert (closed["rounds"], closed["cell"]["users"], opened["cell"]["rate"]) == (5, 2, 200)
    assert closed["full"]["output_tokens"] == 2
    assert closed["verdict"] in ("pays", "does not pay", "not told apart")
    assert closed["throughput"]["low"] <= closed["throughput"]["median"] <= closed["throughput"]["high"]
    assert json.loads((tmp_path / "load.json").read_text())["setup"] == report["setup"]
    assert "stopped after --limit-seconds 1; the same command continues" in outcomes["limit"].err
    assert re.search(r"^ ?32 ", outcomes["limit"].out, re.M), "the finished rounds are shown"
    lines = (tmp_path / "rounds.jsonl").read_text().splitlines()
    rates = [json.loads(line)["cell"]["rate"] for line in lines[1:11]]
    assert rates == [None] * 5 + [200.0] * 5, "the second call measured the open loop only"
    assert all("mm_processor_kwargs" not in body for body in against.bodies)


def test_one_server_gets_the_budget_in_each_request_and_failures_are_reported(server: FakeServer, tmp_path: Path):
    server.models = ("toy", "other")
    one = ("bench", "--server", server.url, "--model", "toy", "--keep", "25%", *SMALL, "--repeats", "1")
    broken = FakeServer(budgets=True, status=lambda number: 503 if number > 6 and number % 3 == 0 else 200)
    with broken.in_a_thread():
        outcomes = run_many(
            {
                "good": (*one, "--method", "divprune", "--output", tmp_path / "good", "--json"),
                "broken": ("bench", "--server", broken.url, "--keep", "16", *SMALL, "--repeats", "1",
                           "--output", tmp_path / "broken"),
            }
        )  # fmt: skip
    good, failing = outcomes["good"], outcomes["broken"]
    assert good.code == 0, good.err
    budgets = [json.dumps(body["mm_processor_kwargs"]) for body in server.bodies]
    full, reduced = '{"tokensieve_keep": 1.0}', '{"tokensieve_keep": 0.25, "tokensieve_method": "divprune"}'
    assert budgets == [full, reduced] + [full] * 2 + [reduced] * 2 + [full] * 8 + [reduced] * 8
    report = json.loads(good.out)
    (cell,) = report["cells"]
    assert (cell["full"]["prompt_tokens"], cell["reduced"]["prompt_tokens"]) == (110, 35)
    assert cell["verdict"] == "not told apart"
    assert report["summary"][0] == (
        f"full: toy at {server.url} with {full}; reduced: toy at {server.url} with {reduced}"
    )
    assert "A verdict needs 5 rounds of a cell; there are as few as 1." in report["summary"]
    assert failing.code == 0, failing.err
    assert re.search(r"^ ?32 .* failed *$", failing.out, re.M)
    assert re.search(r"of the requests failed \(HTTP 503: \d\)", failing.out)


def test_a_server_that_counts_before_it_reduces_is_measured(tmp_path: Path):
    server = FakeServer(budgets=True, counts_after=False)
    with server.in_a_thread():
        words = (
            "bench",
            "--server",
            server.url,
            "--keep",
            "0.25",
            *SMALL,
            "--repeats",
            "1",
            "--output",
            tmp_path / "a",
        )
        outcome = run_many({"counts before": words})["counts before"]
    assert outcome.code == 0, outcome.err
    assert "both sides count 110 prompt tokens" in outcome.err


def test_ctrl_c_leaves_the_finished_rounds(server: FakeServer, tmp_path: Path):
    server.first = 0.05
    program = [COMMAND, "bench", "--server", server.url, "--keep", "0.5", *SMALL, "--repeats", "100000"]
    rounds = tmp_path / "cut" / "rounds.jsonl"
    process = subprocess.Popen(
        [*program, "--output", tmp_path / "cut"], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        deadline = time.monotonic() + 60
        while (not rounds.exists() or rounds.read_bytes().count(b"\n") < 3) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert b"interrupted; resume with the same command" in err
    assert b"Traceback" not in err
    assert re.search(rb"^ ?32 ", out, re.M), "the finished rounds are shown"


def test_every_refusal_is_one_line(server: FakeServer, tmp_path: Path):
    blind, many, dead = FakeServer(images=False), FakeServer(models=("a", "b")), FakeServer(status=lambda number: 500)
    plain = FakeServer()
    out = ("--output", str(tmp_path / "out"))
    with blind.in_a_thread(), many.in_a_thread(), dead.in_a_thread(), plain.in_a_thread():
        at = {"plain": plain.url, "blind": blind.url, "many": many.url, "dead": dead.url, "good": server.url}
        lines = {
            "nobody listens": (["--server", "http://127.0.0.1:1", "--keep", "9"], r"127\.0\.0\.1:1 cannot be reached"),
            "no address": (["--server", "here", "--keep", "9"], "--server takes an address such as"),
            "no model": (["--server", at["many"], "--keep", "9"], r"serves 2 models \(a, b\): name one with --model"),
            "other model": (["--server", at["many"], "--keep", "9", "--model", "c"], "does not serve the model 'c'"),
            "no images": (["--server", at["blind"], "--keep", "9"], "but not one with an image"),
            "all fail": (["--server", at["dead"], "--keep", "9"], r"fails a streaming chat request \(HTTP 500"),
            "no budget": (["--server", at["good"]], "--server without --against needs --keep"),
            "bad budget": (["--server", at["good"], "--keep", "x"], "keep must be"),
            "two budgets": (["--server", at["good"], "--keep", "9, 8"], "--keep takes one value"),
            "budget of a server": (["--server", at["good"], "--against", at["good"], "--keep", "9"], "leave out"),
            "budget ignored": (["--server", at["plain"], "--keep", "0.5"], "ignores mm_processor_kwargs"),
            "bad size": (["--server", at["good"], "--image-sizes", "0x3"], "got '0x3'"),
            "bad numbers": (["--server", at["good"], "--concurrency", "1, two"], "--concurrency takes numbers"),
            "no load": (["--server", at["good"], "--concurrency", "", "--rates", " "], "both are empty"),
            "other options": (["--server", at["good"], "--batch-size", "2"], "--batch-size has no meaning with"),
            "options of a model": (["--server", at["good"], "--dtype", "float16"], "--dtype has no meaning with"),
            "no server": (["--requests", "3"], "--requests needs --server or --engine"),
            "engine and server": (["--server", at["good"], "--engine", "vllm"], "--engine starts both servers"),
            "engine without method": (["--engine", "vllm", "--keep", "9"], "--engine vllm needs --method"),
            "other engine": (["--engine", "x", "--model", "m", "--method", "pool", "--keep", "9"], "got 'x'"),
        }
        outcomes = run_many({name: ["bench", *words, *out] for name, (words, _) in lines.items()})
    for name, (_, pattern) in lines.items():
        assert re.search(pattern, outcomes[name].refused()), (name, outcomes[name])
    assert not (tmp_path / "out").exists(), "a refused call leaves nothing behind"
