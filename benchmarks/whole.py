"""Whole models at their published size, with random weights: prefill, decode, memory, waits, graphs, with a method.

Four ways to a prefill take turns in one process: *full*, the unmodified model; *method*, the same with DivPrune
attached; *oracle*, the model given only the tokens that the method keeps, at their positions, with no decision; and
*public*, the manner of public code: a dense matrix of all pairs of tokens for each image, and a loop over it. Decode is
(a generation of T + 1 tokens - a generation of 1) / T. FastV is timed against the full model.

    python benchmarks/whole.py --model llava-1.5-7b --batch 1 8 32 --dtype bfloat16 --output whole.json
    python benchmarks/whole.py --model llava-1.5-7b --graphs --dtype bfloat16 --output graphs.json
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import tokensieve
from script import parser_of, run_script
from selection import divprune_loop
from shapes import ANSWER_CUE, IMAGE, PROMPT, SHAPES, TOY_SHAPES
from tokensieve.evaluate import environment
from tokensieve.measure import interleave, paired_ratio, peak_activation_bytes
from tokensieve.tokens import ConnectorTokens

WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "Memcpy DtoH")
Context = Callable[[], AbstractContextManager[Any]]


class Kept:
    """The model given only some tokens of each image: no hook, no wrapper, and positions known beforehand.

    Args:
        spec: the method whose choice is recorded once, with the positions that it gives to the LLM.
    """

    def __init__(self, model: Any, inputs: dict[str, Tensor], spec: str, image_tokens: int) -> None:
        self.model, self.llm = model, model.get_decoder()
        self.visual = {
            name: inputs[name] for name in ("pixel_values", "image_sizes", "image_grid_thw") if name in inputs
        }
        handle = self.llm.register_forward_pre_hook(self._record, with_kwargs=True)
        with tokensieve.attach(model, spec) as sieve:
            self.logits = model(**inputs, logits_to_keep=1).logits
            self.kept = torch.stack([row[0].kept for row in sieve.last])  # [B, K]
        handle.remove()
        ids = inputs["input_ids"]
        before = torch.arange(PROMPT, device=ids.device).expand(len(ids), -1)
        after = torch.arange(PROMPT + image_tokens, ids.shape[1], device=ids.device).expand(len(ids), -1)
        self.ids = ids.gather(1, torch.cat([before, PROMPT + self.kept, after], 1))

    def _record(self, llm: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self.positions = kwargs.get("position_ids")

    def features(self) -> Tensor:
        """Return the features of each image, `[B, N, D]`."""
        output = self.model.get_image_features(**self.visual, return_dict=True).pooler_output
        return torch.stack(list(output))

    def prefill(self, kept: Tensor | None = None) -> Tensor:
        """Return the logits after the prompt; ``kept`` `[B, K]` replaces the recorded choice."""
        index = (self.kept if kept is None else kept)[..., None]
        features = self.features().take_along_dim(index, 1)
        embeddings = self.model.get_input_embeddings()(self.ids)
        embeddings = embeddings.masked_scatter((self.ids == IMAGE)[..., None], features.to(embeddings.dtype))
        output = self.llm(inputs_embeds=embeddings, position_ids=self.positions, use_cache=True)
        logits: Tensor = self.model.lm_head(output.last_hidden_state[:, -1:])
        return logits

    def public(self) -> Tensor:
        """Return the logits of a prefill in the manner of public code: image by image, with a dense matrix."""
        features, budget = self.features(), self.kept.shape[1]
        kept = [divprune_loop(ConnectorTokens(rows[None].float()), budget) for rows in features]
        return self.prefill(torch.stack(kept))


def waits_of(call: Callable[[], Any], device: str) -> dict[str, int] | str:
    """Count what makes the host wait for the device, by the profiler."""
    if device != "cuda":
        return "skipped: counted on a CUDA device only"
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
    counts = Counter(name for event in profiler.events() for name in WAITS if event.name.startswith(name))
    return dict(counts)


def row_of(model: Any, shape: Any, batch: int, args: argparse.Namespace, device: str) -> dict[str, Any]:
    """Measure one batch size."""
    inputs = shape.prompts(model, [ANSWER_CUE] * batch)
    spec, fastv = f"divprune(keep={args.keep})", f"fastv(layer=2, keep={args.keep})"
    known = Kept(model, inputs, spec, shape.image_tokens)
    apart = (known.logits - known.prefill()).abs().max().item() / known.logits.float().std().item()

    def prefill() -> Tensor:
        logits: Tensor = model(**inputs, logits_to_keep=1).logits
        return logits

    attach: Context = partial(tokensieve.attach, model, spec)
    attach_fastv: Context = partial(tokensieve.attach, model, fastv)
    ways: dict[str, tuple[Callable[[], Any], Context]] = {
        "full": (prefill, nullcontext),
        "method": (prefill, attach),
        "oracle": (known.prefill, nullcontext),
        "public": (known.public, nullcontext),
        "fastv": (prefill, attach_fastv),
    }
    calls, around = [call for call, _ in ways.values()], [context for _, context in ways.values()]
    prefill_ms = dict(
        zip(ways, interleave(calls, around=around, repeats=args.repeats, warmup=1, device=device), strict=True)
    )
    memory, waits = {}, {}
    for name, (call, context) in ways.items():
        with context():
            memory[name] = peak_activation_bytes(call, device) / 2**20
            waits[name] = waits_of(call, device)
    return {
        "batch": batch,
        "image_tokens": [shape.image_tokens, known.kept.shape[1]],
        "logit_difference_over_std": apart,
        "prefill_ms": prefill_ms,
        "full_over_method": vars(paired_ratio(prefill_ms["full"], prefill_ms["method"])),
        "method_over_oracle": vars(paired_ratio(prefill_ms["method"], prefill_ms["oracle"])),
        "public_over_method": vars(paired_ratio(prefill_ms["public"], prefill_ms["method"])),
        "full_over_fastv": vars(paired_ratio(prefill_ms["full"], prefill_ms["fastv"])),
        "decode_ms_per_token": decode(model, inputs, known, {"full": nullcontext, "method": attach}, args, device),
        "peak_memory_mib": memory,
        "waits": waits,
    }


def decode(
    model: Any,
    inputs: dict[str, Tensor],
    known: Kept,
    contexts: dict[str, Context],
    args: argparse.Namespace,
    device: str,
) -> dict[str, list[float]]:
    """Time decoding per token; the oracle is a text prompt of as many tokens as the method leaves."""
    texts = known.ids.masked_fill(known.ids == IMAGE, 11)
    as_text = {"input_ids": texts, "attention_mask": torch.ones_like(texts)}
    settings = {"do_sample": False, "num_beams": 1}
    lengths, calls, around = (1, args.tokens + 1), [], []
    for name, context in [*contexts.items(), ("oracle", nullcontext)]:
        given = as_text if name == "oracle" else inputs
        for length in lengths:
            calls.append(partial(model.generate, **given, min_new_tokens=length, max_new_tokens=length, **settings))
            around.append(context)
    times = interleave(calls, around=around, repeats=max(2, args.repeats // 2), warmup=1, device=device)
    pairs = zip(times[::2], times[1::2], strict=True)
    per_way = [[(long - short) / args.tokens for short, long in zip(*pair, strict=True)] for pair in pairs]
    return dict(zip([*contexts, "oracle"], per_way, strict=True))


def graphs_of(model: Any, shape: Any, args: argparse.Namespace, device: str) -> list[dict[str, Any]]:
    """Try torch.compile of the LLM and a CUDA graph of the prefill: what works, and its time over the plain run's."""
    inputs, rows = shape.prompts(model, [ANSWER_CUE]), []

    def prefill() -> Tensor:
        logits: Tensor = model(**inputs, logits_to_keep=1).logits
        return logits

    specs = {"full": "full", "method": f"divprune(keep={args.keep})", "fastv": f"fastv(layer=2, keep={args.keep})"}
    for name, spec in specs.items():
        with tokensieve.attach(model, spec):
            expected = prefill()
            (plain,) = interleave([prefill], repeats=args.repeats, warmup=1, device=device)
            for way, run in {"torch.compile": compiled, "CUDA graph": captured}.items():
                row: dict[str, Any] = {"method": name, "way": way, "plain_ms": plain}
                try:
                    row |= run(model, prefill, expected, args, device)
                except Exception as error:  # tried, and reported: what fails here is a result
                    row |= {
                        "status": "fails",
                        "reason": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}",
                    }
                rows.append(row)
                print({key: value for key, value in row.items() if not key.endswith("_ms")}, flush=True)
    return rows


