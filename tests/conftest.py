"""One thread, one seed, and the worst deviation of each law in the summary."""

import os
import signal
import zlib
from collections import Counter

import pytest
import torch
import transformers

# folders of few tests that take minutes: they start processes, search or train; the longest come first
SLOW = ("batch", "tune", "cli", "reproduce", "serve", "load", "train", "docs", "demo", "report", "reference")

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A job in the background ignores Ctrl-C, and so do the commands that tests start and interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """The method registry; what a test registers is forgotten afterwards."""
    from tokensieve.methods import list_methods
    from tokensieve.methods import registry as module

    list_methods()
    monkeypatch.setattr(module, "_registry", dict(module._registry))
    return module


@pytest.fixture
def deviation(record_property):
    """``deviation(law, a, b)`` returns the largest difference of two tensors, and notes it for the summary."""

    def measure(law: str, a: torch.Tensor, b: torch.Tensor) -> float:
        assert a.shape == b.shape
        worst = (a - b).abs().max().item() if a.numel() else 0.0
        record_property(f"deviation {law}", worst)
        return worst

    return measure


def pytest_addoption(parser):
    parser.addoption("--one-in", type=int, default=1, metavar="N", help="run one in N tests, the same ones each time")


def pytest_collection_modifyitems(config, items):
    """Choose the tests of ``--one-in`` by their names' hashes, so that no family and no method is left out.

    Several workers start with the slow folders: a slow file that starts last would run alone at the end.
    """
    groups = {True: [], False: []}
    for item in items:
        groups[zlib.crc32(item.nodeid.encode()) % config.getoption("one_in") == 0].append(item)
    items[:] = groups[True]
    if hasattr(config, "workerinput"):  # a worker of xdist; the sort is stable, so all workers have the same order
        tests_of = Counter(item.path for item in items)
        place_of = {folder: place for place, folder in enumerate(SLOW)}
        items.sort(key=lambda item: (place_of.get(item.path.parent.name, len(SLOW)), -tests_of[item.path]))
    config.hook.pytest_deselected(items=groups[False])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Give every file to one worker: what a file's fixtures compute for all its tests is then computed once."""
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False  # xdist would start with the files of most tests
    return LoadFileScheduling(config, log)


def pytest_terminal_summary(terminalreporter):
    worst: dict[str, float] = {}
    for report in (r for kind in ("passed", "failed") for r in terminalreporter.stats.get(kind, [])):
        for name, value in report.user_properties:
            if name.startswith("deviation "):
                worst[name] = max(worst.get(name, 0.0), value)
    for name, value in sorted(worst.items()):
        terminalreporter.write_line(f"worst {name}: {value:.1e}")
