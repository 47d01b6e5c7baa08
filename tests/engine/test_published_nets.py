"""Authors' checkpoints of nets that make rows: random state dicts with their parameter names and shapes."""

import pytest
import torch
from safetensors.torch import save_file

import tokensieve
from tests.support import models, prompts
from tokensieve import Refusal

WIDTH, HIDDEN, QUERIES = 32, 64, 256  # of the encoder and the LLM of tiny LLaVA: theirs are 1,024 and 4,096


def linear(name, out, width):
    return {f"{name}.weight": (out, width), f"{name}.bias": (out,)}


def attention(name):
    projected = {f"{name}.in_proj_weight": (3 * WIDTH, WIDTH), f"{name}.in_proj_bias": (3 * WIDTH,)}
    return projected | linear(f"{name}.out_proj", WIDTH, WIDTH)


def norms(*names):
    return {f"{name}.{part}": (WIDTH,) for name in names for part in ("weight", "bias")}


MQT = {"query": (QUERIES, WIDTH), "pos_embed": (QUERIES, WIDTH), "proj": (WIDTH, HIDDEN)}
MQT |= attention("attn") | norms("ln_q", "ln_k", "ln_v")
PACKER = {"q_proj_1.weight": (WIDTH, WIDTH)} | attention("clip_attn") | norms("ln_q_1", "ln_k_1", "ln_v_1")
PACKER |= linear("k_proj_1.0", WIDTH, 4 * WIDTH) | linear("k_proj_1.2", WIDTH, WIDTH)
PACKER |= linear("v_proj_1.0", WIDTH, 4 * WIDTH) | linear("v_proj_1.2", WIDTH, WIDTH)
PACKER |= linear("mlp.0", HIDDEN, WIDTH) | linear("mlp.2", HIDDEN, HIDDEN)
SHAPES = {"mqt": MQT, "tokenpacker": PACKER}
NAMES = {"mqt": "query_abstractor", "tokenpacker": "mm_projector"}  # of the module in the authors' model


def drawn(method):
    draw = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=draw).half() for name, shape in SHAPES[method].items()}


def stored(folder, method, kind):
    """Write a checkpoint as it is published: the LLM in one file, the net in another, or the net alone."""
    net = {f"model.{NAMES[method]}.{name}": rows for name, rows in drawn(method).items()}
    llm = {"model.norm.weight": torch.ones(2), "lm_head.weight": torch.ones(2, 2)}
    if kind == "safetensors":
        save_file(llm, folder / "model-00001-of-00002.safetensors")
        save_file(net, folder / "model-00002-of-00002.safetensors")
    elif kind == "bin":
        torch.save(llm, folder / "pytorch_model-00001-of-00002.bin")
        torch.save(net, folder / "pytorch_model-00002-of-00002.bin")
        torch.save({"an": object()}, folder / "training_args.bin")  # is not opened
    else:
        torch.save(net, folder / f"{NAMES[method]}.bin")
    return folder


def spec(method, folder):
    return f"{method}(weights={str(folder)!r}" + (", keep=4)" if method == "mqt" else ")")


@pytest.mark.parametrize("kind", ["safetensors", "bin", "projector"])
@pytest.mark.parametrize("method", SHAPES)
def test_a_published_net_is_read_and_used(method, kind, tmp_path):
    model = models.tiny_model("llava-clip")
    with torch.no_grad(), tokensieve.attach(model, spec(method, stored(tmp_path, method, kind))) as sieve:
        weights = sieve.nets["connector"].state_dict()
        assert weights.keys() == SHAPES[method].keys()
        assert all(torch.equal(weights[name], rows.float()) for name, rows in drawn(method).items())
        model(**prompts.collate("llava-clip", prompts.batch("llava-clip", "two-images")))
        assert {decision.slots for decision in sieve.last[0]} == {4 if method == "mqt" else 9}


def test_another_checkpoint_is_refused(tmp_path):
    model = models.tiny_model("llava-clip")
    with pytest.raises(Refusal, match=r"has no weights of mqt: .* names such as query_abstractor\.\*"):
        tokensieve.attach(model, spec("mqt", tmp_path))
    wide = tmp_path / "wide"
    wide.mkdir()
    torch.save({"model.query_abstractor.proj": torch.zeros(WIDTH, 2 * HIDDEN)}, wide / "query_abstractor.bin")
    with pytest.raises(Refusal, match="does not fit mqt and llava of width 64"):
        tokensieve.attach(model, spec("mqt", wide))
    torch.save({"an": object()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(Refusal, match="other objects are not loaded, because that would run code from the file"):
        tokensieve.attach(model, spec("mqt", tmp_path))


def test_llava_mini_with_the_blocks_of_its_prefusion(tmp_path):
    """Theirs are the names of a Llama; older files also hold the frequencies of each rotary embedding."""
    model, draw = models.tiny_model("llava-clip"), torch.Generator().manual_seed(3)
    shapes = {f"compressor.{name}": shape for name, shape in attention("attn").items()} | norms(
        "compressor.ln_q", "compressor.ln_kv"
    )
    shapes |= {"compressor.query": (4, WIDTH), "compressor.pos_embed": (4, WIDTH)}
    layer = model.get_decoder().layers[0].state_dict()
    shapes |= {f"prefusion_layers.{n}.{name}": tuple(rows.shape) for n in range(3) for name, rows in layer.items()}
    net = {name: torch.randn(shape, generator=draw).half() for name, shape in shapes.items()}
    stored = {f"model.{name}": rows for name, rows in net.items()} | {"model.mm_projector.0.bias": torch.ones(2)}
    stored |= {f"model.prefusion_layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(2) for n in range(3)}
    save_file(stored, tmp_path / "model.safetensors")
    with tokensieve.attach(model, "llava-mini", keep=4, weights=str(tmp_path)) as sieve:
        weights = sieve.nets["connector"].state_dict()
        assert weights.keys() == net.keys()
        assert all(torch.equal(weights[name], rows.float()) for name, rows in net.items())
    with pytest.raises(Refusal, match=r"these weights compress an image to 4 tokens; llava-mini.* asks for 1"):
        tokensieve.attach(model, "llava-mini", weights=str(tmp_path))
    save_file({"model.compressor.query": net["compressor.query"]}, tmp_path / "model.safetensors")
    with pytest.raises(Refusal, match="does not fit llava-mini and llava of width 64"):
        tokensieve.attach(model, "llava-mini", keep=4, weights=str(tmp_path))
