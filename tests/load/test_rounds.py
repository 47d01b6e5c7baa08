"""Rounds take turns, are written as they come, and continue where they stopped."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.load.server import FakeServer, run_virtual
from tokensieve.errors import Refusal, ResumeError
from tokensieve.load import Cell, Journal, Plan, Side, measure, result_of

CELL = Cell(32, 32, words=5, output_tokens=3, users=2)
BIG = Cell(64, 64, words=5, output_tokens=3, users=1)
OPEN = Cell(32, 32, words=5, output_tokens=3, rate=2.0)
SETUP = {"servers": "test"}


def sides_of(full: FakeServer, reduced: FakeServer) -> tuple[Side, Side]:
    return Side("full", full.url, "toy"), Side("reduced", reduced.url, "toy")


def measured(
    full: FakeServer, reduced: FakeServer, cells: Sequence[Cell], plan: Plan, folder: Path, **more
) -> tuple[Journal, list[str]]:
    async def work():
        runners = [await server.start() for server in (full, reduced)]
        journal = Journal(folder, SETUP)
        try:
            return journal, await measure(*sides_of(full, reduced), cells, plan, journal, **more)
        finally:
            for runner in runners:
                await runner.cleanup()

    return run_virtual(work())


def questions(server: FakeServer) -> list[str]:
    return [body["messages"][0]["content"][1]["text"] for body in server.bodies]


def images(server: FakeServer) -> list[str]:
    return [body["messages"][0]["content"][0]["image_url"]["url"] for body in server.bodies]


def test_a_server_of_half_the_time_has_twice_the_rate(tmp_path):
    full, reduced = FakeServer(first=0.4, step=0.1), FakeServer(first=0.2, step=0.05)
    journal, skipped = measured(full, reduced, [CELL, OPEN], Plan(rounds=5, requests=8), tmp_path)
    assert skipped == []
    for cell in (CELL, OPEN):
        pairs = [record.figures for record in journal.records if record.cell == cell]
        row = result_of(cell, [pair["full"] for pair in pairs], [pair["reduced"] for pair in pairs])
        assert row.verdict == "pays"
        for ratio in (row.first_token, row.token, row.request):
            assert (ratio.low, ratio.median, ratio.high) == pytest.approx((2, 2, 2))
        assert row.full.first_token_ms == pytest.approx(400)
    closed = journal.records[0].figures
    assert closed["full"].requests_per_second == pytest.approx(2 / 0.6)
    assert closed["reduced"].requests_per_second == pytest.approx(2 / 0.3)


def test_every_second_round_runs_backwards_and_sides_share_the_requests(tmp_path):
    full, reduced = FakeServer(), FakeServer()
    turns: list[str] = []
    full.status = lambda number: turns.append("full") or 200
    reduced.status = lambda number: turns.append("reduced") or 200
    journal, _ = measured(full, reduced, [BIG], Plan(rounds=4, requests=4), tmp_path)
    assert turns[:2] == ["full", "reduced"]  # the warm-up: one request of each side
    A, B = ["full"] * 4, ["reduced"] * 4
    assert turns[2:] == A + B + B + A + A + B + B + A
    orders = [json.loads(line)["order"] for line in journal.path.read_text().splitlines()[1:]]
    assert orders == [["full", "reduced"], ["reduced", "full"]] * 2
    assert questions(full)[1:] == questions(reduced)[1:]
    assert images(full) == images(reduced)
    assert len(set(images(full))) == 1 + 4 * 4  # no cache can have seen one


def test_repeated_images_were_sent_before_the_rounds(tmp_path):
    full, reduced = FakeServer(), FakeServer()
    measured(full, reduced, [BIG], Plan(rounds=2, requests=8, repeat_share=0.5), tmp_path)
    warm = 1 + 4  # one of the user, four of the pool
    pool = set(images(full)[1:warm])
    for start in (warm, warm + 8):
        assert sum(image in pool for image in images(full)[start : start + 8]) == 4


def test_arrivals_of_both_sides_are_equal_and_those_of_rounds_differ(tmp_path):
    full, reduced = FakeServer(first=1.0), FakeServer(first=0.1)
    journal, _ = measured(full, reduced, [OPEN], Plan(rounds=2, requests=6, seed=7), tmp_path)
    rounds = [json.loads(line)["requests"] for line in journal.path.read_text().splitlines()[1:]]
    planned = [[[request["planned"] for request in run[side]] for side in ("full", "reduced")] for run in rounds]
    assert planned[0][0] == planned[0][1]
    assert planned[1][0] == planned[1][1]
    assert planned[0][0] != planned[1][0]


def test_users_get_four_requests_each():
    assert Plan(requests=8).count(Cell(1, 1, 1, 1, users=5)) == 20
    assert Plan(requests=32).count(Cell(1, 1, 1, 1, users=5)) == 32
    assert Plan(requests=8).count(OPEN) == 8


def test_a_cut_run_continues_with_the_missing_rounds(tmp_path):
    """The process dies in the middle of a line: that round is repeated, and no other."""
    first, _ = measured(FakeServer(), FakeServer(), [CELL], Plan(rounds=3, requests=8), tmp_path)
    data = first.path.read_bytes()
    first.path.write_bytes(data[:-40])
    full = FakeServer()
    finished: list[Cell] = []
    again, _ = measured(full, FakeServer(), [CELL], Plan(rounds=4, requests=8), tmp_path, finished=finished.append)
    assert [record.round for record in again.records] == [0, 1, 2, 3]
    assert again.records[:2] == first.records[:2]
    assert len(full.bodies) == 2 + 2 * 8  # the warm-up of two users, and two rounds
    assert finished == [CELL]
    idle = FakeServer()
    measured(idle, FakeServer(), [CELL], Plan(rounds=4, requests=8), tmp_path)
    assert idle.bodies == []


def test_a_grown_grid_measures_the_new_cells(tmp_path):
    measured(FakeServer(), FakeServer(), [CELL], Plan(rounds=1, requests=8), tmp_path)
    full = FakeServer()
    journal, _ = measured(full, FakeServer(), [CELL, BIG], Plan(rounds=1, requests=8), tmp_path)
    assert [record.cell for record in journal.records] == [CELL, BIG]
    assert len(full.bodies) == 1 + 8


def test_a_folder_of_another_setup_is_refused(tmp_path):
    Journal(tmp_path, {"servers": "a", "seed": 0})
    with pytest.raises(ResumeError, match=r"another set-up \(servers differ\)"):
        Journal(tmp_path, {"servers": "b", "seed": 0})
    (tmp_path / "rounds.jsonl").write_text("mine\n")
    with pytest.raises(ResumeError, match="not a file of load rounds"):
        Journal(tmp_path, {})
    assert (tmp_path / "rounds.jsonl").read_text() == "mine\n"


def test_a_cell_that_always_fails_is_left_out_with_its_reason(tmp_path):
    full, reduced = FakeServer(), FakeServer()
    reduced.status = lambda number: 413 if number == 0 else 200
    journal, (reason,) = measured(full, reduced, [BIG, CELL], Plan(rounds=1, requests=4), tmp_path)
    assert reason == "64 px, 5 words, 3 tokens, 1 user: the reduced side fails every request (HTTP 413: out of order)"
    assert [record.cell for record in journal.records] == [CELL]


def test_a_server_that_dies_ends_the_measurement_and_keeps_the_rounds(tmp_path):
    full, reduced = FakeServer(), FakeServer()

    async def work():
        runners = [await server.start() for server in (full, reduced)]
        journal = Journal(tmp_path, SETUP)
        sides = sides_of(full, reduced)
        await measure(*sides, [CELL], Plan(rounds=1, requests=8), journal)
        await runners[1].cleanup()
        try:
            with pytest.raises(Refusal, match="the reduced side cannot be reached any more"):
                await measure(*sides, [CELL], Plan(rounds=2, requests=8), journal)
        finally:
            await runners[0].cleanup()
        return journal

    assert len(run_virtual(work()).records) == 1
    assert len(Journal(tmp_path, SETUP).records) == 1
