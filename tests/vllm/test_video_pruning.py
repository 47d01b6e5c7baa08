"""The installed vLLM's own pruning of videos keeps the tokens that `evs` and `vidcom2` keep."""

import torch

from tests.golden.drawn import clip_rows
from tests.vllm.apart import run_apart
from tokensieve import parse
from tokensieve.tokens import ConnectorTokens

SIZES = ((1, 7, 9), (2, 5, 3), (8, 14, 14), (13, 7, 9), (32, 10, 15))  # frames, and the grid of tokens in each
PRUNED = (0.0, 0.1, 0.5, 0.75, 0.9, 0.98)


def engine_and_ours() -> list[tuple[str, list[int], list[int]]]:
    """Return for each case its name, what vLLM keeps, and what the method keeps."""
    from vllm.multimodal.video_prune import evs, vidcom2

    torch.set_num_threads(1)
    cases = []
    for number, (frames, height, width) in enumerate(SIZES):
        rows = clip_rows(100 + number, frames, height * width, 64).flatten(0, 1)
        tokens = ConnectorTokens(rows[None], frames=frames)
        for pruned in PRUNED:
            for name, engine in (("evs", evs), ("vidcom2", vidcom2)):
                mask = engine.compute_retention_mask(rows, (frames, 2 * height, 2 * width), 2, pruned)
                promised = engine.compute_retained_tokens_count(height * width, frames, pruned)
                # the share itself sets vidcom2's frames; vLLM rounds its product with the tokens down
                keep = 1 - pruned if name == "vidcom2" else promised
                kept = parse(name, keep=keep)[0](tokens)[0].kept.tolist()
                cases.append((f"{name} {frames}x{height}x{width} {pruned}", mask.nonzero().flatten().tolist(), kept))
    return cases


def test_the_kept_tokens_are_vllms():
    cases = run_apart(engine_and_ours)
    assert len(cases) == 2 * len(SIZES) * len(PRUNED)
    assert [name for name, theirs, ours in cases if theirs != ours] == []
