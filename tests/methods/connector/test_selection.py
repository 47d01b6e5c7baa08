"""Selection, checked on live models: every score recomputed from the model's own eager attentions and embeddings.

Nothing is probed here: an eager twin gives whole attention matrices, and rows are averaged, unpermuted and pooled by
hand. Decisions of the attached model must be the same indices.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import cosine_similarity
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import tokensieve
from tests.support import families, models, oracle, prompts
from tokensieve.models import qwen_vl

each_family = pytest.mark.parametrize("family", families.CORE)
each_kernel = pytest.mark.parametrize("attention", ["sdpa", "eager"])


def decide(family, attention, kind, spec):
    """Decisions `[sample][image]` of the attached model."""
    model = models.tiny_model(family, attention)
    with tokensieve.attach(model, spec) as sieve:
        model.generate(**prompts.collate(family, prompts.batch(family, kind)), max_new_tokens=1)
    return sieve.last


@torch.no_grad()
def attention_rows(family, image):
    """What the encoder's [CLS] row says of each visual token, `[layers, tokens]`; received attention without [CLS]."""
    model = models.unhooked(family, "eager")
    if family in families.CORE_LLAVA:
        tower = model.model.vision_tower
        matrices = torch.cat(tower(image.pixels, output_attentions=True).attentions).mean(1)
        return matrices[:, 0, 1:] if family == "llava-clip" else matrices.mean(1)
    (h, w), seen, handles = image.grid, {}, []
    tower = model.model.visual
    for i, block in enumerate(tower.blocks):
        # the module's own eager weights: one image is one chunk in the layers of global attention
        handles.append(block.attn.register_forward_pre_hook(remember(seen, i, block.attn), with_kwargs=True))
    tower(image.pixels, grid_thw=torch.tensor([[1, 2 * h, 2 * w]]))
    [handle.remove() for handle in handles]
    layers = tower.config.fullatt_block_indexes if family == "qwen2.5-vl" else range(len(tower.blocks))
    units = torch.stack([seen[i] for i in layers]).view(len(layers), h * w, 4).mean(-1)
    return units[:, window_order(h, w).argsort()] if family == "qwen2.5-vl" else units


@torch.no_grad()
def pooling_rows(image):
    """What SigLIP's pooling head attends to, in place of every layer's [CLS] row, `[layers, tokens]`."""
    tower = models.unhooked("llava-siglip").model.vision_tower
    rows = tower(image.pixels).last_hidden_state
    return tower.head.attention(tower.head.probe, rows, rows)[1][0].expand(4, -1)


def remember(seen, layer, module):
    """Attention received by each patch, from the module's projections and rotary embedding, all patches at once."""

    def hook(_, args, kwargs):
        states = args[0] if args else kwargs["hidden_states"]
        query, key, _ = module.qkv(states).view(len(states), 3, module.num_heads, -1).unbind(1)
        cos, sin = (x.float()[:, None] for x in kwargs["position_embeddings"])

        def rotate(x):
            first, second = x.float().chunk(2, -1)
            return x.float() * cos + torch.cat([-second, first], -1) * sin

        scores = torch.einsum("qhd,khd->hqk", rotate(query), rotate(key)) * query.shape[-1] ** -0.5
        seen[layer] = scores.softmax(-1).mean((0, 1))

    return hook


def window_order(height, width, side=2):
    """Merged tokens in the order in which Qwen2.5's tower runs them: windows of ``side`` x ``side`` tokens."""
    order = []
    for top in range(0, height, side):
        for left in range(0, width, side):
            rows, columns = range(top, min(top + side, height)), range(left, min(left + side, width))
            order += [y * width + x for y in rows for x in columns]
    return torch.tensor(order)


def largest(scores, k):
    return scores.topk(min(k, len(scores))).indices.sort().values.tolist()


@pytest.mark.parametrize(
    ("spec", "score"),
    [
        ("vtc-cls(keep=5)", lambda rows: rows[:-1].sum(0)),
        ("vtc-cls(keep=5, first_layer=-2)", lambda rows: rows[-2]),
        ("vtc-cls(keep=5, first_layer=1, over_layers='max')", lambda rows: rows[1:-1].amax(0)),
        ("fastervlm(keep=5)", lambda rows: rows[-2]),
    ],
)
@pytest.mark.parametrize("kind", ["ragged", "mixed"])
@each_kernel
@each_family
def test_attention_methods(family, attention, kind, spec, score, deviation):
    decisions = decide(family, attention, kind, spec)
    for s, row in zip(prompts.batch(family, kind), decisions, strict=True):
        for image, decision in zip(s.images, row, strict=True):
            alone = spec in ("fastervlm(keep=5)", "vtc-cls(keep=5, first_layer=-2)")  # a single layer, near the end
            pooled = family == "llava-siglip" and alone
            expected = score(pooling_rows(image) if pooled else attention_rows(family, image))
            assert deviation("of attention scores", decision.scores, expected) <= 1e-5
            assert decision.kept.tolist() == largest(expected, 5)
            assert any("no [CLS] token" in note for note in decision.notes) == (family != "llava-clip")


