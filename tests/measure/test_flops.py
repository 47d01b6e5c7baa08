"""FLOPs against numbers computed by hand."""

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from tokensieve.measure import count_flops

B, T, D, FF, HEADS, KV, LAYERS, VOCAB = 2, 11, 32, 80, 4, 2, 3, 50
HEAD = D // HEADS


def llama_flops(queries: int, keys: int) -> int:
    """Return the FLOPs of a forward of ``queries`` new tokens over ``keys`` tokens; a multiply-add is two."""
    projections = 2 * queries * D * (D + 2 * KV * HEAD + D)
    attention = 2 * 2 * HEADS * queries * keys * HEAD
    mlp = 3 * 2 * queries * D * FF
    return B * (LAYERS * (projections + attention + mlp) + 2 * queries * D * VOCAB)


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def llama(request):
    config = LlamaConfig(
        hidden_size=D,
        intermediate_size=FF,
        num_attention_heads=HEADS,
        num_key_value_heads=KV,
        num_hidden_layers=LAYERS,
        vocab_size=VOCAB,
    )
    return LlamaForCausalLM._from_config(config, attn_implementation=request.param).eval()


@pytest.mark.parametrize("padding", [0, 3])
def test_llama_prefill(llama, padding):
    ids, mask = torch.zeros(B, T, dtype=torch.long), torch.ones(B, T, dtype=torch.long)
    mask[0, :padding] = 0
    with torch.no_grad():
        assert count_flops(lambda: llama(ids, attention_mask=mask)) == llama_flops(T, T)


def test_llama_decode_step(llama):
    with torch.no_grad():
        cache = llama(torch.zeros(B, T, dtype=torch.long), use_cache=True).past_key_values
        step = torch.zeros(B, 1, dtype=torch.long)
        assert count_flops(lambda: llama(step, past_key_values=cache)) == llama_flops(1, T + 1)


def test_clip_vision_encoder():
    grid, patch, d, ff, layers = 3, 4, 16, 40, 2
    config = CLIPVisionConfig(
        hidden_size=d,
        intermediate_size=ff,
        num_attention_heads=2,
        num_hidden_layers=layers,
        image_size=grid * patch,
        patch_size=patch,
    )
    tower, rows = CLIPVisionModel(config).eval(), grid * grid + 1
    patches = 2 * grid * grid * 3 * patch * patch * d
    layer = 4 * 2 * rows * d * d + 2 * 2 * rows * rows * d + 2 * 2 * rows * d * ff
    with torch.no_grad():
        assert count_flops(lambda: tower(torch.zeros(1, 3, 12, 12))) == patches + layers * layer
