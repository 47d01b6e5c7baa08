"""Make ``pixelprune.safetensors`` and its manifest with the authors' own decision.

``python -m tests.golden.make_pixelprune CHECKOUT``: the folder of OPPO-Mente-Lab/PixelPrune at the commit below. Its
functions run as they are. Documents, a table, a screen and a gradient are drawn and stored as PNG files.
"""

import io
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.golden.pictures import pixel_values, speckled, stored

FOLDER = Path(__file__).parent
COMMIT = "a870e31b26e674f4f61d3c74a2b059f688b765da"
GRIDS = {  # (height, width) in visual tokens of 32 x 32 pixels
    "document": (24, 24),
    "table": (31, 20),
    "screen": (18, 33),
    "gradient": (12, 24),
    "noise": (10, 14),
}
LEVEL = 1 / 255
# speckles of so many levels, and the tolerance: two speckles differ by up to twice the levels, so that some are ties
WAYS = ((0, 0.0), (0, 2 * LEVEL), (0, 0.1), (1, 2 * LEVEL), (1, 5 * LEVEL), (4, 5 * LEVEL), (4, 0.1))


def main(checkout: str) -> None:
    sys.path[:0] = [checkout, str(FOLDER.parents[1] / "benchmarks")]
    from pixelprune.core import compute_merged_keep_indices
    from pixelprune.patches.qwen3_vl_hf import normalize_pixel_values_for_selector

    import pages

    tensors, cases = {}, []
    for number, (kind, (height, width)) in enumerate(GRIDS.items()):
        file = io.BytesIO()
        pages.draw(kind, number, (32 * width, 32 * height)).save(file, "PNG", optimize=True)
        tensors[f"{kind}/in/png"] = torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)
        for levels, tolerance in WAYS:
            pixels = pixel_values(speckled(stored(tensors[f"{kind}/in/png"]), number, levels))
            (kept,) = compute_merged_keep_indices(
                normalize_pixel_values_for_selector(pixels),
                torch.tensor([[1, 2 * height, 2 * width]]),
                method="pred_2d",
                metric="max",
                threshold=tolerance,
            )
            case = f"{kind}_speckles_{levels}_tolerance_{tolerance:.3f}"
            tensors[f"{case}/out/kept"] = kept.to(torch.int16)
            given = {"grid": [height, width], "seed": number, "levels": levels, "tolerance": tolerance}
            outputs = {"kept": f"{case}/out/kept"}
            cases.append(
                {"case": case, "hyperparameters": given, "inputs": {"png": f"{kind}/in/png"}, "outputs": outputs}
            )
    save_file(tensors, FOLDER / "pixelprune.safetensors")
    entry = {
        "method": "pixelprune",
        "file": "pixelprune.safetensors",
        "paper": "arXiv:2604.00886",
        "title": "PixelPrune: Pixel-Level Adaptive Visual Token Reduction via Predictive Coding",
        "repo": "OPPO-Mente-Lab/PixelPrune",
        "commit": COMMIT,
        "source": [
            "pixelprune/core.py: compute_merged_keep_indices",
            "pixelprune/methods/pred_2d.py: Pred2DSelector",
            "pixelprune/patches/qwen3_vl_hf.py: normalize_pixel_values_for_selector",
        ],
        "deviations": ["none"],
        "tensors": {"png": "[bytes] uint8, a PNG file", "kept": "[K] the visual tokens that stay"},
        "cases": cases,
    }
    manifest = {
        "set": "pixels",
        "precision": "float32, CPU, torch 2.13.0, one thread",
        "key_format": "<kind>/in/<tensor> and <case>/out/<tensor>",
        "inputs": "a stored PNG file, speckled by tests/golden/pictures.py",
        "methods": [entry],
    }
    (FOLDER / "manifest-pixels.json").write_text(json.dumps(manifest, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
