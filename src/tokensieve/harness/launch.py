"""Start a harness that finds no models of other packages by itself, with Tokensieve's model registered."""

from __future__ import annotations

import json
import os
import runpy
import sys
from collections.abc import Sequence
from functools import partial, wraps
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tokensieve.errors import Refusal
from tokensieve.loading import LoadOptions

STATUS = "status.json"  # of a VLMEvalKit run
PLANNED = ("mode_infer", "official_submission")  # its reasons for a data set without a score that are no failures


def check_installed(package: str, install: str) -> None:
    """Refuse, with the command that installs it, a harness that is not installed."""
    if find_spec(package) is None:
        raise Refusal(f"{install.split()[-1]} is not installed in this environment: {install} (docs/harness.md)")


def run_lm_eval(arguments: Sequence[str]) -> None:
    """Run lm-eval's command line with the model ``tokensieve-multimodal`` known to it."""
    check_installed("lm_eval", 'pip install "lm-eval>=0.4.13"')
    from lm_eval.__main__ import cli_evaluate

    import tokensieve.harness.lm_eval_model  # noqa: F401  # registers the model

    sys.argv = ["lm-eval", *arguments]
    cli_evaluate()


def run_vlmevalkit(
    model: str,
    arguments: Sequence[str],
    *,
    name: str,
    work_dir: Path,
    loading: LoadOptions,
    max_new_tokens: int,
    options: dict[str, Any],
) -> None:
    """Run VLMEvalKit's ``run.py`` on one model with a method, and add the record to its ``status.json``.

    Args:
        model, loading, max_new_tokens, options: as for
            :class:`~tokensieve.harness.vlmevalkit_model.Tokensieve`.
        arguments: of ``run.py``, without ``--model`` and ``--work-dir``.
        name: of the model in VLMEvalKit's files.

    Raises:
        Refusal: VLMEvalKit is not installed, or it has skipped a data set.
    """
    check_installed("vlmeval", "pip install -e PATH/TO/VLMEvalKit")
    import torch
    import vlmeval
    from vlmeval.config import supported_VLM

    from tokensieve.harness.vlmevalkit_model import Tokensieve, attachments

    supported_VLM[name] = partial(Tokensieve, model, loading, max_new_tokens, options)
    if not torch.cuda.is_available():
        _use_gloo()
    # the results are those of this run, so that no answers of another method are reused
    sys.argv = ["run.py", "--model", name, "--work-dir", str(work_dir), *arguments]
    if find_spec("vlmeval.run") is not None:
        runpy.run_module("vlmeval.run", run_name="__main__")
    else:  # a checkout holds it beside the package
        runpy.run_path(str(Path(str(vlmeval.__file__)).parents[1] / "run.py"), run_name="__main__")
    if int(os.environ.get("RANK", "0")) > 0:
        return
    folder = Path(os.environ.get("MMEVAL_ROOT", str(work_dir))) / name
    if attachments:
        _add_record(folder / STATUS, attachments[-1].record())
    _check_complete(folder / STATUS)


def _use_gloo() -> None:
    """Let several processes meet without a GPU: VLMEvalKit asks for NCCL, which needs one."""
    import torch.distributed

    init = torch.distributed.init_process_group

    @wraps(init)
    def init_process_group(*args: Any, **kwargs: Any) -> Any:
        return init(*args, **{**kwargs, "backend": "gloo"})

    torch.distributed.init_process_group = init_process_group


def _add_record(status: Path, record: dict[str, Any]) -> None:
    facts = json.loads(status.read_text("utf-8"))
    status.write_text(json.dumps(facts | {"tokensieve": record}, indent=2, ensure_ascii=False), "utf-8")


def _check_complete(status: Path) -> None:
    """Refuse a run that VLMEvalKit ended with 0 although it has skipped a data set."""
    for data, facts in json.loads(status.read_text("utf-8")).get("datasets", {}).items():
        reason = facts.get("error_message") or facts.get("skip_reason") or ""
        if reason and not reason.startswith(PLANNED):
            raise Refusal(f"VLMEvalKit skipped {data}: {reason}")
