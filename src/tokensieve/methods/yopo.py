"""YOPO: visual rows do less work inside the layers of the LLM; all of them stay."""

from dataclasses import dataclass

from tokensieve.methods import register
from tokensieve.methods.compute import ComputeMethod


@register("yopo", paper="arXiv:2410.06169", stage="decoder")
@dataclass(frozen=True)
class Yopo(ComputeMethod):
    """Keep every token, and prune the work on visual rows in a prefill: their attention, its heads, MLPs and layers.

    Visual rows of one grid attend to the neighbours in a window, to later ones, too; each frame of a video and each
    tile is a grid by itself, and pairs of different grids stay causal. Attention weights on visual tokens are set to
    zero after the softmax, in single heads and in all heads of the deep layers; the other weights keep their size.
    Zero values of these tokens do the same under any kernel, and in decode steps. Visual rows pass the first neurons of
    each MLP alone. The paper tunes projector and LLM with the pruning on; an LLM that is not tuned loses more.

    Args:
        window: width of the window, an odd number (the released script: 5); ``None``: off, for other kernels than
            sdpa and eager.
        heads: a NumPy file (``.npy``) `[layers, heads]`, bool, False where visual tokens are cut, such as the authors'
            ``headmask_7b_16.npy``, which leaves 16 of 32 heads of a layer on average; ``None``: no head is cut. With
            grouped queries, all heads of a group must agree.
        cut: the first layer without visual tokens in its attention; a float is a share of the depth (the authors: 20
            of 32, and 20 of 40, which is 0.5); ``None``: off.
        mlp: share of the neurons of each MLP for visual rows; 1.0: off.

    Cost: visual rows pass sliced weights of the MLPs, and counted FLOPs show that. Window, heads and ``cut`` are masks,
    as in the authors' code: they save neither time nor memory here, and counted FLOPs hold their full work. Every
    layer and its cache hold all tokens. The window needs an explicit mask, O(L²) memory.
    Paper: "Treat Visual Tokens as Text? But Your MLLM Only Needs Fewer Efforts to See", 2024.
    Official code: for one image of 24 × 24 tokens at a fixed place; decode steps of a batch cut its first row alone;
    that for Qwen2-VL cuts layers before the softmax, so that other weights grow.
    A head stays if its attention on visual tokens, divided by that on all other tokens, is above a threshold in more
    than 40 of 100 images, and in the first two layers; that rule is not part of this method, its file of heads is read.
    """

    window: int | None = 5
    cut: int | float | None = 0.625
    mlp: float = 0.5
