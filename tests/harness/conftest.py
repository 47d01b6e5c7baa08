"""Tests of a harness need it, in an environment of its own: ``make test-harness``. Elsewhere they are left out."""

from importlib.util import find_spec

import pytest

from tests.harness.running import Bench, make_bench

NEEDS = {"test_lmms_eval.py": "lmms_eval", "test_lm_eval.py": "lm_eval", "test_vlmevalkit.py": "vlmeval"}
collect_ignore = [file for file, package in NEEDS.items() if find_spec(package) is None]


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Return the questions of all tests, as tasks, and the answers of ``tokensieve compare``."""
    return make_bench(tmp_path_factory.mktemp("bench"))