@pytest.mark.parametrize("query", ["tokens", "prompt"])
@pytest.mark.parametrize("kind", ["ragged", "mixed"])
@each_family
def test_trsm(family, kind, query):
    decisions = decide(family, "sdpa", kind, f"trsm(keep=5, query={query!r})")
    model = models.unhooked(family)
    for s, row in zip(prompts.batch(family, kind), decisions, strict=True):
        if not s.images:
            assert row == []
            continue
        words = [i for i in s.ids[s.ids.index(families.IMAGE) :] if i in families.WORDS]
        text = model.get_input_embeddings()(torch.tensor(words))
        text = text if query == "tokens" else text.mean(0, keepdim=True)
        for image, decision in zip(s.images, row, strict=True):
            rows = oracle.encode_image(model, family, image).rows
            scores = cosine_similarity(rows[:, None], text[None], dim=-1).amax(-1)
            assert decision.kept.tolist() == largest(scores, 5)


@each_family
def test_divprune(family):
    decisions = decide(family, "sdpa", "mixed", "divprune(keep=5)")
    for s, row in zip(prompts.batch(family, "mixed"), decisions, strict=True):
        for image, decision in zip(s.images, row, strict=True):
            rows = oracle.encode_image(models.unhooked(family), family, image).rows
            unit = torch.nn.functional.normalize(rows.double())
            distance = 1 - unit @ unit.T
            chosen = [int((distance + 9 * torch.eye(len(unit))).amin(0).argmax())]
            while len(chosen) < 5:
                nearest = distance[chosen].amin(0)
                nearest[chosen] = -1
                chosen.append(int(nearest.argmax()))
            assert decision.kept.tolist() == sorted(chosen)


@each_family
def test_pooling_and_downsampling_stand_at_the_centres_of_their_cells(family):
    for name in ("pool", "downsample"):
        decisions = decide(family, "sdpa", "mixed", f"{name}(keep=7)")
        for s, row in zip(prompts.batch(family, "mixed"), decisions, strict=True):
            for image, decision in zip(s.images, row, strict=True):
                cells = oracle.largest_grid(image.grid, 7)
                expected = oracle.area_matrix(image.grid, cells)
                torch.testing.assert_close(decision.matrix(), expected, atol=1e-6, rtol=0)
                down, across = (
                    [(2 * i + 1) * n // (2 * c) for i in range(c)] for n, c in zip(image.grid, cells, strict=True)
                )
                assert decision.kept.tolist() == [y * image.grid[1] + x for y in down for x in across]


# -- Qwen's packing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(4, 4), (2, 8), (6, 4)])
@pytest.mark.parametrize("patch", [14, 16])
def test_packing_is_that_of_transformers_own_processor(grid, patch):
    config = SimpleNamespace(spatial_merge_size=2, patch_size=patch, temporal_patch_size=2, in_channels=3)
    picture = np.random.default_rng(0).random((3, grid[0] * patch, grid[1] * patch), dtype=np.float32)
    theirs, height, width = Qwen2VLImageProcessorPil().patchify(picture, patch, 2, 2)
    theirs, pixels = torch.from_numpy(np.array(theirs)), torch.from_numpy(picture)
    assert (height, width) == grid
    unpacked = qwen_vl._unpack(theirs, (1, *grid), config)
    assert torch.equal(unpacked, pixels.expand(2, -1, -1, -1))
    assert torch.equal(qwen_vl._pack(unpacked, config), theirs)
    # and so are the hand reference's
    assert torch.equal(oracle.pack(pixels, patch), theirs)
    assert torch.equal(oracle.unpack(theirs, grid, patch), pixels)


def test_an_image_kept_whole_beside_a_resized_one_keeps_its_bits():
    """One tower call resizes all images of a batch; those that keep their size must come out as they went in."""
    family = "qwen2.5-vl"
    tower, image = models.unhooked(family).model.visual, prompts.batch(family, "ragged")[0].images[0]
    grids = torch.tensor([[1, *(2 * n for n in image.grid)]])
    inputs = {"hidden_states": image.pixels, "grid_thw": grids}
    out = qwen_vl.QwenVL().resize(tower, inputs, [image.grid])
    assert torch.equal(out["hidden_states"], image.pixels)
