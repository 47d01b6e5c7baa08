"""Soak `tokensieve serve`: good requests beside faults, for minutes; figures as JSON and a table.

    python benchmarks/serve_soak.py --minutes 3 --output runs/soak.json
    python benchmarks/serve_soak.py --engine vllm --minutes 10 --kills 1

Good requests, streamed and whole, run beside image bombs, malformed bodies, slow bodies and clients that leave. Every
minute or so the server is killed and started again. Every good request must have the right answer, or fail while the
server was down; a request that fails is sent again. Resident memory of all the server's processes must not grow: its
slope is fitted over the life of each server, without the first quarter. The exit code is 1 if a check fails.
"""

import argparse
import base64
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import zlib
from collections import Counter
from http.client import HTTPException
from io import BytesIO
from pathlib import Path

import psutil
import torch
from PIL import Image

import tokensieve
from tokensieve import reference
from tokensieve.evaluate import decode
from tokensieve.reference.benchmark import benchmark
from tokensieve.reference.vilt import ASKED

KEEP = 36
START_SECONDS = 600
CHAT = "/v1/chat/completions"
ENGINE_ARGUMENTS = {
    "transformers": [],
    "vllm": ["--", "--dtype", "float32", "--enforce-eager", "--max-model-len", "512"],
}
VLLM_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}  # 1 GiB of cache; any cores


