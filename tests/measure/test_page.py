"""The example of ``docs/benchmarks.md`` runs, on a clock that ticks."""

import re
from functools import partial
from pathlib import Path

from tests.support.clocks import Cpu, Ticking
from tokensieve import measure

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks.md"


def test_the_example_measures_two_methods(monkeypatch, capsys):
    (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.S)
    quick = {"repeats": 5, "warmup": 0, "decode_tokens": 1, "clock": Ticking(), "read": Cpu()}
    monkeypatch.setattr(measure, "measure_costs", partial(measure.measure_costs, **quick))
    names = {}
    exec(compile(example, str(PAGE), "exec"), names)
    assert [names[name].method for name in ("full", "vtc_cls", "pool")] == ["full", "vtc-cls(keep=36)", "pool(keep=36)"]
    assert capsys.readouterr().out == "1.0 (1.0–1.0) not told apart 65000 (65000–65000)\n"  # each call takes a second
