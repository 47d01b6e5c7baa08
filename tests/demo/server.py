"""The real command as a process."""

import signal
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

from tests.cli.calling import COMMAND, ENVIRONMENT
from tests.serve.server import free_port

START = 120  # seconds: other tests may keep the machine busy


class Demo:
    """`tokensieve demo` on a free port; a context manager that stops it."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / f"demo-{self.port}.log"
        self.temporary = folder / "temporary"
        self.temporary.mkdir(exist_ok=True)
        program = [COMMAND, "demo", "--no-browser", "--port", str(self.port), *arguments]
        environment = ENVIRONMENT | {"TMPDIR": str(self.temporary)}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(program, stdout=log, stderr=log, env=environment, cwd=folder)

    def wait(self) -> None:
        """Wait for the first answer of the server."""
        end = time.monotonic() + START
        while time.monotonic() < end:
            if self.process.poll() is not None:
                break
            try:
                with urllib.request.urlopen(self.url, timeout=10) as answer:
                    assert answer.status == 200
                return
            except OSError:
                time.sleep(0.2)
        raise RuntimeError(self.log.read_text())

    def stop(self, number: int = signal.SIGINT, seconds: float = 30) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(seconds)

    def __enter__(self) -> "Demo":
        try:
            self.wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        try:
            self.stop()
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(30)
