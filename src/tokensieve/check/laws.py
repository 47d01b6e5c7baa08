"""The equivalence checks (laws) of one method on a live model, each with its measured deviation.

1. identity: keeping all tokens changes no bit of the logits. Detaching the method restores the model.
2. oracle: a reduced run equals the unmodified model with the dropped tokens hidden (:mod:`~tokensieve.check.oracle`).
   With ``repair="size"``, with each dropped token a copy of the kept token that counts for it.
3. batch: every row of a ragged batch equals its own run.
4. continuation: a second turn on the returned cache equals a second turn of the oracle. With ``reselect=True``, it
   equals both turns as one fresh prompt.
5. conservation: every visual token is kept, merged into a known slot, or dropped.
6. cache: the KV cache holds as many columns as the reported token counts.

Deviations are differences of logits. Two runs that must be equal are computed in different shapes, so they differ by
rounding. The noise floor is measured: the unmodified model's prompts in a batch against each prompt by itself.
``MARGIN`` times that floor is allowed.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from tokensieve.check.runs import Runs
from tokensieve.check.trial import LawViolated, NotCheckable, Trial
from tokensieve.errors import Refusal
from tokensieve.methods import Method, parse

Status: TypeAlias = Literal["pass", "FAIL", "refused", "skipped"]
LAWS = ("identity", "oracle", "batch", "continuation", "conservation", "cache")


@dataclass(frozen=True)
class Verdict:
    """The outcome of one law for one method.

    Attributes:
        status: "refused" only for a :class:`~tokensieve.Refusal`; any other exception is a FAIL.
        deviation: largest difference of a logit; ``None`` where the law is not about logits or did not run.
        allowed: largest deviation that passes.
        reason: reason of a refusal, a skip or a failure, or a remark.
    """

    method: str
    law: str
    status: Status
    deviation: float | None = None
    allowed: float | None = None
    reason: str = ""


class Laws(Runs):
    """The laws on one model and a few prompts. The unmodified model runs once.

    Args:
        model: in eval mode, nothing attached.
        prompts: returns the left-padded inputs of the prompts with these numbers, on the model's device. The prompts
            differ in length; one of them has several images, if the model takes several.
        count: number of prompts.
        processor, budget_scope, separators, repair, reselect: as for ``attach``.

    Attributes:
        floor: largest difference of a logit by rounding alone.
        allowed: largest deviation that counts as rounding.
    """

    def check(self, method: str | Sequence[Method], **parameters: Any) -> Iterator[Verdict]:
        """Yield one verdict per law.

        Args:
            method: a spec or stages, as for ``attach``.
            parameters: values for parameters that a spec leaves open.

        Raises:
            Refusal: an unknown method or parameter.
        """
        stages = parse(method, **parameters) if isinstance(method, str) else list(method)
        name = " + ".join(map(str, stages))
        try:
            trial = Trial(self, stages)
        except Exception as error:  # only the type tells a refusal from a bug, and a bug fails every law
            for law in LAWS:
                if isinstance(error, Refusal):
                    yield Verdict(name, law, "refused", reason=str(error))
                else:
                    yield _failed(name, law, error)
            return
        for law in LAWS:
            yield self._verdict(name, law, getattr(trial, law))

    def _verdict(self, name: str, law: str, holds: Callable[[], tuple[float | None, str]]) -> Verdict:
        try:
            deviation, remark = holds()
        except NotCheckable as error:
            return Verdict(name, law, "skipped", reason=str(error))
        except Exception as error:  # a user's own run would raise it, too; also a Refusal after a run that worked
            return _failed(name, law, error)
        if deviation is None:
            return Verdict(name, law, "pass", reason=remark)
        allowed = 0.0 if law == "identity" else self.allowed
        return Verdict(name, law, "pass" if deviation <= allowed else "FAIL", deviation, allowed, remark)


def _failed(name: str, law: str, error: Exception) -> Verdict:
    reason = next(iter(str(error).splitlines()), "")
    if not isinstance(error, LawViolated):  # a bug: its author needs the line
        frame = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__}: {reason} ({frame.filename}, line {frame.lineno})"
    return Verdict(name, law, "FAIL", reason=reason)
