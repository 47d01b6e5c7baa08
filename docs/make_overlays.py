"""Make ``overlays.png``, the README's picture: what five methods keep of one benchmark image, and the answers."""

from pathlib import Path

import torch

import tokensieve
from tokensieve.evaluate import Sample, decode, encode
from tokensieve.reference import load
from tokensieve.reference.benchmark import benchmark
from tokensieve.report.overlay import overlay, sheet

METHODS = ("vtc-cls", "trsm", "divprune", "pool", "random")
ROWS, KEEP, SIDE = (4, 11), 0.25, 300


def main() -> None:
    model, processor = load()
    pictures = []
    for row in (benchmark()[index] for index in ROWS):
        inputs = encode(processor, [Sample(row.id, lambda row=row: row.image, row.question, (row.answer,))])
        for method in ("full", *METHODS):
            with tokensieve.attach(
                model, method, processor=processor, **({} if method == "full" else {"keep": KEEP})
            ) as sieve, torch.inference_mode():
                generated = model.generate(**inputs)
            answer = decode(processor, generated, inputs["input_ids"].shape[1])[0]
            caption = f"“{row.question}” {answer}" if method == "full" else f"{method}: {answer}"
            pictures.append((caption, overlay(row.image, sieve.last[0][0], SIDE)))
    sheet(pictures, columns=1 + len(METHODS)).save(Path(__file__).with_name("overlays.png"), optimize=True)


if __name__ == "__main__":
    main()