class Soak:
    """The server, the good requests with their right answers, and the counts."""

    def __init__(self, folder, engine):
        self.folder, self.engine = folder, engine
        self.rows = benchmark(scenes=10, types=ASKED)
        self.right = right_answers(self.rows)
        self.images = {row.id: image_url(row.image) for row in self.rows}
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            self.port = listener.getsockname()[1]
        self.counts, self.lock = Counter(), threading.Lock()
        self.wrong, self.memory, self.latency = [], [], []
        self.up, self.stop = threading.Event(), threading.Event()
        self.process, self.life, self.started = None, 0, time.monotonic()
        self.starts = []

    def count(self, name):
        with self.lock:
            self.counts[name] += 1

    # -- the server ---------------------------------------------------------------------------------------------------

    def start(self):
        options = f"--keep {KEEP} --concurrency 4 --queue 32 --max-body-seconds 1 --max-body 2000000 --grace 20"
        program = [sys.executable, "-m", "tokensieve", "serve", "reference", "--engine", self.engine]
        program += ["--port", str(self.port), *options.split(), *ENGINE_ARGUMENTS[self.engine]]
        with (self.folder / "server.log").open("a") as log:
            self.process = subprocess.Popen(program, stdout=log, stderr=log, env={**VLLM_ENVIRONMENT, **os.environ})
        start = time.monotonic()
        while True:
            try:
                urllib.request.urlopen(self.url("/health"), timeout=5).close()
                break
            except OSError as error:
                if self.process.poll() is not None or time.monotonic() - start > START_SECONDS:
                    self.process.kill()
                    raise RuntimeError(f"the server did not start: see {self.folder / 'server.log'}") from error
                time.sleep(0.1)
        self.starts.append(time.monotonic() - start)
        self.life += 1
        self.up.set()

    def kill(self):
        """Kill the server's first process. The others, of vLLM's engine, must end by themselves."""
        self.up.clear()
        children = psutil.Process(self.process.pid).children(recursive=True)
        self.process.kill()
        self.process.wait()
        self.count("servers killed")
        _, orphans = psutil.wait_procs(children, timeout=30)
        for orphan in orphans:
            self.count("processes that outlived a kill")
            orphan.kill()

    def url(self, path):
        return f"http://127.0.0.1:{self.port}{path}"

    def sample_memory(self):
        while not self.stop.wait(1):
            if not self.up.is_set():
                continue
            try:
                server = psutil.Process(self.process.pid)
                size = sum(process.memory_info().rss for process in [server, *server.children(recursive=True)])
            except psutil.Error:  # it was killed meanwhile
                continue
            self.memory.append((self.life, time.monotonic() - self.started, size))

    # -- requests -----------------------------------------------------------------------------------------------------

    def body(self, row, **more):
        content = [
            {"type": "image_url", "image_url": {"url": self.images[row.id]}},
            {"type": "text", "text": row.question},
        ]
        message = {"role": "user", "content": content}
        return {"model": "reference", "temperature": 0, "max_tokens": 4, "messages": [message], **more}

    def post(self, content):
        """Return the status and the text of an answer."""
        request = urllib.request.Request(self.url(CHAT), content, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def good(self, draw):
        """Ask one question until it is answered; it may fail only while the server is down."""
        row, stream = draw.choice(self.rows), draw.random() < 0.5
        self.count("good requests")
        while True:
            life, start = self.life, time.monotonic()
            try:
                status, text = self.post(json.dumps(self.body(row, stream=stream)).encode())
                answer = streamed(text) if stream and status == 200 else None
                if status == 200 and not stream:
                    answer = json.loads(text)["choices"][0]["message"]["content"]
            except (OSError, HTTPException, ValueError) as error:
                status, text, answer = 0, repr(error), None
            if status == 429:  # a clear error: come again
                self.count("asked to come again")
                time.sleep(0.2)
            elif answer is not None:
                break
            elif self.engine == "vllm" and "InternalServerError" in text:
                # the image was first sent by a client that left before the engine had it; vLLM tells to send it again
                self.count("sent again after vLLM's cache miss")
            elif self.up.is_set() and self.life == life and not self.dies(life):
                self.wrong.append(f"{row.id}: status {status}, {text[:200]}")
                return
            else:
                self.count("sent again after a kill")
                self.up.wait(60)
        if answer.strip() == self.right[row.id]:
            self.count("right answers")
            self.latency.append(time.monotonic() - start)
        else:
            self.wrong.append(f"{row.id}: {answer!r} instead of {self.right[row.id]!r}")

    def dies(self, life):
        """Return whether the server is about to be seen dead: the connection ends before the flag falls."""
        time.sleep(0.5)
        return not self.up.is_set() or self.life != life

    def fault(self, draw):
        """Send one faulty request; check its status."""
        kind, content, status = draw.choice(
            [
                ("bomb", json.dumps(self.body(self.rows[0])).replace(self.images[self.rows[0].id], BOMB), 400),
                ("malformed body", '{"model": "reference", "messages": [', 400),
                ("wrong base64", json.dumps(self.body(self.rows[0])).replace("base64,", "base64,@"), 400),
                ("large body", " " * 3_000_000, 413),
                ("unknown model", json.dumps(self.body(self.rows[0], model="other")), 404),
            ]
        )
        life = self.life
        try:
            got, text = self.post(content.encode())
        except (OSError, HTTPException) as error:
            got, text = 0, repr(error)
        if got == status:
            self.count(kind)
        elif got == 0 and (not self.up.is_set() or self.dies(life)):
            self.up.wait(60)
        elif got not in (429, 503):
            self.wrong.append(f"{kind}: status {got} instead of {status}: {text[:200]}")

    def leave(self, draw):
        """Send a request, or a part of it, and go away."""
        row = draw.choice(self.rows)
        content = json.dumps(self.body(row, stream=draw.random() < 0.5, max_tokens=200)).encode()
        sent = len(content) if draw.random() < 0.7 else draw.randrange(len(content))
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=10) as connection:
                connection.sendall(head.encode() + b"\r\n\r\n" + content[:sent])
                time.sleep(draw.random() * 0.1)
            self.count("clients that left")
        except OSError:
            self.up.wait(60)

    def slow(self, draw):
        """Send a body too slowly; read the 408."""
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 999\r\n\r\n"
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=30) as connection:
                connection.sendall(head.encode())
                answer = b""
                while b"slow_body" not in answer and (block := connection.recv(1 << 16)):
                    answer += block
            self.count("slow body" if b" 408 " in answer else "slow body cut by a kill")
        except OSError:
            self.up.wait(60)

    def work(self, number):
        draw = random.Random(number)
        while not self.stop.is_set():
            act = draw.choices([self.good, self.fault, self.leave, self.slow], [60, 20, 15, 5])[0]
            act(draw)


def right_answers(rows):
    """Return {id: the answer of the attached model}."""
    model, processor = reference.load()
    answers = {}
    with tokensieve.attach(model, "vtc-cls", keep=KEEP, processor=processor), torch.inference_mode():
        for row in rows:
            content = [{"type": "image", "image": row.image}, {"type": "text", "text": row.question}]
            inputs = processor.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
            generated = model.generate(**inputs, max_new_tokens=4, do_sample=False)
            answers[row.id] = decode(processor, generated, inputs["input_ids"].shape[1])[0]
    return answers


