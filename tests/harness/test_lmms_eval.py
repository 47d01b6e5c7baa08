"""lmms-eval: the answers are those of ``compare``, and no error is scored as an empty answer."""

import json
from pathlib import Path

import pytest

from tests.harness.fakes import Request, attachment
from tests.harness.running import SPECS, Bench, Outcome, check_run, command, failing, read_run


def run(bench: Bench, arguments: str, *, output: Path | None = None, processes: int = 1) -> Outcome:
    saved = [] if output is None else ["--log_samples", "--output_path", output]
    return command(
        "lmms_eval", "--model", "tokensieve", "--model_args", f"pretrained=reference,{arguments}",
        "--tasks", "tokensieve_bench", "--include_path", bench.folder / "lmms_eval", "--device", "cpu",
        "--batch_size", 1 if "base=" in arguments else 8, *saved, processes=processes,
    )  # fmt: skip


def test_the_answers_are_those_of_compare(bench: Bench, tmp_path: Path) -> None:
    shared = {
        "model": "tokensieve",
        "tasks": "tokensieve_bench",
        "include_path": str(bench.folder / "lmms_eval"),
        "device": "cpu",
        "batch_size": "8",
        "log_samples": True,
    }
    runs = [
        shared | {"model_args": f'pretrained=reference,method="{spec}"', "output_path": str(tmp_path / str(number))}
        for number, spec in enumerate(SPECS)
    ]
    (tmp_path / "runs.yaml").write_text(json.dumps(runs), "utf-8")  # YAML reads JSON
    outcome = command("lmms_eval", "--config", tmp_path / "runs.yaml")
    assert outcome.code == 0, outcome.err
    for number, spec in enumerate(SPECS):
        answers, results = read_run(tmp_path / str(number), bench)
        check_run(answers, results["config"]["tokensieve"], spec, bench)
        assert results["results"]["tokensieve_bench"]["exact,none"] > 0.5


def test_two_processes_give_the_same_result(bench: Bench, tmp_path: Path) -> None:
    assert len(bench.ids) % 2 == 1, "one process has a question less, which lmms-eval fills up"
    outcome = run(bench, "method=trsm,keep=36", output=tmp_path, processes=2)
    assert outcome.code == 0, outcome.err
    answers, results = read_run(tmp_path, bench)
    check_run(answers, results["config"]["tokensieve"], "trsm(keep=36)", bench, processes=2)


def test_a_model_of_lmms_eval_as_base(bench: Bench, tmp_path: Path) -> None:
    outcome = run(bench, 'base=llava_hf,device_map=cpu,method="fastv(keep=36, layer=1)"', output=tmp_path)
    assert outcome.code == 0, outcome.err
    answers, results = read_run(tmp_path, bench)
    check_run(answers, results["config"]["tokensieve"], "fastv(keep=36, layer=1)", bench)
    assert results["config"]["model_backend"].startswith("lmms_eval.models.chat.llava_hf.LlavaHf")


def test_an_unknown_method_ends_the_run_with_a_line(bench: Bench) -> None:
    outcome = run(bench, "method=vtc-clss")
    assert outcome.code == 2
    assert outcome.own_lines == ["tokensieve: unknown method 'vtc-clss'; did you mean vtc-cls?"]
    assert "Traceback" not in outcome.err


def test_an_error_that_the_base_catches_ends_the_run(bench: Bench, tmp_path: Path) -> None:
    outcome = run(bench, f"base=llava_hf,device_map=cpu,method={failing(tmp_path, 'ZeroDivisionError(7)')}")
    assert outcome.code == 1
    assert outcome.own_lines == ["tokensieve: the run ends, so that no empty answer is scored: ZeroDivisionError: 7"]
    assert "failing.py" in outcome.err, "the traceback of a bug"


def test_memory_that_runs_out_in_one_process_ends_all(bench: Bench, tmp_path: Path) -> None:
    spec = failing(tmp_path, "torch.OutOfMemoryError('CUDA out of memory')", rank=1)
    outcome = run(bench, f"method={spec}", processes=2)
    assert outcome.code != 0
    assert any("memory ran out; use a smaller batch size" in line for line in outcome.own_lines)


def test_empty_answers_of_questions_that_never_reached_the_model_end_the_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from tokensieve.harness.lmms_eval_model import _checked  # imports lmms-eval

    def answering(requests: list[Request]) -> list[str]:
        counted.counts.questions += len(requests) - 1  # an exception before the last reached the model
        return ["red"] * (len(requests) - 1) + [""]

    counted = attachment()
    with pytest.raises(SystemExit) as end:
        _checked("llava_hf", counted, answering)([Request(), Request()])
    assert end.value.code == 2
    assert "1 questions never reached the model, and llava_hf returned empty answers" in capsys.readouterr().err

    def silent(requests: list[Request]) -> list[str]:
        counted.counts.questions += len(requests)  # the model answered with nothing
        return [""] * len(requests)

    assert _checked("llava_hf", counted, silent)([Request(), Request()]) == ["", ""]
    padding = Request({"__padding_only__": True})
    assert _checked("llava_hf", counted, silent)([Request(), padding]) == ["", ""]
