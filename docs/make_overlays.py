"""Make ``overlays.png``, for README and site: the tokens that methods keep of two benchmark images, and the answers."""

from pathlib import Path

import torch

import tokensieve
from tokensieve.evaluate import load_data
from tokensieve.evaluate.prompt import decode, encode
from tokensieve.reference import load
from tokensieve.report.overlay import overlay, sheet

METHODS = ("vtc-cls", "trsm", "divprune", "pool", "random")
QUESTIONS, KEEP, SIDE = ("test-0-00003-colour", "test-0-00013-where"), 0.25, 264


def main() -> None:
    model, processor = load()
    samples = {sample.id: sample for sample in load_data("reference")}
    pictures = []
    for sample in (samples[name] for name in QUESTIONS):
        inputs = encode(processor, [sample])
        for method in ("full", *(f"{method}(keep={KEEP})" for method in METHODS)):
            with tokensieve.attach(model, method, processor=processor) as sieve, torch.inference_mode():
                generated = model.generate(**inputs)
            answer = decode(processor, generated, inputs["input_ids"].shape[1])[0]
            name = sample.question if method == "full" else method.partition("(")[0]
            pictures.append((f"{name}\n{answer}", overlay(sample.open(), sieve.last[0][0], SIDE)))
    sheet(pictures, columns=1 + len(METHODS)).save(Path(__file__).with_name("overlays.png"), optimize=True)


if __name__ == "__main__":
    main()