def image_url(image):
    file = BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def bomb():
    """Return a small PNG whose header declares 50,000 x 50,000 pixels."""
    file = BytesIO()
    Image.new("1", (8, 8)).save(file, "PNG")
    content = bytearray(file.getvalue())
    content[16:24] = (50_000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return "data:image/png;base64," + base64.b64encode(bytes(content)).decode()


def streamed(text):
    """Return the answer of a stream that is whole, else ``None``."""
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    if not events or "error" in events[-1] or not events[-1]["choices"][0].get("finish_reason"):
        return None
    return "".join(event["choices"][0]["delta"].get("content", "") for event in events)


def slopes(memory):
    """Return bytes per minute of each server's life, without its first quarter, by least squares."""
    rates = {}
    for life in sorted({number for number, _, _ in memory}):
        points = [(moment / 60, size) for number, moment, size in memory if number == life]
        points = points[len(points) // 4 :]
        if len(points) < 45:  # the first half minute warms up
            continue
        x = torch.tensor([moment for moment, _ in points], dtype=torch.float64)
        y = torch.tensor([size for _, size in points], dtype=torch.float64)
        rates[life] = float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())
    return rates


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=tuple(ENGINE_ARGUMENTS), default="transformers")
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--workers", type=int, default=6)
    parser.add_argument(
        "--kills", type=int, default=2, help="servers killed, at equal distances; the last life is the longest"
    )
    parser.add_argument("--most-growth", type=float, default=5.0, help="MB per minute that the last server may grow")
    parser.add_argument("--output", type=Path, default=Path("runs/soak.json"))
    options = parser.parse_args()
    options.output.parent.mkdir(parents=True, exist_ok=True)

    soak = Soak(options.output.parent, options.engine)
    soak.start()
    soak.started = time.monotonic()
    # daemons: an error of this thread ends the run
    threads = [threading.Thread(target=soak.work, args=(number,), daemon=True) for number in range(options.workers)]
    threads.append(threading.Thread(target=soak.sample_memory, daemon=True))
    for thread in threads:
        thread.start()
    seconds = options.minutes * 60
    for _ in range(options.kills):
        time.sleep(seconds / 2 / options.kills)  # the second half is one life
        soak.kill()
        soak.start()
    time.sleep(max(0.0, soak.started + seconds - time.monotonic()))
    soak.stop.set()
    for thread in threads:
        thread.join()
    with urllib.request.urlopen(soak.url("/metrics"), timeout=10) as answer:
        metrics = answer.read().decode()
    idle = [line for line in metrics.splitlines() if line.startswith("tokensieve_requests_running ")] == [
        "tokensieve_requests_running 0.0"
    ]
    soak.process.send_signal(signal.SIGTERM)
    code = soak.process.wait(60)
    rates = slopes(soak.memory)
    growth = rates.get(max(rates, default=0), float("nan")) / 1e6
    counts = dict(sorted(soak.counts.items()))
    figures = {
        "engine": options.engine,
        "minutes": options.minutes,
        "start_seconds": [round(seconds, 1) for seconds in soak.starts],
        "counts": counts,
        "wrong": soak.wrong,
        "memory_mb_per_minute_by_server": {life: rate / 1e6 for life, rate in rates.items()},
        "memory_mb": [round(soak.memory[0][2] / 1e6), round(soak.memory[-1][2] / 1e6)],
        "median_seconds": sorted(soak.latency)[len(soak.latency) // 2] if soak.latency else None,
        "exit_code": code,
        "idle_at_the_end": idle,
    }
    options.output.write_text(json.dumps(figures, indent=2))
    checks = {
        "every good request has its right answer": not soak.wrong
        and counts.get("right answers") == counts.get("good requests"),
        # a life of less than a minute has no slope
        f"memory of the last server grows by at most {options.most_growth} MB a minute": not rates
        or growth <= options.most_growth,
        "no request is left in the server": idle,
        "SIGTERM ends it with exit code 0": code == 0,
        "at most one cache miss per client that left": counts.get("sent again after vLLM's cache miss", 0)
        <= counts.get("clients that left", 0),
        "no process outlives a kill": not counts.get("processes that outlived a kill"),
    }
    for name, number in counts.items():
        print(f"{name:30} {number:8,}")
    print(f"{'MB a minute (last server)':30} {growth:8.2f}")
    print(f"{'MB at the start, at the end':30} {figures['memory_mb']}")
    for name, holds in checks.items():
        print(f"{'ok' if holds else 'FAIL':5} {name}")
    for line in soak.wrong[:10]:
        print(f"      {line}")
    sys.exit(0 if all(checks.values()) else 1)


BOMB = bomb()

if __name__ == "__main__":
    main()
