"""What the plug-in costs in a decode step of vLLM: its class ÷ vLLM's own class, in one engine on the same requests.

An image of each request is reduced and prefilled. From then on every second step runs with the model as an object of
vLLM's own class, which has the same weights, and the others with the plug-in's. Requests and caches are the same.

    python benchmarks/vllm_decode_cost.py --batch 1 8 --repeats 200
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from script import parser_of, run_script

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the model is in this process


def start(llm: Any, folder: str, batch: int, tokens: int) -> None:
    """Add requests with one image each, and prefill them."""
    import numpy as np
    from PIL import Image
    from transformers import AutoProcessor
    from vllm import SamplingParams

    content = [{"type": "image"}, {"type": "text", "text": "What is in the image?"}]
    message = [{"role": "user", "content": content}]
    text = AutoProcessor.from_pretrained(folder).apply_chat_template(message, add_generation_prompt=True)
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    for number in range(batch):
        pixels = np.random.default_rng(number).integers(0, 256, (224, 224, 3), dtype=np.uint8)
        prompt = {"prompt": text, "multi_modal_data": {"image": Image.fromarray(pixels)}}
        llm.llm_engine.add_request(f"{batch}-{number}", prompt, sampling)
    prefilled = 0
    while prefilled < batch:
        prefilled = sum(len(output.outputs[0].token_ids) > 0 for output in llm.llm_engine.step())


def measure(args: argparse.Namespace) -> dict[str, Any]:
    from vllm import LLM

    from tokensieve.measure import Spread, interleave, paired_ratio
    from tokensieve.vllm import checkpoint, engine_options

    folder, warmup = checkpoint(args.model), 5
    tokens = 2 * (args.repeats + warmup) + 8
    options = engine_options(args.model, args.method)
    llm = LLM(folder, dtype=args.dtype, enforce_eager=True, max_model_len=args.max_model_len, **options)
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    model, reduced = runner.model, type(runner.model)
    stock = reduced.__mro__[2]  # behind the plug-in's mixin

    @contextmanager
    def as_class(kind: type) -> Iterator[None]:
        model.__class__ = kind
        try:
            yield
        finally:
            model.__class__ = reduced

    rows = []
    for batch in args.batch:
        start(llm, folder, batch, tokens)
        times = interleave(
            [llm.llm_engine.step] * 2,
            around=[lambda: as_class(stock), lambda: as_class(reduced)],
            repeats=args.repeats,
            warmup=warmup,
            clock=time.process_time if args.cpu_time else time.perf_counter,
        )
        while llm.llm_engine.has_unfinished_requests():
            llm.llm_engine.step()
        without, with_plugin = map(Spread.of, times)
        ratio = paired_ratio(times[1], times[0])
        print(f"{batch} running: {without} ms without, {with_plugin} ms with the plug-in, ratio {ratio}", flush=True)
        rows.append({"batch": batch, "without_ms": times[0], "with_ms": times[1]})
    return {"model": args.model, "method": args.method, "cpu_time": args.cpu_time, "rows": rows}


if __name__ == "__main__":
    parser = parser_of(__doc__, threads=1)
    parser.add_argument("--model", default="llava-reference", help="folder, hub name or bundled model")
    parser.add_argument("--method", default="vtc-cls(keep=0.25)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="running requests")
    parser.add_argument("--repeats", type=int, default=200, help="timed steps of each")
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument("--cpu-time", action="store_true", help="CPU time of the process, for a busy machine")
    run_script(parser, measure)
