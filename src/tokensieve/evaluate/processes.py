"""Several processes that share one comparison, started by ``accelerate launch`` or ``torchrun``."""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch

from tokensieve.errors import MissingExtra, Refusal

WAIT = timedelta(hours=12)  # the first process may measure costs for long while the others wait
T = TypeVar("T")


@dataclass(frozen=True)
class _Failure:
    """Sent instead of an item by a process that cannot go on."""

    reason: str


class Processes:
    """The processes of one comparison, seen from one of them. A single process by default.

    Every process executes the same steps. They meet in :meth:`exchange`, which each of them calls equally often.

    Attributes:
        rank: number of this process, from 0.
        count: number of processes.
        first: whether this process reads and writes the files.
    """

    def __init__(self, rank: int = 0, count: int = 1) -> None:
        self.rank, self.count, self.first = rank, count, rank == 0
        self._depth, self._ended = 0, False

    @classmethod
    @cache
    def launched(cls) -> Processes:
        """Join the processes that a launcher started together with this one; a single process without a launcher.

        Every call in a process returns the same object.

        Raises:
            MissingExtra: there are several processes and accelerate is not installed.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        try:
            from accelerate import PartialState
        except ImportError as error:
            raise MissingExtra("several processes need accelerate", "train") from error
        # it also selects the GPU; gloo there, too: answers are few bytes, and it notices the end of a process at once
        state = PartialState(cpu=not torch.cuda.is_available(), backend="gloo", timeout=WAIT)
        atexit.register(state.destroy_process_group)  # its threads would abort the exit
        return cls(state.process_index, state.num_processes)

    def exchange(self, item: T) -> list[T]:
        """Return the items of all processes, ordered by rank.

        Raises:
            Refusal: another process refused to go on, or has ended.
        """
        if self.count == 1:
            return [item]
        try:
            items = self._gather(item)
        except RuntimeError as error:
            self._ended = True
            raise Refusal("another process of this comparison has ended; the answers so far are kept") from error
        for other in items:
            if isinstance(other, _Failure):
                self._ended = True
                raise Refusal(other.reason)
        return items

    def _gather(self, item: Any) -> list[Any]:
        """Return the items of all processes; raise ``RuntimeError`` if one has ended."""
        items: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(items, item)
        return items

    @contextmanager
    def together(self) -> Iterator[None]:
        """Raise a refusal of one process in all of them, and leave the context at the same time. Contexts may nest."""
        self._depth += 1
        outermost = self._depth == 1
        try:
            yield
            if outermost:
                self.exchange(None)
        except Refusal as error:
            if outermost and self.count > 1 and not self._ended:
                with suppress(Refusal):  # this process keeps its own error
                    self.exchange(_Failure(str(error)))
            raise
        finally:
            self._depth -= 1
