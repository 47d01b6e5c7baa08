"""Decisions and remarks follow from the intervals of results written by hand."""

from dataclasses import replace

import pytest

from tests.report.report_rows import Draft, results, row, unmeasured
from tokensieve.evaluate import Skipped
from tokensieve.evaluate.rows import label
from tokensieve.report.decision import Decision, break_even, prefill
from tokensieve.report.plots import curve
from tokensieve.report.remarks import explanations, remarks, warnings
from tokensieve.report.table import KEEP, number

FULL = row("full", None, 0.93)


def decide(*drafts: Draft, **options: object) -> Decision:
    return Decision(results([FULL, *drafts], **options))


def sentences(*drafts: Draft, **options: object) -> str:
    return "\n".join(decide(*drafts, **options).sentences())


def remarks_text(*drafts: Draft, **options: object) -> str:
    return "\n".join(remarks(decide(*drafts, **options)))


# -- the best of a budget -------------------------------------------------------------------------------------------


def test_the_best_of_a_budget_is_named_with_its_gaps() -> None:
    text = sentences(row("divprune", 36, 0.92), row("fastervlm", 36, 0.80), row("trsm", 16, 0.7))
    best = "Best at 36 tokens: divprune 92.0 %, −1.0 points to full (−2.5 to −0.0); "
    assert best + "ahead of fastervlm (+12.0, +9.2 to +15.6); 25% of the prefill FLOPs" in text
    assert "Best at 16 tokens: trsm 70.0 %, −23.0 points to full (−27.4 to −19.1); no other method" in text


def test_a_best_that_only_leads_by_chance_is_not_told_apart() -> None:
    """+2.5 points with many questions won and lost on both sides."""
    text = sentences(row("divprune", 36, 0.85), row("fastervlm", 36, 0.825, shift=40), row("trsm", 36, 0.82, shift=50))
    assert "divprune 85.0 %" in text
    assert "not told apart from fastervlm (+2.5, −" in text
    assert ", nor from trsm;" in text
    assert "ahead of" not in text


def test_a_runner_up_can_be_behind_while_a_lower_row_is_not_told_apart() -> None:
    text = sentences(row("divprune", 36, 0.85), row("fastervlm", 36, 0.83), row("trsm", 36, 0.825, shift=60))
    assert "ahead of fastervlm (+2.0, " in text
    assert "but not told apart from trsm" in text


def test_rows_stand_by_falling_accuracy_within_a_budget_and_full_first() -> None:
    decision = decide(row("trsm", 16, 0.5), row("pool", 36, 0.6), row("oracle", 36, 0.7), row("vtc-cls", 36, 0.8))
    names = [label(line.row.method, line.row.keep) for line in decision.lines]
    assert names == ["full", "vtc-cls at 36", "oracle at 36", "pool at 36", "trsm at 16"]


def test_the_oracle_is_never_the_best() -> None:
    text = sentences(row("oracle", 36, 0.93), row("vtc-cls", 36, 0.8))
    assert "vtc-cls 80.0 %" in text
    assert "oracle" not in text


def test_a_baseline_can_be_the_best_and_is_called_one() -> None:
    assert "pool (a baseline) 90.0 %" in sentences(row("pool", 36, 0.9), row("vtc-cls", 36, 0.8))


def test_a_method_with_more_tokens_over_the_layers_is_not_ranked() -> None:
    """A method inside the LLM that ends with 36 tokens has run its first layers with 144."""
    inside = row("fastv", 36, 0.92, tokens_average=63)
    decision = decide(inside, row("vtc-cls", 36, 0.8))
    assert "Best at 36 tokens: vtc-cls 80.0 %" in "\n".join(decision.sentences())
    (remark,) = [text for text in remarks(decision) if text.startswith("Not ranked, ")]
    assert remark.endswith("from those of the other methods: fastv at 36 (63 against 36).")
    same_average = row("fastv", 36, 0.92, tokens_after=10, tokens_average=36)
    assert "Best at 36 tokens: fastv 92.0 %" in sentences(same_average, row("vtc-cls", 36, 0.8))


def test_budgets_that_are_written_differently_are_one() -> None:
    decision = decide(row("vtc-cls", 0.25, 0.8), row("trsm", 36, 0.85), row("pool", 16, 0.5))
    assert [group.title for group in decision.budgets] == ["25% = 36 (36 tokens)", "16 tokens"]