def compiled(
    model: Any, prefill: Callable[[], Tensor], expected: Tensor, args: argparse.Namespace, device: str
) -> dict[str, Any]:
    """Compile the LLM, in place, for one way; ``backend="eager"`` in a toy run only traces."""
    llm, backend = model.get_decoder(), "eager" if args.toy else "inductor"
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    llm.compile(backend=backend)
    try:
        apart = (prefill() - expected).abs().max().item() / expected.float().std().item()
        (times,) = interleave([prefill], repeats=args.repeats, warmup=1, device=device)
        breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
    finally:
        llm._compiled_call_impl = None
        torch._dynamo.reset()
    found = {"backend": backend, "graph_breaks": breaks, "logit_difference_over_std": apart}
    return {"status": "works", "compiled_ms": times, **found}


def captured(
    model: Any, prefill: Callable[[], Tensor], expected: Tensor, args: argparse.Namespace, device: str
) -> dict[str, Any]:
    """Capture one prefill in a CUDA graph and replay it."""
    if device != "cuda":
        return {"status": "skipped", "reason": "needs a CUDA device"}
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        prefill()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = prefill()
    (times,) = interleave([graph.replay], repeats=args.repeats, warmup=1, device=device)
    apart = (logits - expected).abs().max().item() / expected.float().std().item()
    return {"status": "works", "replay_ms": times, "logit_difference_over_std": apart}


