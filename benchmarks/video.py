"""What the video methods cost: processor time and extra memory for one clip of 10,000 and of 100,000 visual tokens.

One thread, float32 rows of 896 numbers, 196 tokens a frame, half of the places still over eight frames; keep=0.25. Each
cell is a process of its own: the best of three runs, and by how much the peak of resident memory rose.

    python benchmarks/video.py
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time

import torch

from tokensieve import parse
from tokensieve.tokens import ByLayer, ConnectorTokens

METHODS = ("evs", "dycoke", "fastvid", "prunevid", "holitom", "vidcom2", "v-cast", "flashvid")
SIZE, WIDTH, SCENE = 196, 896, 8


def clip(frames: int) -> ConnectorTokens:
    """A random clip, made frame by frame so that making it needs no more memory than holding it."""
    g = torch.Generator().manual_seed(0)
    rows = torch.empty(frames, SIZE, WIDTH)
    for frame in range(frames):
        fresh = torch.randn(SIZE, WIDTH, generator=g)
        still = torch.rand(SIZE, 1, generator=g) < (0.5 if frame % SCENE else 0.0)
        rows[frame] = torch.where(still, rows[frame - 1], fresh)
    attention = ByLayer({1: torch.rand(1, frames * SIZE, generator=g)})
    return ConnectorTokens(
        rows.view(1, -1, WIDTH), frames=frames, cls_attention=attention, attention_received=attention
    )


def measure(name: str, frames: int) -> None:
    torch.set_num_threads(1)
    tokens, method = clip(frames), parse(name)[0]
    before, times = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
    for _ in range(3):
        start = time.process_time()
        reduction = method(tokens)
        chosen = time.process_time()
        reduction.apply(tokens.features)
        times.append((chosen - start, time.process_time() - chosen))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    choosing, applying = (min(column) for column in zip(*times, strict=True))
    held = tokens.features.numel() * 4 / 2**20
    print(
        f"| `{name}` | {tokens.total:,} | {reduction.slots:,} | {choosing:.2f} s | {applying:.2f} s "
        f"| {peak / 1024:.0f} MiB | {held:.0f} MiB |"
    )


def main() -> None:
    if len(sys.argv) == 3:
        measure(sys.argv[1], int(sys.argv[2]))
        return
    print("| method | tokens | kept | choosing | applying | extra memory | the rows themselves |")
    print("|---|---|---|---|---|---|---|")
    for name in METHODS:
        for frames in (51, 511):
            done = subprocess.run(
                [sys.executable, __file__, name, str(frames)], capture_output=True, text=True, check=True
            )
            print(done.stdout.strip(), flush=True)


if __name__ == "__main__":
    main()
