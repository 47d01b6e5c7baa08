"""Rounds of full and reduced in turn, cell by cell. Each round is one line of a file, from which a run resumes."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import aiohttp

from tokensieve.errors import Refusal, ResumeError
from tokensieve.jsonl import append_lines, complete_lines
from tokensieve.load import prompts
from tokensieve.load.cells import Cell
from tokensieve.load.client import Side, SideName, chat, connections
from tokensieve.load.figures import RunFigures
from tokensieve.load.traffic import Outcome, arrivals, closed_loop, open_loop

FILE = "rounds.jsonl"
PER_USER = 4  # fewest requests of each user in a run: the start and the end of a run are not its steady state


@dataclass(frozen=True)
class Plan:
    """The work of each cell.

    Attributes:
        rounds: each runs both sides once.
        requests: of a run; more where the users would get fewer than four each.
        repeat_share: share of the requests whose image was sent before.
        seed: of the arrivals, and of the requests that repeat an image.
        timeout: seconds of a request.
    """

    rounds: int = 10
    requests: int = 32
    repeat_share: float = 0.0
    seed: int = 0
    timeout: float = 300.0

    def count(self, cell: Cell) -> int:
        """Return the number of requests of a run."""
        return max(self.requests, PER_USER * (cell.users or 0))


@dataclass(frozen=True)
class Record:
    """One round of a cell: the figures of both sides, which ran one after the other on the same requests."""

    cell: Cell
    round: int
    figures: Mapping[SideName, RunFigures]


class Journal:
    """The file of the rounds. Its first line is the set-up; an incomplete last line of a killed process is cut off.

    Raises:
        ResumeError: the file holds rounds of another set-up.
    """

    def __init__(self, folder: Path, setup: Mapping[str, Any]) -> None:
        self.path = folder / FILE
        self.records: list[Record] = []
        setup = json.loads(json.dumps(setup))  # as JSON reads it back: tuples are lists
        lines = complete_lines(self.path)
        if not lines:
            folder.mkdir(parents=True, exist_ok=True)
            append_lines(self.path, [{"setup": setup}])
            return
        try:
            recorded = json.loads(lines[0])["setup"]
            self.records = [_record(json.loads(line)) for line in lines[1:]]
        except (ValueError, KeyError, TypeError):
            raise ResumeError(f"{self.path} is not a file of load rounds; choose another --output") from None
        if recorded != setup:
            changed = sorted(key for key in recorded.keys() | setup.keys() if recorded.get(key) != setup.get(key))
            raise ResumeError(
                f"{self.path} holds rounds of another set-up ({', '.join(changed)} differ); choose another --output"
            )

    def has(self, cell: Cell, round_: int) -> bool:
        """Return whether a round was measured."""
        return any(record.cell == cell and record.round == round_ for record in self.records)

    def add(
        self, cell: Cell, round_: int, order: Sequence[SideName], outcomes: Mapping[SideName, list[Outcome]]
    ) -> None:
        """Append a round, with every request."""
        figures = {name: RunFigures.of(run) for name, run in outcomes.items()}
        row = {
            "cell": asdict(cell),
            "round": round_,
            "order": order,
            "figures": {name: asdict(run) for name, run in figures.items()},
            "requests": {name: [_rounded(asdict(outcome)) for outcome in run] for name, run in outcomes.items()},
        }
        append_lines(self.path, [row])
        self.records.append(Record(cell, round_, figures))


async def measure(
    full: Side,
    reduced: Side,
    cells: Sequence[Cell],
    plan: Plan,
    journal: Journal,
    *,
    finished: Callable[[Cell], None] = lambda cell: None,
) -> list[str]:
    """Measure the rounds that the journal lacks; return a sentence for each cell that could not be measured.

    Every second round runs backwards: full, reduced, reduced, full. Both sides of a round get the same requests.

    Args:
        finished: called with each cell that has all its rounds.

    Raises:
        Refusal: a server cannot be reached any more.
    """
    skipped = []
    session_key = str(time.time_ns())  # a server that was measured before has never seen the images of this call
    async with connections(plan.timeout) as session:
        for cell in cells:
            missing = [round_ for round_ in range(plan.rounds) if not journal.has(cell, round_)]
            reason = await _warm_up(session, (full, reduced), cell, plan, session_key) if missing else None
            if reason is not None:
                skipped.append(f"{cell}: {reason}")
                continue
            for round_ in missing:
                turns = prompts.contents(
                    cell,
                    plan.count(cell),
                    repeat_share=plan.repeat_share,
                    key=f"{session_key} {cell} round {round_}",
                    pool_key=_pool_key(session_key, cell),
                    seed=plan.seed + round_,
                )
                order = (reduced, full) if round_ % 2 else (full, reduced)
                outcomes = {
                    side.name: await _run(session, side, cell, turns, seed=plan.seed + round_) for side in order
                }
                for name, run in outcomes.items():
                    _refuse_if_gone(name, run)
                journal.add(cell, round_, [side.name for side in order], outcomes)
            finished(cell)
    return skipped


async def _warm_up(
    session: aiohttp.ClientSession, sides: Sequence[Side], cell: Cell, plan: Plan, session_key: str
) -> str | None:
    """Send a request per user, and the pool of repeated images, to each side.

    Return the reason if every request of a side fails.
    """
    turns = prompts.contents(
        cell, cell.users or 1, repeat_share=0, key=f"{session_key} {cell} warm-up", pool_key="", seed=0
    )
    if plan.repeat_share:
        turns += prompts.pool(cell, _pool_key(session_key, cell))
    for side in sides:
        bodies = _bodies(side, cell, turns)
        outcomes = await closed_loop(
            lambda number, side=side, bodies=bodies: chat(session, side.chat_url, bodies[number]),  # type: ignore[misc]
            len(bodies),
            cell.users or 1,
        )
        _refuse_if_gone(side.name, outcomes)
        if all(outcome.failure for outcome in outcomes):
            return f"the {side.name} side fails every request ({_commonest(outcomes)})"
    return None


async def _run(
    session: aiohttp.ClientSession, side: Side, cell: Cell, turns: Sequence[Any], *, seed: int
) -> list[Outcome]:
    """Run one side once. The bodies are made before its clock starts."""
    bodies = _bodies(side, cell, turns)

    def send(number: int) -> Any:
        return chat(session, side.chat_url, bodies[number])

    if cell.rate is None:
        return await closed_loop(send, len(bodies), cell.users or 1)
    return await open_loop(send, arrivals(cell.rate, len(bodies), seed))


def _bodies(side: Side, cell: Cell, turns: Sequence[Any]) -> list[bytes]:
    return [prompts.body(side.model, turn, cell.output_tokens, side.fields) for turn in turns]


def _refuse_if_gone(name: str, outcomes: Sequence[Outcome]) -> None:
    if all(outcome.failure == "no connection" for outcome in outcomes):
        raise Refusal(f"the {name} side cannot be reached any more: {outcomes[0].detail}; finished rounds are kept")


def _commonest(outcomes: Sequence[Outcome]) -> str:
    ((failure, detail), _), *_ = Counter((o.failure, o.detail) for o in outcomes).most_common()
    return f"{failure}: {detail}" if detail else str(failure)


def _pool_key(session_key: str, cell: Cell) -> str:
    return f"{session_key} {cell} pool"


def _record(line: Mapping[str, Any]) -> Record:
    figures = {name: RunFigures(**values) for name, values in line["figures"].items()}
    return Record(Cell(**line["cell"]), line["round"], figures)


def _rounded(outcome: dict[str, Any]) -> dict[str, Any]:
    """Return an outcome with microseconds, and without what is empty."""
    values = ((key, round(value, 6) if isinstance(value, float) else value) for key, value in outcome.items())
    return {key: value for key, value in values if value not in (None, "")}
