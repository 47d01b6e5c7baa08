"""Cost of a prefill under each configuration, relative to the unreduced model: counted FLOPs or measured time."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from tokensieve.errors import Refusal
from tokensieve.evaluate.costs import session_costs
from tokensieve.evaluate.data import Sample
from tokensieve.evaluate.provenance import environment
from tokensieve.evaluate.rows import FULL
from tokensieve.measure import Cost, measure_costs, prefill_flops
from tokensieve.tune.asking import Asker
from tokensieve.tune.space import Candidate

CostKind: TypeAlias = Literal["flops", "latency"]
COUNTED = 4  # questions whose FLOPs are counted: their images may differ in size


@dataclass(frozen=True)
class Limit:
    """A largest prefill time: a share of the unreduced model's, or milliseconds."""

    value: float
    relative: bool

    @classmethod
    def of(cls, text: str) -> Limit:
        """Read ``"60%"``, ``"0.6"`` or ``"12ms"``.

        Raises:
            Refusal: naming the allowed forms.
        """
        match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*(%|ms)?\s*", text)
        value = float(match[1]) / (100 if match[2] == "%" else 1) if match else 0.0
        relative = match is not None and match[2] != "ms"
        if value <= 0 or (relative and value >= 1):
            raise Refusal(f"a largest latency is a share below 100% (60%, 0.6) or a time (12ms); got {text!r}")
        return cls(value, relative)

    def holds(self, cost: Cost) -> bool:
        """Return whether the median prefill is within the limit."""
        return (1 / cost.prefill_speedup.median if self.relative else cost.prefill_ms.median) <= self.value

    def __str__(self) -> str:
        return f"{self.value:.4g} of the full prefill" if self.relative else f"{self.value:g} ms"


def count_all(
    asker: Asker, candidates: Sequence[Candidate], samples: Sequence[Sample], progress: Callable[[int], None]
) -> dict[str, float]:
    """Return the FLOPs of each candidate's prefill / those of the unreduced model, by key, and record them.

    Args:
        samples: questions, the first ones are counted.
        progress: called with the number of candidates that are counted.
    """
    counted = [sample for sample in samples if asker.keys[sample.id] not in asker.journal.skipped][:COUNTED]
    name = f"flops of {_digest([asker.keys[sample.id] for sample in counted])}"
    flops = dict(asker.journal.costs.get(name, {}))
    inputs = [asker.inputs([sample]) for sample in counted]
    options = {"processor": asker.processor, **asker.settings.attach_options()}
    for number, candidate in enumerate([None, *candidates]):
        key = asker.key(candidate)
        if key not in flops:
            stages = FULL if candidate is None else candidate.run.stages
            flops[key] = sum(prefill_flops(asker.model, tensors, stages, **options) for tensors in inputs)
        progress(number)
    asker.journal.add_cost(name, flops)
    return {candidate.run.key: flops[candidate.run.key] / flops[FULL] for candidate in candidates}


def time_all(asker: Asker, candidates: Sequence[Candidate], sample: Sample, repeats: int) -> dict[str, Cost]:
    """Return the measured costs of the prompt of one question by key, all from one session of interleaved rounds.

    Position ids change no cost: candidates that differ in them alone are measured once. Recorded sessions of this
    machine are used again.
    """
    by_spec = {candidate.spec: candidate.run.stages for candidate in candidates}
    setting = {**environment(asker.model), "sample": asker.keys[sample.id], "repeats": repeats}

    def measure() -> list[Cost]:
        return measure_costs(
            asker.model,
            asker.inputs([sample]),
            list(by_spec.values()),
            processor=asker.processor,
            repeats=repeats,
            decode_tokens=1,
            **asker.settings.attach_options(),
        )

    costs = session_costs(asker.journal, setting, [FULL, *by_spec], measure)
    by_name = dict(zip([FULL, *by_spec], costs, strict=True))
    return {FULL: costs[0]} | {candidate.run.key: by_name[candidate.spec] for candidate in candidates}


def _digest(keys: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(keys).encode()).hexdigest()[:8]
