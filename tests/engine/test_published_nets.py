"""Loaders of published nets, on random state dicts with the names and shapes of the authors' checkpoints."""

import json

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import tokensieve
from tests.support import models, prompts
from tokensieve import Refusal
from tokensieve.commands.convert import app
from tokensieve.engine.nets import load_net, shape_of
from tokensieve.loading.published import convert_net

WIDTH, HIDDEN, QUERIES = 32, 64, 16  # of tiny LLaVA, where the authors have 1,024, 4,096 and 256


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


def drawn(method):
    draw = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=draw).half() for name, shape in SHAPES[method].items()}


def checkpoint(folder, method):
    """Write an authors' checkpoint in two files, as they are published: the LLM, and the net beside it."""
    folder.mkdir()
    net = {f"model.mm_projector.{name}": rows for name, rows in drawn(method).items()}
    parts = {"pytorch_model-00001-of-00002.bin": {"model.norm.weight": torch.ones(2)}}
    parts["pytorch_model-00002-of-00002.bin"] = {"lm_head.weight": torch.ones(2, 2)} | net
    for file, weights in parts.items():
        torch.save(weights, folder / file)
    places = {name: file for file, weights in parts.items() for name in weights}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    models.build("llava-clip").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", SHAPES)
def test_a_published_net_is_read_and_used(method, llava, tmp_path):
    source, target = checkpoint(tmp_path / "theirs", method), tmp_path / "net"
    result = CliRunner().invoke(app, ["net", method, str(source), str(target), "--model", str(llava)])
    assert result.exit_code == 0, result.output
    assert sorted(file.name for file in target.iterdir()) == ["method.json", "net.safetensors"]
    model = models.tiny_model("llava-clip")
    spec = f"{method}(weights={str(target)!r}" + (", keep=4)" if method == "mqt" else ")")
    net = load_net(tokensieve.parse(spec)[0], shape_of(model))
    for name, rows in drawn(method).items():
        assert torch.equal(net.state_dict()[name], rows.float()), name
    with torch.no_grad(), tokensieve.attach(model, spec) as sieve:
        model(**prompts.collate("llava-clip", prompts.batch("llava-clip", "two-images")))
        assert {decision.slots for decision in sieve.last[0]} == {4 if method == "mqt" else 9}
    with pytest.raises(Refusal, match=rf"the weights in .* are those of {method}; got setok"):
        tokensieve.attach(model, f"setok(weights={str(target)!r})")


def test_what_is_no_published_net_is_refused(llava, tmp_path):
    save_file({"model.norm.weight": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(Refusal, match=r"has no parameters whose names start with 'mm_projector\.'"):
        convert_net("mqt", tmp_path / "other.safetensors", tmp_path / "net", str(llava))
    weights = {f"mm_projector.{name}": rows for name, rows in drawn("tokenpacker").items()}
    torch.save(weights, tmp_path / "mm_projector.bin")
    with pytest.raises(Refusal, match=r"mm_projector.bin has no net of mqt for .*: Unexpected key"):
        convert_net("mqt", tmp_path / "mm_projector.bin", tmp_path / "net", str(llava))
    with pytest.raises(Refusal, match="size mismatch"):
        convert_net("tokenpacker(levels=(0, 1))", tmp_path / "mm_projector.bin", tmp_path / "net", str(llava))
    with pytest.raises(Refusal, match="no published nets of random can be read"):
        convert_net("random", tmp_path / "mm_projector.bin", tmp_path / "net", str(llava))
    folder = checkpoint(tmp_path / "theirs", "mqt")
    (folder / "pytorch_model.bin.index.json").write_text("{}")
    with pytest.raises(Refusal, match=r"cannot read .*index\.json"):
        convert_net("mqt", folder, tmp_path / "net", str(llava))
    assert not (tmp_path / "net").exists()
