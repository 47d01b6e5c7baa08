"""The same prompts in an engine and under transformers, with many methods."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.vllm.checkpoints import Expected, engine_prompts, save
from tests.vllm.engines import run_engine
from tokensieve.vllm import engine_options

METHODS = (
    "vtc-cls(keep=0.4)",
    "random(keep=5)",
    "uniform(keep=0.3)",
    "pool(keep=0.3)",
    "divprune(keep=6)",
    "trsm(keep=0.5)",
    "fopru(keep=0.4)",
    "visionzip(keep=6)",
    "prumerge+(keep=7)",
    "vispruner(keep=0.5)",
    "mmtok(keep=4)",
)
SAMPLING = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}


def assert_equal_to_transformers(
    family: str, positions: str, prompts: Sequence[Any], folder: Path, tiles: Sequence[int] | None = None
) -> None:
    """Compare answers and kept tokens: method by method, then all methods and sizes in one batch.

    Args:
        tiles: tiles of each image, where transformers takes each tile as an image of its own.
    """
    model = save(family, folder / "model")
    options = engine_options(model, METHODS[0], allowed=METHODS[1:], positions=positions)
    passes = [engine_prompts(family, prompts, tokensieve_method=method.split("(")[0]) for method in METHODS]
    whole = engine_prompts(family, prompts, tokensieve_keep=1.0)
    mixed = [prompt for requests in passes for prompt in requests]
    caching = {} if positions == "original" else {"enable_prefix_caching": False}
    out = run_engine(folder, model, *passes, whole, mixed, sampling=SAMPLING, **options, **caching)["passes"]
    expected, answers = Expected(family, model), []
    for method, found in zip((*METHODS, "full"), out, strict=False):
        ids, kept = expected.answer(prompts, method, positions=positions)
        assert found["ids"] == ids, method
        assert list(found["kept"].values()) == (kept if tiles is None else joined(kept, tiles)), method
        answers += ids
    assert out[-1]["ids"] == answers[: -len(prompts)]
    assert len(set(map(tuple, answers))) > len(answers) / 3  # they depend on what was kept


def joined(kept: Sequence[list[int]], tiles: Sequence[int], tokens: int = 16) -> list[list[int]]:
    """Join the kept tokens of each image's tiles, numbered through the image."""
    remaining = iter(kept)
    return [[tile * tokens + token for tile in range(n) for token in next(remaining)] for n in tiles]
