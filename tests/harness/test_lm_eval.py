"""lm-eval: the answers are those of ``compare``."""

from pathlib import Path

import pytest

from tests.harness.running import SPECS, Bench, Outcome, check_run, command, read_run


def run(bench: Bench, arguments: str, *options: object, processes: int = 1) -> Outcome:
    return command(
        "tokensieve", "harness", "lm-eval", "--model", "tokensieve-multimodal",
        "--model_args", f"pretrained=reference,{arguments}", "--tasks", "tokensieve_bench",
        "--include_path", bench.folder / "lm_eval", "--device", "cpu", "--batch_size", 8, *options, processes=processes,
    )  # fmt: skip


@pytest.mark.parametrize("spec", SPECS)
def test_the_answers_are_those_of_compare(spec: str, bench: Bench, tmp_path: Path) -> None:
    outcome = run(bench, f"method={spec}", "--apply_chat_template", "--log_samples", "--output_path", tmp_path)
    assert outcome.code == 0, outcome.err
    answers, results = read_run(tmp_path, bench)
    check_run(answers, results["config"]["tokensieve"], spec, bench)
    assert results["results"]["tokensieve_bench"]["exact,none"] > 0.5


def test_two_processes_give_the_same_result(bench: Bench, tmp_path: Path) -> None:
    assert len(bench.ids) % 2 == 1, "one process has a question less, which lm-eval fills up"
    options = "--apply_chat_template", "--log_samples", "--output_path", tmp_path
    outcome = run(bench, "method=vtc-cls,keep=36", *options, processes=2)
    assert outcome.code == 0, outcome.err
    answers, results = read_run(tmp_path, bench)
    check_run(answers, results["config"]["tokensieve"], "vtc-cls(keep=36)", bench, processes=2)


def test_a_refused_option_ends_the_run_with_a_line(bench: Bench) -> None:
    outcome = run(bench, "method=vtc-cls,positions=here")
    assert outcome.code == 2
    assert outcome.own_lines == ["tokensieve: positions must be 'original' or 'contiguous'; got 'here'"]
    assert "Traceback" not in outcome.err
