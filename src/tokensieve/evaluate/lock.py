"""One process at a time per output folder."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path

from filelock import FileLock, SoftFileLock, Timeout

from tokensieve.errors import OutputError

LOCK, HOLDER = ".compare.lock", ".compare.json"


@contextmanager
def locked(folder: Path, work: str = "comparison") -> Iterator[None]:
    """Hold an output folder, created if it is missing, until the context ends.

    The operating system holds the lock and frees it when the process ends, however it ends: a lock file that a dead
    process left behind does not block. The holder's process id, host and start time stand in a second file.

    Args:
        folder: the output folder.
        work: the name of the work in the error.

    Raises:
        OutputError: another process holds the folder, or the folder cannot be used.
    """
    lock, holder = FileLock(folder / LOCK), folder / HOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        # only a file system without locks, where the file itself is the lock, can keep the lock of a dead process
        stale = f"; if it no longer runs, delete {folder / LOCK}" if isinstance(lock, SoftFileLock) else ""
        raise OutputError(
            f"another {work} writes to {folder} ({_read(holder)}){stale}; wait for it, or choose another output folder"
        ) from None
    except (OSError, NotImplementedError) as error:
        # the second comes from older releases of filelock, where the file system has no locks
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"cannot use the output folder {folder}: {reason}") from error
    try:
        _write(holder)
        yield
    finally:
        with suppress(OSError):
            holder.unlink()
        lock.release()


def _write(holder: Path) -> None:
    started = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
    with suppress(OSError):  # a full disk: the lock holds without it, and an older file must not name another process
        holder.unlink(missing_ok=True)
        holder.write_text(json.dumps({"process": os.getpid(), "host": platform.node(), "started": started}), "utf-8")


def _read(holder: Path) -> str:
    try:
        facts = json.loads(holder.read_text("utf-8"))
        return f"process {facts['process']} on {facts['host']}, started {facts['started']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "its process is not known"
