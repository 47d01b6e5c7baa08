"""Costs in the journal: rows of one session only, on an equal machine only."""

import pytest

from tokensieve.evaluate.costs import session_costs
from tokensieve.evaluate.journal import Journal
from tokensieve.measure import Cost, Rounds, Timing

MACHINE = {"cpu": "a", "threads": 2, "date": "2026-01-01", "sample": "1"}


def cost(name, ms):
    timing = Timing.of_full(Rounds([ms] * 5, [1.0] * 5))
    counts = {"tokens_before": 9.0, "tokens_after": 9.0, "prompts": 1, "flops": 1, "flops_ratio": 1.0}
    return Cost(method=name, **counts, **vars(timing), peak_activation_bytes=1, kv_bytes=1)


@pytest.fixture
def costs(tmp_path):
    """``costs(rows, machine)`` opens the journal anew, as a later call does, and returns the costs' milliseconds.

    Each session takes one millisecond more than the one before, so that a figure names its session.
    """
    sessions = []

    def costs(rows, machine=MACHINE):
        def measure():
            sessions.append(rows)
            return [cost(row, float(len(sessions))) for row in rows]

        return [c.prefill_ms.median for c in session_costs(Journal(tmp_path, {}), machine, rows, measure)]

    return costs


def test_a_session_is_used_again_for_its_rows_and_for_fewer(costs):
    assert costs(["full", "pool", "trsm"]) == [1, 1, 1]
    assert costs(["full", "pool", "trsm"]) == [1, 1, 1]
    assert costs(["full", "trsm"]) == [1, 1]
    assert costs(["full", "trsm"], {**MACHINE, "date": "2027-01-01"}) == [1, 1]


def test_a_new_row_is_measured_with_the_old_ones(costs):
    costs(["full", "pool"])
    assert costs(["full", "pool", "trsm"]) == [2, 2, 2]
    assert costs(["full", "pool"]) == [2, 2], "the latest session that holds all rows"


@pytest.mark.parametrize("change", [{"threads": 1}, {"cpu": "b"}, {"sample": "2"}])
def test_another_machine_or_prompt_is_measured_anew(costs, change):
    costs(["full"])
    assert costs(["full"], MACHINE | change) == [2]
    assert costs(["full"]) == [1]


def test_costs_that_were_measured_row_by_row_are_not_used(costs, tmp_path):
    journal = Journal(tmp_path, {})
    journal.add_cost("full @12345678", cost("full", 99.0).to_json())
    assert costs(["full"]) == [1]