@torch.inference_mode()
def run(args: argparse.Namespace) -> dict[str, Any]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results: list[dict[str, Any]] = []
    versions: dict[str, Any] = {}
    for name in args.model:
        shape = (TOY_SHAPES if args.toy else SHAPES)[name]
        model = shape.build(getattr(torch, args.dtype), device, args.attention)
        versions = environment(model)
        if args.graphs:
            results += [{"model": name, **row} for row in graphs_of(model, shape, args, device)]
            continue
        for batch in args.batch:
            try:
                row = row_of(model, shape, batch, args, device)
            except torch.cuda.OutOfMemoryError:
                row = {"batch": batch, "status": "out of memory"}
                torch.cuda.empty_cache()
            results.append({"model": name, **row})
            print({key: value for key, value in results[-1].items() if not key.endswith("_ms")}, flush=True)
    settings = {**vars(args), "output": None, "device": device}
    return {"settings": settings, "environment": versions, "results": results}


def main() -> None:
    parser = parser_of(__doc__, threads=None)
    parser.add_argument("--model", choices=list(SHAPES), nargs="+", default=["llava-1.5-7b"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--keep", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32, help="generated tokens whose time counts")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--attention", choices=["sdpa", "eager", "flash_attention_2"], default="sdpa")
    parser.add_argument("--graphs", action="store_true", help="only torch.compile and CUDA graphs, at batch 1")
    parser.add_argument("--toy", action="store_true", help="tiny models: only checks that this script runs")
    run_script(parser, run)


if __name__ == "__main__":
    main()
