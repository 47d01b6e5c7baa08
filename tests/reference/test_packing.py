"""Packs: targets of answers of several words, masks, and pairs of scenes."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("skimage")
pytest.importorskip("matplotlib")

import torch

from tokensieve.reference.card import _prompt
from tokensieve.reference.learning import Batch, Kept, Trainee, drop
from tokensieve.reference.model import build_model, build_processor, vocabulary
from tokensieve.reference.packing import IGNORE, PAIR_SLOTS, SLOTS, TOKENS, Packs, make_packs

SCENES = 8


@pytest.fixture(scope="module")
def packs() -> Packs:
    return make_packs("train", range(SCENES), variants=1, turned=0.0)


@pytest.fixture(scope="module")
def trainee() -> Trainee:
    model = build_model(width=32, vision_layers=3, text_layers=2)
    model.set_attn_implementation("eager")
    return Trainee(model).eval()


def words(ids) -> list[str]:
    return [vocabulary()[number] for number in ids if number != IGNORE]


def single(packs: Packs, scene: int, slot: int) -> tuple[list[str], list[str], np.ndarray]:
    """Return the words of a question with the answer's first words, its targets, and where these stand."""
    texts = packs.single
    part = texts.slots[scene, 0] == slot
    targets = texts.targets[scene, 0][part]
    return words(texts.tokens[scene, 0][part]), words(targets), np.flatnonzero(targets != IGNORE)


def test_each_word_of_an_answer_is_the_target_of_the_token_before_it(packs: Packs) -> None:
    for scene in range(SCENES):
        asked, targets, places = single(packs, scene, SLOTS.index("point"))
        assert targets[0][0] + targets[1][0] + targets[2] == "xy</s>"
        assert asked[-3:] == ["ASSISTANT:", *targets[:2]]
        assert places.tolist() == [len(asked) - 3, len(asked) - 2, len(asked) - 1]
        cell = 12 * int(targets[1][1:]) + int(targets[0][1:])
        assert (packs.single.needed[scene, 0, cell] >> SLOTS.index("point")) & 1


def test_only_the_last_turn_is_learned(packs: Packs) -> None:
    asked, targets, places = single(packs, 0, SLOTS.index("turn"))
    assert asked.count("ASSISTANT:") == 2
    assert asked.count("USER:") == 1
    assert asked[asked.index("USER:") - 1] == "</s>"
    assert places.tolist() == [len(asked) - 2, len(asked) - 1]
    assert asked[-1] == targets[0]


def test_packed_words_are_those_of_the_prompt() -> None:
    """Every kind of question, as the tokenizer reads the prompt of the card and of the chat template."""
    from tokensieve.reference.benchmark import benchmark

    processor = build_processor()
    for row in benchmark("validation", scenes=1):
        turns = [(question, answer) for question, answer in row.turns]
        messages: list[dict[str, object]] = []
        for number, (question, answer) in enumerate([*turns, (row.question, "")]):
            content = [{"type": "image"}] * (len(row.scenes) if number == 0 else 0)
            messages.append({"role": "user", "content": [*content, {"type": "text", "text": question}]})
            messages += [{"role": "assistant", "content": answer}] if answer else []
        assert _prompt(row, image=True) == processor.apply_chat_template(messages, add_generation_prompt=True)
        unknown = processor.tokenizer.unk_token_id
        assert unknown not in processor.tokenizer(_prompt(row, image=True)).input_ids


def test_pairs_ask_about_the_second_scene(packs: Packs) -> None:
    batch = Batch.of_pairs(packs, np.arange(SCENES // 2), np.zeros(SCENES // 2, np.int64))
    assert batch.images.shape[0] == SCENES
    assert batch.needed.shape == (SCENES // 2, 2 * TOKENS)
    assert (batch.needed[:, :TOKENS] == 0).all()
    asked = (batch.slots >= 0).any(1)
    assert asked.sum() >= SCENES // 2 - 1
    assert (batch.needed[asked, TOKENS:] > 0).any(1).all()
    assert batch.slots.max() == len(PAIR_SLOTS) - 1


@pytest.mark.parametrize("pairs", [False, True])
def test_dropping_keeps_equally_many_tokens_of_each_scene(packs: Packs, pairs: bool) -> None:
    rows = np.arange(4)
    batch = (Batch.of_pairs if pairs else Batch.of)(packs, rows, np.zeros_like(rows))
    for ease in (0.0, 0.5):
        kept = drop(batch, 20, np.random.default_rng(0), ease)
        assert kept.indices.shape == (4, 20 * (1 + pairs))
        assert (kept.indices.diff(dim=1) > 0).all()
        for scene in range(1 + pairs):
            assert (((kept.indices // TOKENS) == scene).sum(1) == 20).all()
        assert kept.visible.shape == (*batch.tokens.shape, kept.indices.shape[1])
        assert int(kept.end) == batch.needed.shape[1]


def test_eased_questions_about_a_neighbour_see_all_kept_digits_and_not_the_icon(packs: Packs) -> None:
    rows = np.arange(4)
    batch = Batch.of(packs, rows, np.zeros_like(rows))
    kept = drop(batch, 60, np.random.default_rng(0), ease=1.0)
    digits = (batch.neighbour != IGNORE).gather(1, kept.indices)
    for slot in (SLOTS.index("beside"), SLOTS.index("hop")):
        depends = ((batch.needed.gather(1, kept.indices) >> slot) & 1).bool()
        assert (depends & digits).any(1).all()
        assert (depends & ~digits).any(1).all(), "the icon"
        for row in range(len(rows)):
            seen = kept.visible[row][batch.slots[row] == slot]
            assert seen[:, digits[row]].all()
            assert not seen[:, (depends & ~digits)[row]].any()


@torch.no_grad()
@pytest.mark.parametrize("pairs", [False, True])
def test_a_packed_answer_is_that_of_the_stock_model(packs: Packs, trainee: Trainee, pairs: bool) -> None:
    """Each question of a pack has the logits of the stock model, which is asked it alone."""
    row = np.array([1])
    batch = (Batch.of_pairs if pairs else Batch.of)(packs, row, np.zeros_like(row))
    features, _ = trainee.see(batch.images)
    logits, _ = trainee.answer(features, Kept.everything(batch), batch)
    processor = build_processor()
    pictures = list(batch.images.numpy())
    for slot in range(1 + int(batch.slots.max())):
        part = batch.slots[0] == slot
        ids = batch.tokens[0][part]
        text = "USER: " + "<image>\n" * len(pictures) + " ".join(words(ids.tolist()))
        inputs = processor(images=pictures, text=text, return_tensors="pt")
        assert inputs["input_ids"][0, -len(ids) :].tolist() == ids.tolist()
        stock = trainee.model(**inputs).logits[0, -len(ids) :]
        torch.testing.assert_close(logits[0][part].float(), stock, atol=2e-2, rtol=2e-2)


def test_targets_of_some_questions_can_be_left_out(packs: Packs) -> None:
    rows = np.arange(2)
    batch = Batch.of(packs, rows, np.zeros_like(rows))
    pointing = [number for number, type in enumerate(SLOTS) if type == "point"]
    rest = batch.without(pointing)
    asked = torch.isin(batch.slots, torch.tensor(pointing))
    assert (rest.targets[asked] == IGNORE).all()
    assert torch.equal(rest.targets[~asked], batch.targets[~asked])
    assert (batch.targets[asked] != IGNORE).any()