def test_a_method_that_chooses_its_tokens_competes_where_it_has_as_many() -> None:
    near = row("prumerge", None, 0.9, tokens_after=33, tokens_average=33)
    far = row("cls-knee", None, 0.9, tokens_after=80, tokens_average=80)
    decision = decide(row("vtc-cls", 36, 0.8), near, far)
    assert [[line.row.method for line in group.lines] for group in decision.budgets] == [
        ["cls-knee"],
        ["prumerge", "vtc-cls"],
    ]
    assert [group.title for group in decision.budgets] == ["80 tokens", "36 tokens"]
    assert [KEEP.cell(line).value for line in decision.lines] == ["all", "–", "–", "36"]


# -- worth the cost -------------------------------------------------------------------------------------------------


def test_the_cheapest_row_that_keeps_the_accuracy_is_named() -> None:
    text = sentences(row("vtc-cls", 72, 0.93), row("trsm", 36, 0.925), row("pool", 16, 0.7))
    expected = (
        "Cheapest method not told apart from the full model: trsm at 36, with 25% of the prefill FLOPs (−0.5 points"
    )
    assert expected in text


def test_few_questions_show_no_accuracy_to_be_kept() -> None:
    few = [row("full", None, 0.9, samples=40), row("trsm", 36, 0.85, samples=40, shift=3)]
    text = "\n".join(Decision(results(few)).sentences())
    assert "No method is shown to keep the accuracy of the full model" in text
    assert "points is not excluded." in text


def test_a_loss_of_every_method_is_stated() -> None:
    assert "Every method loses accuracy against the full model" in sentences(row("trsm", 36, 0.7))


def test_rows_of_equal_cost_as_shown_are_chosen_by_accuracy() -> None:
    cheaper = row("trsm", 36, 0.92, flops_ratio=0.2502)
    better = row("vtc-cls", 36, 0.93, flops_ratio=0.2519)
    assert "the full model: vtc-cls at 36" in sentences(cheaper, better)


def test_the_pareto_front_by_each_cost() -> None:
    decision = decide(
        row("vtc-cls", 36, 0.9, prefill_ms=30.0),  # slower than the full model, which is better
        row("trsm", 36, 0.85),  # faster
        row("pool", 36, 0.8),  # behind trsm at the same cost
        row("oracle", 16, 0.93),
    )
    fronts = {line.row.method: line.front for line in decision.lines}
    assert fronts == {
        "full": ("flops_ratio", "prefill_ms"),
        "vtc-cls": ("flops_ratio",),
        "trsm": ("prefill_ms",),
        "pool": (),
        "oracle": (),
    }


def test_times_that_look_different_in_the_table_are_different_on_the_front() -> None:
    slower, faster = row("divprune", 16, 0.87, prefill_ms=7.63), row("trsm", 16, 0.8, prefill_ms=7.56)
    lines = {line.row.method: line for line in decide(slower, faster).lines}
    assert "prefill_ms" in lines["divprune"].front
    assert "prefill_ms" in lines["trsm"].front
    # both are "804" in the table
    large = [row("trsm", 16, 0.8, prefill_ms=804.2), row("divprune", 16, 0.87, prefill_ms=804.4)]
    decision = Decision(results([row("full", None, 0.9, prefill_ms=900.0), *large]))
    assert [line.row.method for line in decision.lines if "prefill_ms" in line.front] == ["full", "divprune"]


def test_uncertain_times_make_no_front() -> None:
    decision = decide(row("trsm", 36, 0.85, timing_note="the times are uncertain"))
    assert [line.front for line in decision.lines] == [("flops_ratio",), ("flops_ratio",)]
    assert "mark no row" in dict(explanations(decision))["Pareto"]
    assert "Pareto front" not in curve(decision, "prefill_ms")
    assert "Pareto front" in curve(decision, "flops_ratio")


def test_without_measurements_tokens_are_the_cost() -> None:
    decision = Decision(
        results([unmeasured(FULL), unmeasured(row("trsm", 36, 0.93)), unmeasured(row("pool", 36, 0.9))])
    )
    assert decision.costs == ("tokens_average",)
    assert [line.front for line in decision.lines] == [(), ("tokens_average",), ()]
    text = "\n".join(decision.sentences())
    assert "the full model: trsm at 36, with 36 tokens" in text
    assert "FLOPs" not in text
    assert "prefill" not in text


