"""The evidence about a visual token is that of the patches behind it.

Which patches these are is found by experiment: in a tower without attention every row depends on its own patch alone,
so one patch is changed at a time, to see which rows of the tower and which visual tokens change.
"""

from functools import cache, partial

import pytest
import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import tokensieve
from tests.families.test_matrix import METHODS, each_kernel, supported
from tests.support import families, models, oracle, prompts

LAYER = -2  # the layer before the last, which FasterVLM reads; in Qwen2.5-VL one of those without windows
seen: dict[torch.nn.Module, torch.Tensor] = {}


def by_hand(module, query, key, value, attention_mask, scaling=None, **kwargs):
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    weights = (scores if attention_mask is None else scores + attention_mask).softmax(-1)
    seen[module] = weights
    return (weights @ value).transpose(1, 2).contiguous(), weights


def attentions(model):
    """The attention modules of the vision tower, first to last."""
    tower = model.get_encoder(modality="image")
    found = [m for m in tower.modules() if type(m).__name__.endswith("Attention")]
    return timm(tower) or [m for m in found if type(m).__module__.startswith("transformers")]


def timm(tower):
    """Those of a timm tower, or its stand-in: where not fused, their matrix passes a dropout."""
    return [m for m in tower.modules() if hasattr(m, "fused_attn")]


def take_notice(module, drop, args):
    seen[module] = args[0]


@cache
def behind(name):
    """`[row of the tower -> set of visual tokens]` of the image of "single", of a twin whose tower does not attend."""
    model, (sample,) = models.build(name), prompts.batch(name, "single")
    if name == "fastvit_mci3":  # convolutions see their neighbours; its tokens are the cells of a map
        return {cell: {cell} for cell in range(sample.images[0].tokens)}
    rows: list[torch.Tensor] = []
    attentions(model)[LAYER].register_forward_pre_hook(
        lambda m, args, kwargs: rows.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    for module in attentions(model):
        module.register_forward_hook(lambda m, args, out: (0 * out[0], *out[1:]) if isinstance(out, tuple) else 0 * out)
    encode = lambda: torch.cat([e.rows for e in oracle.encode(model, name, sample)])  # noqa: E731
    features = encode()
    pixels, found = sample.images[0].pixels, {}
    for patch in patches(pixels):
        original = patch.clone()
        patch.add_(1.0)
        changed = different(encode(), features)
        patch.copy_(original)
        (row,) = different(in_line(rows[-1]), in_line(rows[0]))
        found[row] = set(changed)
    return found


def patches(pixels):
    """Each patch as a view that can be written to."""
    if pixels.ndim == 2:  # Qwen's packing
        yield from pixels
        return
    tiles = pixels.view(-1, *pixels.shape[-3:])
    for tile in tiles:
        for y in range(0, tile.shape[1], 14):
            for x in range(0, tile.shape[2], 14):
                yield tile[:, y : y + 14, x : x + 14]


def in_line(rows):
    """Rows of a tower, or the cells of its map, `[n, C]`."""
    return (rows.movedim(1, -1) if rows.ndim == 4 else rows).flatten(0, -2)


def different(a, b):
    return ((a - b).abs().amax(-1) > 1e-5).nonzero().flatten().tolist()


@torch.no_grad()
def head_row(head, rows):
    """Return a pooling head's attention, as torch's own module reports it, mean over heads: `[tiles, rows]`."""
    return head.attention(head.probe.expand(len(rows), -1, -1), rows, rows)[1][:, 0]


@pytest.fixture
def attention_by_hand():
    ALL_ATTENTION_FUNCTIONS.register("by_hand", by_hand)
    ALL_MASK_ATTENTION_FUNCTIONS.register("by_hand", eager_mask)
    seen.clear()
    yield
    seen.clear()


@each_kernel
@pytest.mark.parametrize("name", [name for name in families.FAMILIES if "attention" in supported(name)])
def test_scores_are_those_of_the_patches_behind_each_token(name, attention, attention_by_hand, deviation):
    model, (sample,) = models.tiny_model(name, attention), prompts.batch(name, "single")
    with tokensieve.attach(model, METHODS["attention"]) as sieve:
        model.generate(**prompts.collate(name, [sample]), max_new_tokens=1)
        ((decision,),) = sieve.last

    twin = models.build(name, "eager")
    tower, pooled = twin.get_encoder(modality="image"), []
    for module in timm(tower):
        module.fused_attn = False
        module.attn_drop.register_forward_pre_hook(partial(take_notice, module))
    for module in attentions(twin) if not timm(tower) else ():
        module.config._attn_implementation_internal = "by_hand"
    if getattr(tower, "use_head", False):  # SigLIP's pooling head stands in for a late [CLS] row
        tower.head.register_forward_pre_hook(lambda head, args: pooled.append(head_row(head, args[0])))
    oracle.encode(twin, name, sample)
    weights = seen[attentions(twin)[LAYER]]  # [tiles, heads, rows, rows]
    cls = any(key.endswith(("class_embedding", "cls_token")) for key, _ in twin.named_parameters())
    rows = weights[:, :, 0].mean(1) if cls else pooled[0] if pooled else weights.mean((1, 2))
    assert any("pooling head" in note for note in decision.notes) == bool(pooled)

    units: dict[int, list[float]] = {}
    for row, tokens in behind(name).items():
        for token in tokens:
            units.setdefault(token, []).append(float(rows.flatten()[row]))
    image = sample.images[0]
    assert set(units) == set(range(image.tokens)) - set(image.newlines)
    expected = torch.zeros(image.tokens)
    for token, values in units.items():
        expected[token] = sum(values) / len(values)
    assert deviation("of attention scores", decision.scores, expected) <= 1e-5
    best = expected.topk(5).indices.tolist()
    assert set(decision.kept.tolist()) - set(image.newlines) == set(best)
