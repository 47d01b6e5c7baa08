"""The law of repair: tokens that are identical may be merged, and with ``repair="size"`` nothing changes.

The image of the full run has groups of identical tokens: equal features, equal deepstack planes, equal positions. A
token attends to all members of its own group there, as the merged token does to itself. The full run is put together by
hand, with no code of the engine, cache or padding.
"""

from dataclasses import replace
from functools import cache, wraps

import pytest
import torch

import tokensieve
from tests.support import families, models, oracle, prompts
from tokensieve import Reduction
from tokensieve.reduction import Mixing

EXACT = 1e-5  # on logits with a standard deviation of about 2 in float64, and relative to the largest in float32
STEPS = 4
CASES = [(family, attention) for family in (*families.CORE, "paligemma") for attention in ("sdpa", "eager")]


@cache
def tiny(family: str, attention: str, attached: bool):
    """Return the model that methods are attached to, or its twin that no hook ever touches.

    SDPA runs in float64, as rounding in float32 alone reaches 1e-5. Eager attention always rounds to float32.
    """
    model = models.build(family, attention)
    return model.double() if attention == "sdpa" else model


def groups_of(tokens: int, seed: int) -> torch.Tensor:
    """Draw the anchor of each token, `[N]`: groups of several sizes, interleaved."""
    draw = torch.Generator().manual_seed(seed)
    anchors = torch.randperm(tokens, generator=draw)[: max(1, tokens // 4)].sort().values
    return anchors[torch.randint(len(anchors), (tokens,), generator=draw)].scatter(0, anchors, anchors)


def merging(stands_for: torch.Tensor) -> Reduction:
    """Return the decision that averages each group at its anchor."""
    anchors, slot, counts = stands_for.unique(return_inverse=True, return_counts=True)
    tokens = len(stands_for)
    return Reduction(tokens, anchors, Mixing(slot, torch.arange(tokens), 1 / counts[slot].float()))


def pruning(stands_for: torch.Tensor) -> Reduction:
    """Return the decision that drops all of each group but its anchor."""
    return Reduction(len(stands_for), stands_for.unique())


@cache
def groups(kind: str, family: str) -> list[list[torch.Tensor]]:
    """Per sample and image, the groups of a batch."""
    samples = prompts.batch(family, kind)
    return [[groups_of(image.tokens, 7 * row + i) for i, image in enumerate(s.images)] for row, s in enumerate(samples)]


def with_identical_tokens(model, family: str, kind: str, monkeypatch) -> None:
    """Let the vision encoder of a model make identical rows of the tokens of a group."""
    flat, encode = [group for row in groups(kind, family) for group in row], model.model.get_image_features

    def duplicated(pooled):
        rows = torch.cat([part.flatten(0, -2) for part in ([pooled] if torch.is_tensor(pooled) else pooled)])
        per_image = torch.split(rows, [len(group) for group in flat])
        rows = torch.cat([rows[group] for rows, group in zip(per_image, flat, strict=True)])
        if torch.is_tensor(pooled):
            return rows.view_as(pooled)
        return [part.view_as(old) for part, old in zip(torch.split(rows, list(map(len, pooled))), pooled, strict=True)]

    @wraps(encode)
    def identical(*args, **kwargs):
        out = encode(*args, **kwargs)
        out.pooler_output = duplicated(out.pooler_output)
        if getattr(out, "deepstack_features", None) is not None:
            out.deepstack_features = [duplicated(level) for level in out.deepstack_features]
        return out

    monkeypatch.setattr(model.model, "get_image_features", identical)


@torch.no_grad()
def full_run(family: str, attention: str, kind: str, row: int, answer: list[int]) -> torch.Tensor:
    """Return the unmodified LLM's logits of prompt and answer, with every token in place."""
    model, sample = tiny(family, attention, False), prompts.batch(family, kind)[row]
    encoded = oracle.encode(model, family, sample)
    of_images = groups(kind, family)[row]
    encoded = [
        oracle.Encoded(image.rows[group], [plane[group].float() for plane in image.planes])
        for image, group in zip(encoded, of_images, strict=True)
    ]
    sequence = oracle.enter(model, family, sample, oracle.everything(sample), encoded, answer)
    place = torch.arange(len(sequence.rows))  # of each row: that of the row that it equals
    for columns, group in zip(sequence.images, of_images, strict=True):
        place[columns] = torch.tensor(columns)[group]
    sequence = replace(sequence, positions=sequence.positions[:, place])
    decoder = oracle.language_model(model)
    # whatever one member of a group attends to, and is attended to by, holds for all of it
    masks = {
        kind: mask[..., place, :][..., place].double()
        for kind, mask in oracle.masks(family, decoder.config, sequence).items()
    }
    visual, deepstack = sequence.image_of >= 0, {}
    if len(sequence.planes):
        planes = list(sequence.planes[:, visual].to(sequence.rows))
        deepstack = {"visual_pos_masks": visual[None], "deepstack_visual_embeds": planes}
    kinds = set(oracle.layer_kinds(decoder.config))
    out = decoder(
        inputs_embeds=sequence.rows[None],
        position_ids=oracle.axes(family, sequence),
        attention_mask=masks if len(kinds) > 1 else masks[kinds.pop()],
        use_cache=False,
        **deepstack,
    )
    return model.lm_head(out.last_hidden_state[0])[-1 - len(answer) :]


@pytest.mark.parametrize("decide", [merging, pruning])
@pytest.mark.parametrize("kind", ["ragged", "one-and-two"])
@pytest.mark.parametrize(("family", "attention"), CASES)
def test_identical_tokens_merged_equal_the_full_run(family, attention, kind, decide, monkeypatch, deviation):
    """In prefill and decoding; a dropped token counts for its identical one, so that dropping is merging here."""
    model, samples = tiny(family, attention, True), prompts.batch(family, kind)
    with_identical_tokens(model, family, kind, monkeypatch)
    decisions = [[decide(group) for group in row] for row in groups(kind, family)]
    with tokensieve.attach(model, decisions, repair="size") as sieve:
        out = model.generate(**prompts.collate(family, samples), max_new_tokens=STEPS, **prompts.GREEDY)
    logits, answers = torch.stack(out.logits, 1), out.sequences[:, -STEPS:].tolist()
    for row, answer in enumerate(answers):
        for sizes, group in zip(sieve.sizes[row], groups(kind, family)[row], strict=True):
            assert torch.equal(sizes, group.unique(return_counts=True)[1].float())
        expected = full_run(family, attention, kind, row, answer[:-1])
        scale = 1 if logits.dtype == torch.float64 else expected.abs().max()
        assert deviation("from the full run (law of repair)", logits[row] / scale, expected / scale) <= EXACT
