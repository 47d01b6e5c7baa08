"""A reduced prefill beside KV compression: hooks that keep the best keys of each layer's cache, as in kvpress."""

import pytest
import torch
from transformers import DynamicCache

import tokensieve
from tests.support import models, oracle, prompts
from tests.support.oracle import NOISE

SHARE = 0.5
each_family = pytest.mark.parametrize("family", ["llava-clip", "qwen2.5-vl", "qwen3-vl"])
each_policy = pytest.mark.parametrize("policy", ["original", "contiguous"])


class Compressed:
    """Hooks on every attention module: after a prefill, each head keeps the keys with the smallest norms."""

    def __init__(self, model):
        self.layers = oracle.language_model(model).layers

    def __enter__(self):
        self.handles = [
            layer.self_attn.register_forward_hook(self._compress, with_kwargs=True) for layer in self.layers
        ]

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()

    @staticmethod
    def _compress(module, args, kwargs, output):
        layer, queries = kwargs["past_key_values"].layers[module.layer_idx], kwargs["hidden_states"].shape[1]
        if layer.keys.shape[-2] > queries:  # a decode step, or a later turn
            return
        best = layer.keys.norm(dim=-1).topk(round(SHARE * queries), largest=False).indices[..., None]
        layer.keys = layer.keys.gather(2, best.expand(-1, -1, -1, layer.keys.shape[-1]))
        layer.values = layer.values.gather(2, best.expand(-1, -1, -1, layer.values.shape[-1]))


def by_hand(family, sample, kept, policy, tokens):
    """Return the logits of the prompt's end and of ``tokens``: the unhooked LLM, fed the kept rows, then compressed."""
    model = models.unhooked(family)
    rows = [oracle.reduced(family, "sdpa", image, r) for image, r in zip(sample.images, kept, strict=True)]
    sequence = oracle.enter(model, family, sample, [r.kept for r in kept], rows, tokens, policy)
    llm, cache, start = oracle.language_model(model), DynamicCache(), sequence.prompt
    positions, deepstack = oracle.axes(family, sequence), {}
    positions = positions if positions.ndim == 3 else positions[:, None][0]
    if len(sequence.planes):
        visual = (sequence.image_of >= 0)[:start]
        planes = list(sequence.planes[:, :start][:, visual])
        deepstack = {"visual_pos_masks": visual[None], "deepstack_visual_embeds": planes}
    logits = []
    with Compressed(model):
        for piece in (slice(0, start), *(slice(i, i + 1) for i in range(start, len(sequence.rows)))):
            out = llm(
                inputs_embeds=sequence.rows[None, piece],
                position_ids=positions[..., piece],
                past_key_values=cache,
                **(deepstack if piece.start == 0 else {}),
            )
            logits.append(model.lm_head(out.last_hidden_state[0, -1]))
    return torch.stack(logits), [layer.keys.shape for layer in cache.layers]


@each_policy
@each_family
@torch.no_grad()
def test_a_reduced_prompt_is_compressed_as_one_reduced_by_hand(family, policy, deviation):
    model, (sample,) = models.tiny_model(family), prompts.batch(family, "two-images")
    inputs = prompts.collate(family, [sample])
    with tokensieve.attach(model, "divprune(keep=5)", positions=policy) as sieve, Compressed(model):
        out = model.generate(**inputs, max_new_tokens=5, **prompts.GREEDY)
        kept = sieve.last[0]
    tokens = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    expected, held = by_hand(family, sample, kept, policy, tokens[:-1])
    assert [layer.keys.shape for layer in out.past_key_values.layers] == held
    assert held[0][2] == round(SHARE * len(oracle.kept_columns(sample, [r.kept for r in kept]))) + 4
    got = torch.stack(out.logits)[:, 0]
    assert deviation("of a compressed reduced prompt", got, expected) <= NOISE
    assert tokens == expected.argmax(-1).tolist()


@each_policy
@each_family
@torch.no_grad()
def test_a_later_turn_continues_on_the_compressed_cache(family, policy, deviation):
    """Its positions are given, since the cache no longer tells how many columns there were."""
    model, (sample,) = models.tiny_model(family), prompts.batch(family, "single")
    inputs, words = prompts.collate(family, [sample]), [30, 31, 32, 33]
    following = oracle.positions(family, sample)[1]
    with tokensieve.attach(model, "divprune(keep=5)", positions=policy) as sieve, Compressed(model):
        out = model.generate(**inputs, max_new_tokens=2, **prompts.GREEDY)
        answer = out.sequences[0, -2:].tolist()
        positions = torch.arange(following + 1, following + 6)[None]  # the first answered token is in the cache
        logits = model(
            input_ids=torch.tensor([[answer[1], *words]]),
            position_ids=positions.expand(4, 1, -1) if "qwen" in family else positions,
            past_key_values=out.past_key_values,
        ).logits[0]
    expected, _ = by_hand(family, sample, sieve.last[0], policy, [*answer, *words])
    assert deviation("of a turn on a compressed cache", logits, expected[2:]) <= NOISE