# -- speed ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "median", "high", "words"),
    [
        (1.1, 1.2, 1.3, "faster prefill: 1.20× (1.10–1.30)"),
        (1.001, 1.002, 1.004, "faster prefill: 1.002× (1.001–1.004)"),
        (0.8, 0.9, 0.95, "slower prefill: 0.90× (0.80–0.95)"),
        (0.9, 0.99, 1.1, "prefill time not told apart from full's (0.90–1.10×)"),
        (1.003, 1.02, 1.1, "faster prefill: 1.02× (1.003–1.10)"),
        (0.996, 1.0, 1.004, "prefill time not told apart from full's (0.996–1.004×)"),
        (1.0, 1.02, 1.1, "prefill time not told apart from full's (1.00–1.10×)"),
    ],
)
def test_a_speedup_is_claimed_only_where_the_quartiles_exclude_1(
    low: float, median: float, high: float, words: str
) -> None:
    draft = row("trsm", 36, 0.9, prefill_speedup_low=low, prefill_speedup=median, prefill_speedup_high=high)
    assert prefill(draft.row) == words
    remark = "Prefill slower than the full model's on this model and machine, by the quartiles: trsm at 36 (0.90×)"
    assert (remark in remarks_text(draft)) == (high < 1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"break_even": "at once", "decode_speedup_low": 1.0}, "saves time from the first token"),
        ({"break_even": "at once"}, "saves time from the first token; decoding speed not told apart from full's"),
        ({"break_even": "never"}, "never saves time"),
        ({"break_even": "not told apart"}, "time saved over a whole answer: not told apart from none"),
        (
            {"break_even": "after", "break_even_tokens": 12.0, "break_even_low": 9.0, "break_even_high": 20.0},
            "saves time after 12 generated tokens (9 to 20)",
        ),
        (
            {"break_even": "after", "break_even_tokens": 12.0, "break_even_low": 9.0, "break_even_high": None},
            "saves time after 12 generated tokens (9 to never)",
        ),
        ({"break_even": None}, ""),
    ],
)
def test_break_even_in_words(changes: dict[str, object], words: str) -> None:
    assert break_even(row("trsm", 36, 0.9, **changes).row) == words


def test_large_numbers_have_no_exponent() -> None:
    assert [number(value, ".2g") for value in (0.123, 12.3, 1234.5, None)] == ["0.12", "12", "1200", "–"]


def test_an_undecided_time_is_stated_once() -> None:
    undecided = {"prefill_speedup_low": 0.9, "prefill_speedup": 1.0, "prefill_speedup_high": 1.1}
    text = sentences(row("trsm", 36, 0.9, **undecided, break_even="not told apart"))
    assert "prefill time not told apart from full's" in text
    assert "over a whole answer" not in text
    assert "over a whole answer" in sentences(row("trsm", 36, 0.9, break_even="not told apart"))


def test_a_busy_machine_is_noted_once() -> None:
    note = "the times are uncertain: other processes used 1.5 of 2 cores"
    assert warnings(decide(row("trsm", 36, 0.9, timing_note=note), row("pool", 36, 0.8, timing_note=note))) == [
        "The times are uncertain: other processes used 1.5 of 2 cores."
    ]


# -- warnings -------------------------------------------------------------------------------------------------------


def test_a_full_model_at_the_floor_is_a_warning() -> None:
    low = [row("full", None, 0.03), row("trsm", 36, 0.03)]
    (warning,) = warnings(Decision(results(low)))
    assert warning.startswith("The full model answers only 3.0 % right, so the numbers say little")
    assert warnings(decide(row("trsm", 36, 0.9))) == []


def test_pictures_that_the_bundled_model_does_not_know_are_a_warning() -> None:
    (warning,) = warnings(decide(row("trsm", 36, 0.9), foreign_images=True))
    assert (
        warning == "The bundled model knows only its own drawn scenes: its answers about these pictures mean nothing."
    )


def test_methods_that_dropped_nothing_are_named() -> None:
    whole = row("vtc-cls", 9999, 0.93, tokens_after=144, tokens_average=144)
    assert "the full model with the method's cost: vtc-cls at 9999." in remarks_text(whole, row("trsm", 36, 0.9))
    assert "Dropped no token" not in remarks_text(row("trsm", 36, 0.9))


def test_a_run_that_is_not_complete_is_a_warning() -> None:
    (warning,) = warnings(Decision(replace(results([FULL, row("trsm", 36, 0.9)]), complete=False)))
    assert warning.startswith("This run is not complete")


