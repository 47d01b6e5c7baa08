"""The authors' checkpoint of GlimpsePrune: random tensors with its parts, parameter names and shapes."""

import pytest
import torch

import tokensieve
from tests.support import models, prompts
from tokensieve import Refusal

FAMILY, LAYERS, WIDTH, HEADS, ENCODER = "llava-clip-deep", 6, 64, 4, 32  # theirs: 28, 3584, 28, 1280
FUSE, BESIDE, LEVELS = 8, 24, 4  # theirs: 256, 512, 4


def linear(name, out, width, bias=True):
    return {f"{name}.weight": (out, width)} | ({f"{name}.bias": (out,)} if bias else {})


def fuser():
    shapes = linear("attn_in_proj", FUSE, HEADS) | linear(f"attn_out_projs.{LEVELS - 1}", 1, FUSE)
    for level in range(LEVELS):
        shapes |= linear(f"cond_in_projs.{level}", BESIDE, ENCODER)
        block = f"layers.{level}"
        shapes |= {f"{block}.norm1.weight": (FUSE,), f"{block}.norm2.weight": (FUSE,)}
        for part, size in {"q": FUSE + BESIDE, "k": FUSE + BESIDE, "v": FUSE, "o": FUSE}.items():
            shapes |= linear(f"{block}.attn.{part}_proj", size, size, bias=False)
        for part, sizes in {"gate": (2 * FUSE, FUSE), "up": (2 * FUSE, FUSE), "down": (FUSE, 2 * FUSE)}.items():
            shapes |= linear(f"{block}.mlp.{part}_proj", *sizes)
    return shapes


def stored(folder, heads=HEADS, layers=LAYERS):
    draw = torch.Generator().manual_seed(3)

    def tensors(shapes):
        return {name: 0.1 * torch.randn(shape, generator=draw).bfloat16() for name, shape in shapes.items()}

    shapes = fuser() | linear("attn_in_proj", FUSE, heads)
    parts = {
        "attn_fuser": tensors(shapes),
        "learnable_embeddings": tensors({"": (layers, 1, WIDTH)})[""],
        "le_proj": tensors(linear("le_proj", WIDTH, WIDTH)),
        "le_norm": tensors({"weight": (WIDTH,)}),
    }
    parts["le_proj"] = {name.partition(".")[2]: rows for name, rows in parts["le_proj"].items()}
    torch.save(parts, folder / "new_modules_gp.pt")
    return parts


def test_the_authors_file_is_read_and_used(tmp_path):
    parts, model = stored(tmp_path), models.tiny_model(FAMILY)
    spec = f"glimpse-prune(weights={str(tmp_path)!r}, layer=2, threshold=0.0, keep=5)"
    with torch.no_grad(), tokensieve.attach(model, spec) as sieve:
        weights = sieve.nets["decoder"].state_dict()
        expected = {f"{part}.{n}": t for part in ("attn_fuser", "le_proj", "le_norm") for n, t in parts[part].items()}
        expected["learnable_embeddings"] = parts["learnable_embeddings"]
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], rows.float()) for name, rows in expected.items())
        model(**prompts.collate(FAMILY, prompts.batch(FAMILY, "two-images")))
        assert [image.slots for image in sieve.last[0]] == [5, 5]


def test_another_file_is_refused(tmp_path):
    model = models.tiny_model(FAMILY)
    spec = f"glimpse-prune(weights={str(tmp_path)!r}, layer=2)"
    with pytest.raises(Refusal, match=r"no checkpoint at .*new_modules_gp\.pt: no such file"):
        tokensieve.attach(model, spec)
    stored(tmp_path, heads=HEADS + 1)
    with pytest.raises(Refusal, match="does not fit glimpse-prune and llava of width 64"):
        tokensieve.attach(model, spec)
    stored(tmp_path, layers=LAYERS - 1)
    with pytest.raises(Refusal, match="does not fit glimpse-prune"):
        tokensieve.attach(model, spec)
    torch.save({"attn_fuser": {"weight": torch.ones(2)}}, tmp_path / "new_modules_gp.pt")
    with pytest.raises(Refusal, match="does not fit glimpse-prune"):
        tokensieve.attach(model, spec)
    torch.save({"attn_fuser": object()}, tmp_path / "new_modules_gp.pt")
    with pytest.raises(Refusal, match="other objects are not loaded, because that would run code from the file"):
        tokensieve.attach(model, spec)
    stored(tmp_path)
    with pytest.raises(Refusal, match="does not fit glimpse-prune"):
        tokensieve.attach(model, spec, levels=(0, 1))
