"""Training of the reference model: heads for training only, the packed forward pass, losses, token dropping."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokensieve.reference.model import vocabulary
from tokensieve.reference.packing import ALONE, IGNORE, SEEN, SLOTS, TOKENS, Packs, Texts
from tokensieve.reference.vocabulary import COLOURS, FRAMES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from transformers import LlavaForConditionalGeneration

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP's image processor
PREFIX = [vocabulary().index(word) for word in ("<s>", "USER:")]
SEEN_IDS = [vocabulary().index(name) for name in SEEN]
NOTHING = len(SEEN)  # class of a patch that shows no object and no sign
PARTS = (len(SEEN) + 1, len(COLOURS), len(FRAMES), ALONE + 1)  # outputs of the patch head
LISTED_WEIGHT, BACKGROUND_WEIGHT, NEIGHBOUR_WEIGHT, PLACE_WEIGHT = 5.0, 0.1, 3.0, 2.0
WORD_WEIGHT, WORD_TEMPERATURE, BESIDE_WEIGHT = 0.05, 0.1, 0.1


@dataclass(frozen=True)
class Batch:
    """The arrays of `Packs` for B packs about one or two scenes each, as tensors.

    `I` is 144 image tokens for each scene of a pack, and `L` the text tokens of a pack.
    """

    images: Tensor  # [scenes, 120, 120, 3] uint8; the scenes of a pack follow each other
    shown: Tensor  # [scenes, 144]
    colour: Tensor  # [scenes, 144]
    frame: Tensor  # [scenes, 144]
    neighbour: Tensor  # [scenes, 144]
    present: Tensor  # [scenes, names + signs + colours] float
    tokens: Tensor  # [B, L]
    targets: Tensor  # [B, L]
    places: Tensor  # [B, L]
    slots: Tensor  # [B, L]
    needed: Tensor  # [B, I]

    @classmethod
    def of(cls, packs: Packs, rows: NDArray[np.int64], variants: NDArray[np.int64]) -> Batch:
        """Select the scenes `rows`, each with its pack number `variants`."""
        return cls._select(packs, rows, packs.single, (rows, variants))

    @classmethod
    def of_pairs(cls, packs: Packs, rows: NDArray[np.int64], variants: NDArray[np.int64]) -> Batch:
        """Select the pairs of scenes `rows`, each with its pack number `variants`."""
        return cls._select(packs, np.stack([2 * rows, 2 * rows + 1], 1).flatten(), packs.pairs, (rows, variants))

    @classmethod
    def _select(
        cls, packs: Packs, scenes: NDArray[np.int64], texts: Texts, rows: tuple[NDArray[np.int64], ...]
    ) -> Batch:
        def pick(part: NDArray[Any], index: Any) -> Tensor:
            return torch.from_numpy(part[index]).long()

        return cls(
            images=torch.from_numpy(packs.images[scenes]),
            shown=pick(packs.shown, scenes),
            colour=pick(packs.colour, scenes),
            frame=pick(packs.frame, scenes),
            neighbour=pick(packs.neighbour, scenes),
            present=pick(packs.present, scenes).float(),
            tokens=pick(texts.tokens, rows),
            targets=pick(texts.targets, rows),
            places=pick(texts.places, rows),
            slots=pick(texts.slots, rows),
            needed=pick(texts.needed, rows),
        )

    def without(self, slots: Sequence[int]) -> Batch:
        """Return the batch without the targets of some questions."""
        excluded = torch.isin(self.slots, torch.tensor(slots))
        return replace(self, targets=self.targets.masked_fill(excluded, IGNORE))


@dataclass(frozen=True)
class Kept:
    """The visual tokens that are kept.

    Attributes:
        indices: `[B, K]`, ascending.
        positions: `[B, K]`, their position ids.
        end: the position id at which the text begins.
        visible: `[B, L, K]`, the tokens to which each text token can attend.
    """

    indices: Tensor
    positions: Tensor
    end: Tensor  # [] long
    visible: Tensor

    def renumbered(self) -> Kept:
        """Return the same tokens with contiguous positions."""
        count = self.indices.shape[1]
        positions = torch.arange(count).repeat(len(self.indices), 1)
        return replace(self, positions=positions, end=torch.tensor(count))

    @classmethod
    def everything(cls, batch: Batch) -> Kept:
        """Keep all tokens."""
        size, count = batch.needed.shape
        indices = torch.arange(count).repeat(size, 1)
        return cls(indices, indices, torch.tensor(count), torch.ones(*batch.tokens.shape, count, dtype=torch.bool))


class Trainee(nn.Module):
    """The model with two heads for training only."""

    def __init__(self, model: LlavaForConditionalGeneration) -> None:
        super().__init__()
        self.model = model
        width = model.config.vision_config.hidden_size
        self.patch_head = nn.Linear(width, sum(PARTS))
        self.cls_head = nn.Linear(width, len(SEEN) + len(COLOURS))
        self.neighbour_head = nn.Linear(model.config.text_config.hidden_size, ALONE + 1)

    def see(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Encode images `[B, 120, 120, 3]` to penultimate patch features `[B, 144, D]` and the pooled CLS `[B, D]`."""
        tower = self.model.model.vision_tower
        hidden = tower.pre_layrnorm(tower.embeddings(normalised(images)))
        for layer in tower.encoder.layers[:-1]:
            hidden = layer(hidden, None)
        last = tower.encoder.layers[-1](hidden, None)
        return hidden[:, 1:], tower.post_layernorm(last[:, 0])

    def answer(self, features: Tensor, kept: Kept, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return logits `[B, L, V]` of packed questions on the kept tokens, and these tokens projected `[B, K, D]`.

        `features` are `[scenes, 144, D]`.
        """
        language, (size, count) = self.model.model.language_model, kept.indices.shape
        features = features.reshape(size, -1, features.shape[-1])  # the scenes of a pack side by side
        chosen = features.gather(1, kept.indices.unsqueeze(-1).expand(-1, -1, features.shape[-1]))
        visual = self.model.model.multi_modal_projector(chosen)
        embed, prefix_length = language.embed_tokens, len(PREFIX)
        prefix = embed(torch.tensor(PREFIX)).expand(size, -1, -1)
        hidden = torch.cat([prefix, visual.to(prefix.dtype), embed(batch.tokens)], 1)
        # a question's positions start where the image ends, as if it were the only one in the sequence
        start = torch.arange(prefix_length).expand(size, -1)
        positions = torch.cat([start, kept.positions + prefix_length, batch.places + (kept.end + prefix_length)], 1)
        mask = _block_mask(batch.slots, kept.visible)
        rotary = language.rotary_emb(hidden, position_ids=positions)
        for layer in language.layers:
            hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary, position_ids=positions)
        return self.model.lm_head(language.norm(hidden[:, prefix_length + count :])), visual


def normalised(images: Tensor) -> Tensor:
    """Normalise images `[B, 120, 120, 3]` uint8 as CLIP's image processor, `[B, 3, 120, 120]`."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (images.permute(0, 3, 1, 2) / 255.0 - mean) / std


def _block_mask(slots: Tensor, visible: Tensor) -> Tensor:
    """Return a causal mask `[B, 1, S, S]` (additive): a question attends to prefix, visible tokens and itself."""
    size, text_length, count = visible.shape
    prefix_length = len(PREFIX)
    length = prefix_length + count + text_length
    causal = torch.ones(size, length, length, dtype=torch.bool).tril()
    prefix = torch.ones(size, text_length, prefix_length, dtype=torch.bool)
    rows = torch.cat([prefix, visible, slots.unsqueeze(1) == slots.unsqueeze(2)], 2)
    allowed = causal & torch.cat([torch.ones(size, prefix_length + count, length, dtype=torch.bool), rows], 1)
    return torch.zeros(allowed.shape, dtype=torch.bfloat16).masked_fill(~allowed, -1e4).unsqueeze(1)


def seeing_loss(trainee: Trainee, features: Tensor, pooled: Tensor, batch: Batch) -> Tensor:
    """Train CLS to list the scene, and patches to name their thing, its colour, frame and neighbouring icon.

    The mean features of the places are pulled together: the language model is to take the place of a patch from its
    position id, which reduction methods keep or renumber, rather than from its features.
    """
    listed = F.binary_cross_entropy_with_logits(trainee.cls_head(pooled).float(), batch.present)
    shown, colour, frame, neighbour = trainee.patch_head(features).float().flatten(0, 1).split(PARTS, -1)
    truth = batch.shown.flatten()
    weight = torch.where(truth == IGNORE, BACKGROUND_WEIGHT, 1.0)
    named = F.cross_entropy(shown, truth.where(truth != IGNORE, NOTHING), reduction="none")
    patch = (named * weight).sum() / weight.sum()
    patch = patch + F.cross_entropy(colour, batch.colour.flatten(), ignore_index=IGNORE)
    patch = patch + F.cross_entropy(frame, batch.frame.flatten(), ignore_index=IGNORE)
    patch = patch + NEIGHBOUR_WEIGHT * F.cross_entropy(neighbour, batch.neighbour.flatten(), ignore_index=IGNORE)
    centred = features.float() - features.float().mean((0, 1))
    placed = centred.mean(0).square().mean() / centred.square().mean()
    return LISTED_WEIGHT * listed + patch + PLACE_WEIGHT * placed


def answering_loss(trainee: Trainee, logits: Tensor, visual: Tensor, kept: Kept, batch: Batch) -> Tensor:
    """Train the answers by next-word loss, and weakly what projected tokens show.

    They are pulled towards the word for their thing, and a head for training only reads the icon beside a digit from
    them. Without it, the projector drops what is beside a digit before the language model asks for it.
    """
    answers = F.cross_entropy(logits.float().flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE)
    words = F.normalize(trainee.model.model.language_model.embed_tokens(torch.tensor(SEEN_IDS)).float(), dim=-1)
    cosine = F.normalize(visual.float(), dim=-1) @ words.T
    shown = batch.shown.view(len(kept.indices), -1).gather(1, kept.indices).flatten()
    named = F.cross_entropy((cosine / WORD_TEMPERATURE).flatten(0, 1), shown, ignore_index=IGNORE)
    # unit length, so that the direction of a token must tell its neighbour; scaled to a mean square of about 1
    directions = F.normalize(visual.float(), dim=-1) * visual.shape[-1] ** 0.5
    neighbour = batch.neighbour.view(len(kept.indices), -1).gather(1, kept.indices).flatten()
    beside = F.cross_entropy(trainee.neighbour_head(directions).float().flatten(0, 1), neighbour, ignore_index=IGNORE)
    return answers + WORD_WEIGHT * named + BESIDE_WEIGHT * beside


def drop(batch: Batch, count: int, rng: np.random.Generator, ease: float = 0.0) -> Kept:
    """Keep `count` tokens of each scene, by one of three policies per image.

    The policies are: at random; objects first, as in CLS-guided methods; the tokens that a question depends on first,
    as in text-guided methods. An `ease` above 0 always keeps objects first, and hides from this share of the questions
    many of the tokens that they do not depend on, so that a thing is found among few tokens before it is among many.
    """
    size, width = batch.needed.shape
    scenes, number = width // TOKENS, int(batch.slots.max()) + 1
    noise = torch.from_numpy(rng.random((size, width)))
    policy = torch.full((size, 1), 1) if ease else torch.from_numpy(rng.integers(0, 3, (size, 1)))
    question = torch.from_numpy(rng.integers(0, number, (size, 1)))
    # noise is below 1: weights 0.9 and 2.0 put objects mostly, and needed tokens always, before the others
    things = (batch.shown != IGNORE).view(size, width)
    score = noise + (policy > 0) * 0.9 * things + (policy > 1) * 2.0 * ((batch.needed >> question) & 1)
    indices = score.view(size, scenes, TOKENS).topk(count).indices.sort(-1).values
    indices = (indices + TOKENS * torch.arange(scenes).view(-1, 1)).flatten(1)
    kept = Kept(
        indices, indices, torch.tensor(width), torch.ones(*batch.tokens.shape, scenes * count, dtype=torch.bool)
    )
    if not ease:
        return kept
    needed = batch.needed.gather(1, indices)
    visible = visible_tokens(needed, range(number), ease, rng)
    if scenes == 1:
        visible = _digits_without_icon(visible, needed, (batch.neighbour != IGNORE).gather(1, indices), ease, rng)
    # [B, questions, K] to [B, L, K]: each text token takes the row of its question
    rows = batch.slots.clamp(min=0).unsqueeze(-1).expand(-1, -1, indices.shape[1])
    return replace(kept, visible=visible.gather(1, rows))


def _digits_without_icon(
    visible: Tensor, needed: Tensor, digits: Tensor, ease: float, rng: np.random.Generator
) -> Tensor:
    """Show this share of the questions about a neighbour all digits, and hide the icon that they name.

    Then only a digit's own patches tell which icon is beside it. With the icon in sight, and few digits, a model takes
    any digit in sight and learns no more.

    Args:
        visible: `[B, Q, K]` bool.
        needed: `[B, K]`, bits by question.
        digits: `[B, K]` bool, the tokens of digits.
    """
    number = visible.shape[1]
    about_neighbour = torch.tensor([SLOTS[question] in ("beside", "hop") for question in range(number)]).view(1, -1, 1)
    chosen = about_neighbour & (torch.from_numpy(rng.random((len(visible), number, 1))) < ease)
    icon = ((needed.unsqueeze(1) >> torch.arange(number).view(1, -1, 1)) & 1 > 0) & ~digits.unsqueeze(1)
    return torch.where(chosen, (visible | digits.unsqueeze(1)) & ~icon, visible)


def visible_tokens(needed: Tensor, questions: Sequence[int], ease: float, rng: np.random.Generator) -> Tensor:
    """Draw the tokens that each question attends to, `[B, Q, K]` bool, from the kept bits of `needed` `[B, K]`.

    A question attends to all tokens that it depends on. With probability `ease`, it attends to a random share of the
    others, often a small one; else to all of them.
    """
    size, count, number = *needed.shape, len(questions)
    share, eased = (torch.from_numpy(rng.random((size, number, 1))) for _ in range(2))
    share = torch.where(eased < ease, share**2, 1.0)
    needed = (needed.unsqueeze(1) >> torch.tensor(questions).view(1, -1, 1)) & 1
    return (needed > 0) | (torch.from_numpy(rng.random((size, number, count))) < share)
