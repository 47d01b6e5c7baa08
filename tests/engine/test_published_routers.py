"""The authors' checkpoint of p-MoD: a random state dict with its parameter names and shapes."""

import pytest
import torch
from safetensors.torch import save_file

import tokensieve
from tests.support import families, models, prompts
from tokensieve import Refusal

FAMILY, WIDTH = "llava-clip-deep", 64  # theirs: 32 layers of width 4,096, and routers from layer 8 on


def stored(folder, kind="safetensors", width=WIDTH, layers=range(2, families.DEPTH)):
    """Write routers among parameters of the LLM and the projector, as they are published, in half precision."""
    draw = torch.Generator().manual_seed(3)
    shapes = {"model.embed_tokens.weight": (3, width), "model.mm_projector.0.weight": (2, 2)}
    for layer in layers:
        shapes[f"model.layers.{layer}.decoder_layer.mlp.up_proj.weight"] = (2, width)
        shapes[f"model.layers.{layer}.router.router.weight"] = (1, width)
        shapes[f"model.layers.{layer}.router.router.bias"] = (1,)
    drawn = {name: torch.randn(shape, generator=draw).half() for name, shape in shapes.items()}
    if kind == "safetensors":
        save_file(drawn, folder / "model-00001-of-00001.safetensors")
    else:
        torch.save(drawn, folder / "pytorch_model-00001-of-00001.bin")
    return drawn


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@torch.no_grad()
def test_published_routers_are_read_and_used(kind, tmp_path):
    drawn, model = stored(tmp_path, kind), models.tiny_model(FAMILY)
    inputs = prompts.collate(FAMILY, prompts.batch(FAMILY, "single"))
    with tokensieve.attach(model, "p-mod", weights=str(tmp_path)) as sieve:
        net = sieve.nets["decoder"].state_dict()
        assert len(net) == 8
        for name, rows in net.items():
            layer, part = name.split(".")
            assert torch.equal(rows, drawn[f"model.layers.{layer}.router.router.{part}"].float())
        read = model(**inputs).logits
    with tokensieve.attach(model, "p-mod(weights='random')"):
        assert not torch.equal(read, model(**inputs).logits)


@torch.no_grad()
def test_another_checkpoint_is_refused(tmp_path):
    model = models.tiny_model(FAMILY)
    with pytest.raises(Refusal, match=r"has no weights of p-mod: .* names such as \.router\.router\.\*"):
        tokensieve.attach(model, "p-mod", weights=str(tmp_path))
    for wrong in ({"width": 32}, {"layers": range(8, 32)}, {"layers": range(2, 4)}):
        stored(tmp_path, **wrong)
        with pytest.raises(Refusal, match="does not fit p-mod and llava of width 64 with 6 LLM layers"):
            tokensieve.attach(model, "p-mod", weights=str(tmp_path))
    stored(tmp_path)
    inputs = prompts.collate(FAMILY, prompts.batch(FAMILY, "single"))
    words = "have routers for layers 2, 3, 4, 5; tokens skip layer 1"
    with tokensieve.attach(model, "p-mod(shift=0.3)", weights=str(tmp_path)), pytest.raises(Refusal, match=words):
        model(**inputs)
