"""The memory of decisions is bounded by bytes."""

import torch

from tokensieve.reduction import Mixing, Reduction
from tokensieve.vllm.memory import Decisions


def merge(total: int, slots: int, images: int = 16) -> Reduction:
    """Return one image's part of a decision about several images."""
    source = torch.arange(total).expand(images, -1).contiguous()
    mixing = Mixing(source % slots, source, torch.full(source.shape, 1 / total))
    anchors = torch.arange(slots).expand(images, -1).contiguous()
    return Reduction(total, anchors, mixing, scores=torch.rand(images, total))[3]


def test_many_merges_of_long_images_stay_below_the_bound():
    memory, decision = Decisions(3_000_000), merge(2880, 640)
    for number in range(500):
        memory.put((number, "plan", ()), decision)
    tensors = [[d.anchors, d.mixing.slot, d.mixing.source, d.mixing.weight] for _, d in memory.items()]
    held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for of in tensors for tensor in of}
    assert 2_800_000 < sum(held.values()) < memory.bytes <= 3_000_000
    assert 40 < len(memory) < 60


def test_long_words_count():
    memory = Decisions(1_000_000)
    for number in range(100):
        memory.put((number, "plan", tuple(range(2_000))), Reduction(9, torch.arange(3)))
    assert len(memory) == 12


def test_the_least_recently_used_is_forgotten():
    memory, first = Decisions(7_000), Reduction(9, torch.tensor([1, 4]), scores=torch.rand(9))
    for number in range(3):
        memory.put((number,), first)
    memory.put((2,), first)  # again: it counts once
    assert memory.get((0,)).anchors.tolist() == [1, 4]
    memory.put((3,), first)
    assert [key for key, _ in memory.items()] == [(2,), (0,), (3,)]
    assert memory.get((1,)) is None
    for key in ((2,), (0,), (3,)):
        assert torch.equal(memory.get(key).apply(torch.eye(9)), first.apply(torch.eye(9)))