def test_few_questions_are_a_warning() -> None:
    (warning,) = warnings(Decision(results([row("full", None, 0.9, samples=50)])))
    assert warning.startswith("Only 50 questions")


def test_skipped_questions_are_listed() -> None:
    broken = [Skipped(str(i), f"data.jsonl, line {i}", "the image is truncated") for i in range(7)]
    (one,) = warnings(decide(row("trsm", 36, 0.9), skipped=broken[:1]))
    assert one == "1 question was skipped and not counted: data.jsonl, line 0: the image is truncated."
    (many,) = warnings(decide(row("trsm", 36, 0.9), skipped=broken))
    assert many.startswith("7 questions were skipped")
    assert many.endswith("data.jsonl, line 4: the image is truncated; and 2 more.")


# -- remarks --------------------------------------------------------------------------------------------------------

RANDOM = row("random", 36, 0.60, seeds=3)


def test_remarks_name_ties_with_random() -> None:
    text = remarks_text(row("vtc-cls", 36, 0.9), RANDOM, row("pool", 36, 0.58, shift=40))
    assert "Below random" not in text
    assert "Not told apart from random, as the interval of the difference holds zero: pool at 36." in text


def test_remarks_name_losses_to_random() -> None:
    losing = remarks_text(row("vtc-cls", 36, 0.4), RANDOM, row("pool", 36, 0.3))
    assert ": vtc-cls at 36 (−20.0, −24.2 to −16.4), pool at 36 (−30.0, −34.7 to −25.7)." in losing


def test_remarks_name_a_missing_random_baseline() -> None:
    assert "no random baseline" in remarks_text(row("vtc-cls", 36, 0.9))


def test_remarks_name_rows_without_a_comparable_random_row() -> None:
    other_budget = remarks_text(row("vtc-cls", 72, 0.4), RANDOM, row("trsm", 36, 0.9))
    assert "did not run with about as many tokens: vtc-cls at 72." in other_budget
    assert "Below random" not in other_budget
    assert "no random baseline" not in other_budget


def test_leaders_by_type_are_named_only_where_the_interval_says_so() -> None:
    apart = remarks_text(row("trsm", 36, (0.9, 0.5)), row("vtc-cls", 36, (0.8, 0.6)))
    assert "At 36, ahead of every other method on a question type: trsm on colour; vtc-cls on where." in apart
    by_chance = remarks_text(row("trsm", 36, (0.9, 0.5)), row("vtc-cls", 36, (0.88, 0.51), shift=20))
    assert "ahead of every other method" not in by_chance


def test_a_leader_by_type_is_ahead_of_each_other_row() -> None:
    """The runner-up is behind, a lower row is not told apart."""
    rows = [row("trsm", 36, (0.9, 0.5)), row("pool", 36, (0.85, 0.5)), row("vtc-cls", 36, (0.84, 0.5), shift=30)]
    assert "ahead of every other method" not in remarks_text(*rows)
    assert "trsm on colour" in remarks_text(*rows[:2])


def test_equal_rows_lead_no_type() -> None:
    same = [row("trsm", 36, 0.9), row("vtc-cls", 36, 0.9)]
    assert "ahead of every other method" not in remarks_text(*same)


def test_types_on_which_the_best_method_loses_are_named() -> None:
    text = remarks_text(row("trsm", 36, (0.93, 0.6)))
    assert "At 36 trsm loses points on these question types: where −33.0 (−39.8 to −26.9)." in text


def test_data_without_types_have_no_remark_on_them() -> None:
    assert "question type" not in remarks_text(row("trsm", 36, 0.5), row("pool", 36, 0.4), types=("",))


# -- explanations ---------------------------------------------------------------------------------------------------


def test_the_rows_that_are_no_methods_are_explained() -> None:
    terms = dict(explanations(decide(RANDOM, row("oracle", 36, 0.9), row("pool", 36, 0.5))))
    assert "keeps the tokens of the asked object first" in terms["oracle"]
    assert "no upper bound" in terms["oracle"]
    assert "the mean of 3 seeds" in terms["random"]
    assert "a simple baseline" in terms["pool"]
    assert "oracle" not in dict(explanations(decide(RANDOM)))


def test_the_meaning_of_a_budget_is_explained() -> None:
    assert "tokens that stay at the end" in dict(explanations(decide(RANDOM)))["budget"]
    averaged = dict(explanations(decide(RANDOM, keep_means="average")))["budget"]
    assert averaged.startswith("tokens averaged over the LLM's layers")
