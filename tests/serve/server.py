"""The real command as a process, and requests to it."""

import json
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from tests.cli.calling import COMMAND, ENVIRONMENT


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Server:
    """`tokensieve serve` on transformers, on a free port or a given one; a context manager that stops it."""

    def __init__(self, folder: Path, *arguments: str, model: str = "reference", port: int | None = None) -> None:
        self.port = port or free_port()
        self.log = folder / f"server-{self.port}.log"
        program = [COMMAND, "serve", model, "--port", str(self.port), "--engine", "transformers", *arguments]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(program, stdout=log, stderr=log, env=ENVIRONMENT)
        self._wait()

    def _wait(self) -> None:
        for _ in range(600):
            if self.process.poll() is not None:
                raise RuntimeError(self.log.read_text())
            try:
                if self.get("/health") == '{"status":"ok"}':
                    return
            except OSError:
                time.sleep(0.1)
        raise RuntimeError(self.log.read_text())

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as answer:
            return answer.read().decode()

    def post(self, body: Any, path: str = "/v1/chat/completions") -> tuple[int, Any]:
        """Return the status and the JSON of an answer."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", content, headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)

    def answer(self, body: Any) -> str:
        status, content = self.post(body)
        assert status == 200, content
        return content["choices"][0]["message"]["content"].strip()

    def connect(self, body: Any, *, sent: int | None = None) -> socket.socket:
        """Send a request, or its first bytes only, and return the connection."""
        content = json.dumps(body).encode()
        fields = f"Host: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
        head = f"POST /v1/chat/completions HTTP/1.1\r\n{fields}\r\n\r\n"
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        connection.sendall(head.encode() + content[:sent])
        return connection

    def metrics(self) -> dict[str, float]:
        lines = [line for line in self.get("/metrics").splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}

    def stop(self, number: int = signal.SIGTERM, seconds: float = 30) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(seconds)

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: Any) -> None:
        try:
            self.stop()
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
