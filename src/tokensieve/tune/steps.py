"""The steps of a search: count costs, race on the search questions, judge the finalists on held-out ones, answer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from tokensieve.errors import Refusal
from tokensieve.evaluate.answer import is_out_of_memory
from tokensieve.evaluate.data import Sample
from tokensieve.evaluate.provenance import environment, model_identity, model_name
from tokensieve.evaluate.rows import FULL
from tokensieve.evaluate.table import clusters
from tokensieve.measure import Cost
from tokensieve.methods.spec_file import SpecFile
from tokensieve.tune.asking import Asker
from tokensieve.tune.costs import CostKind, Limit, count_all, time_all
from tokensieve.tune.race import Progress, Race, Standing, finalists, rounds
from tokensieve.tune.result import Finalist, TuneResult, Verdict
from tokensieve.tune.space import Candidate, attachable
from tokensieve.tune.statistics import drop_of, fewest, needed
from tokensieve.version import __version__

SEARCH_REPEATS, REPEATS = 3, 10  # timed rounds of all candidates, and of the finalists


class Search:
    """One search on one model; arguments as for :func:`tokensieve.tune.tune`."""

    def __init__(
        self,
        asker: Asker,
        max_drop: float,
        max_latency: str | None,
        limit: Limit | None,
        cost: CostKind,
        seed: int,
        progress: Progress | None,
    ) -> None:
        self.asker, self.max_drop, self.limit, self.cost_kind = asker, max_drop, limit, cost
        self.progress = progress or (lambda done, total, label: None)
        self.facts: dict[str, Any] = {
            "max_drop": max_drop,
            "max_latency": max_latency,
            "cost_kind": cost,
            "seed": seed,
        }

    def run(
        self, candidates: Sequence[Candidate], search_images: list[list[Sample]], held_out: list[Sample]
    ) -> TuneResult:
        """Count costs, race, and judge the finalists; end as soon as the answer is known."""
        asker = self.asker
        options = {"processor": asker.processor, **asker.settings.attach_options()}
        possible, refused = attachable(asker.model, candidates, **options)
        searched = [sample for image in search_images for sample in image]
        self.facts |= {"candidates": len(possible), "refused": refused}
        self.facts |= {"search_questions": len(searched), "held_out_questions": len(held_out)}
        if not possible:
            raise Refusal(f"this model can run none of the methods; {next(iter(refused.items()))}")
        least = fewest(self.max_drop)
        if len(held_out) < least:
            total = round(least * (len(held_out) + len(searched)) / len(held_out))
            why = (
                f"{len(held_out)} held-out questions cannot prove a drop of at most {self.max_drop:.2%}, even if no "
                f"answer changes: that takes {least}, and {total} questions in all."
            )
            return self._result("too few questions", why, questions_needed=total)
        self.flops = count_all(
            asker, possible, searched, lambda n: self.progress(n, len(possible), "counting FLOPs of the prefill")
        )
        costs, cheaper = self._affordable(possible, searched)
        if not cheaper:
            saving = "fewer FLOPs" if self.cost_kind == "flops" else "a shorter measured prefill"
            limit = "" if self.limit is None else f" and a prefill within {self.limit}"
            return self._result("not faster", f"None of {len(possible)} configurations has {saving}{limit}.")
        race = Race(asker, costs, len(held_out), self.max_drop)
        standings = race.run(cheaper, rounds(search_images, len(cheaper)), self.progress)
        self.facts["refused"] = refused | race.failed
        if not standings:
            raise Refusal(f"each method refuses a question; {next(iter(race.failed.values()))}")
        return self._judge(finalists(standings), searched, held_out)

    def _affordable(
        self, candidates: Sequence[Candidate], searched: Sequence[Sample]
    ) -> tuple[dict[str, float], list[Candidate]]:
        """Return the relative cost by key, and the candidates that are cheaper than the model and within the limit."""
        costs, within = self.flops, list(candidates)
        if self.cost_kind == "latency" or self.limit is not None:
            times = self._times(candidates, searched, SEARCH_REPEATS)
            if self.cost_kind == "latency":
                costs = {key: 1 / time.prefill_speedup.median for key, time in times.items() if key != FULL}
            if self.limit is not None:
                within = [candidate for candidate in candidates if self.limit.holds(times[candidate.run.key])]
        return costs, [candidate for candidate in within if costs[candidate.run.key] < 1]

    def _times(self, candidates: Sequence[Candidate], searched: Sequence[Sample], repeats: int) -> dict[str, Cost]:
        self.progress(0, len(candidates), f"timing {len(candidates)} configurations")
        sample = next(s for s in searched if self.asker.keys[s.id] not in self.asker.journal.skipped)
        try:
            return time_all(self.asker, candidates, sample, repeats)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise Refusal("memory ran out while the times of one prompt were measured; the answers are kept") from error

    def _judge(self, tested: Sequence[Standing], searched: Sequence[Sample], held_out: Sequence[Sample]) -> TuneResult:
        """Ask the held-out questions, the safest configuration first, until one breaks the bound.

        A configuration that refuses a held-out question leaves, as in the race. The proof of the others holds: the
        refusal depends on the question, not on whether answers are right.
        """
        asker, numbers = self.asker, clusters(held_out)
        times = self._times([standing.candidate for standing in tested], searched, REPEATS)
        judged: list[Finalist] = []
        total = (len(tested) + 1) * len(held_out)
        self.progress(0, total, "held-out questions: the unreduced model")
        asker.ask(None, held_out)
        full = asker.scores(None, held_out)
        accuracy = float(np.nanmean(full))
        if accuracy <= self.max_drop:  # any answers would hold the bound, so it would prove nothing
            self.facts |= {"full_accuracy": accuracy}
            why = (
                f"The unreduced model answers {accuracy:.2%} of the held-out questions right. With a drop of at most "
                f"{self.max_drop:.2%} allowed, a configuration without one right answer could pass. "
                "Check model, prompt, metric and the answers in the data."
            )
            return self._result("the full model fails", why)
        for number, standing in enumerate(tested, 1):
            candidate = standing.candidate
            self.progress(number * len(held_out), total, f"held-out questions: {candidate}")
            try:
                asker.ask(candidate, held_out)
            except Refusal as error:
                self.facts["refused"] = self.facts["refused"] | {candidate.run.key: str(error)}
                continue
            drop = drop_of(full, asker.scores(candidate, held_out), numbers)
            answers = [a for s in held_out if (a := asker.answers(candidate).get(asker.keys[s.id])) is not None]
            finalist = Finalist(
                method=candidate.method,
                spec=candidate.spec,
                keep=candidate.keep,
                positions=candidate.positions,
                drop=drop,
                holds=drop.high <= self.max_drop,
                search_drop=standing.drop,
                tokens_before=sum(answer.before for answer in answers) / len(answers),
                tokens_after=sum(answer.after for answer in answers) / len(answers),
                tokens_average=sum(answer.average for answer in answers) / len(answers),
                flops=self.flops[candidate.run.key],
                cost=times[candidate.run.key],
            )
            judged.append(finalist)
            if not finalist.holds:
                break
        if not judged:
            reason = next(reversed(self.facts["refused"].values()))
            raise Refusal(f"each remaining configuration refuses a held-out question; {reason}")
        skipped = asker.journal.skipped
        self.facts["held_out_questions"] = judged[0].drop.questions
        self.facts["search_questions"] = sum(asker.keys[sample.id] not in skipped for sample in searched)
        self.facts |= {"tested": tuple(judged), "full_accuracy": judged[0].drop.accuracy + judged[0].drop.mean}
        return self._answer(judged)

    def _answer(self, judged: Sequence[Finalist]) -> TuneResult:
        """Return the verdict on configurations that were judged in this order."""
        bound = f"{self.max_drop:.2%}"
        holding = [finalist for finalist in judged if finalist.holds]
        worth = [finalist for finalist in holding if self._is_worth_it(finalist)]
        if worth:
            chosen = worth[-1]
            why = (
                f"On {chosen.drop.questions} held-out questions accuracy drops by {chosen.drop.mean:.2%}, and by at "
                f"most {chosen.drop.high:.2%} with 95 % confidence; allowed is {bound}."
            )
            return self._result("use", why, chosen=chosen)
        last = judged[-1]
        if holding:
            speedup = holding[-1].cost.prefill_speedup
            why = (
                f"{holding[-1]} holds the bound, but its measured prefill is {speedup} times as fast as the full one"
                f"{'' if self.limit is None else f', and the limit is {self.limit}'}."
            )
            return self._result("not faster", why)
        questions = needed(last.drop, self.max_drop)
        measured = f"on {last.drop.questions} held-out questions accuracy drops by {last.drop.mean:.2%}"
        if questions is None:
            why = f"Even with {last}, {measured}; allowed is {bound}."
            return self._result("no configuration holds the bound", why)
        total = round(questions * (1 + self.facts["search_questions"] / last.drop.questions))
        why = (
            f"With {last}, {measured}, but by at most {last.drop.high:.2%} with 95 % confidence; allowed is {bound}. "
            f"About {total} questions in all would prove it, if the drop is as it seems."
        )
        return self._result("too few questions", why, questions_needed=total)

    def _is_worth_it(self, finalist: Finalist) -> bool:
        if self.limit is not None and not self.limit.holds(finalist.cost):
            return False
        return finalist.cost.prefill_speedup.low > 1 if self.cost_kind == "latency" else finalist.flops < 1

    def _result(self, verdict: Verdict, why: str, **facts: Any) -> TuneResult:
        answers = sum(map(len, self.asker.journal.answers.values()))
        return TuneResult(verdict=verdict, why=why, answers=answers, **self.facts, **facts)

    def spec_file(self, result: TuneResult) -> SpecFile:
        """Return the spec file of the chosen configuration."""
        chosen, asker = result.chosen, self.asker
        assert chosen is not None
        digest = hashlib.sha256(json.dumps(sorted(asker.keys.values())).encode()).hexdigest()[:16]
        machine = environment(asker.model)
        evidence = {
            "tokensieve": __version__,
            "date": machine["date"],
            "model": {"name": model_name(asker.model), **model_identity(asker.model)},
            "data": {"digest": digest, "search_questions": result.search_questions},
            "metric": asker.settings.metric,
            "prompt": asker.settings.prompt,
            "held_out_questions": chosen.drop.questions,
            "accuracy_full": round(chosen.drop.accuracy + chosen.drop.mean, 5),
            "accuracy": round(chosen.drop.accuracy, 5),
            "drop": round(chosen.drop.mean, 5),
            "drop_at_most": round(chosen.drop.high, 5),
            "confidence": "95 %, one-sided, paired, on held-out questions",
            "max_drop": result.max_drop,
            "tokens": [round(chosen.tokens_before, 1), round(chosen.tokens_after, 1)],
            "flops": round(chosen.flops, 4),
            "prefill_speedup": round(chosen.cost.prefill_speedup.median, 3),
            "seed": result.seed,
        }
        options = {**asker.settings.attach_options(), "positions": chosen.positions}
        return SpecFile(chosen.method, chosen.keep, options, evidence)
