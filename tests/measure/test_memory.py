"""Peak activation bytes of programs whose live tensors can be counted by hand."""

import torch
from torch import Tensor
from transformers import DynamicCache

from tokensieve.measure import kv_bytes, peak_activation_bytes

KB = 4 * 256  # bytes of 256 float32


def test_a_freed_tensor_does_not_count():
    def chain() -> Tensor:
        a = torch.ones(256)
        b = a + 1  # a and b
        del a
        return b + 1  # b and the result

    assert peak_activation_bytes(chain) == 2 * KB


def test_a_held_tensor_counts():
    def hold() -> list[Tensor]:
        a = torch.ones(256)
        return [a, a + 1, a + 2]

    assert peak_activation_bytes(hold) == 3 * KB


def test_views_and_in_place_work_are_free():
    def views() -> Tensor:
        a = torch.ones(16, 16).t().reshape(4, 64)[1:]  # reshape of a transpose copies: two storages
        return a.add_(1).unsqueeze(0)

    assert peak_activation_bytes(views) == 2 * KB


def test_inputs_and_weights_do_not_count():
    layer, rows = torch.nn.Linear(256, 16), torch.ones(4, 256)
    with torch.no_grad():
        assert peak_activation_bytes(lambda: layer(rows)) == 4 * 4 * 16


def test_a_smaller_dtype_is_smaller():
    assert peak_activation_bytes(lambda: torch.ones(256, dtype=torch.bfloat16)) == KB // 2


def test_sparse_tensors_count_their_parts():
    index, weight = torch.zeros(2, 8, dtype=torch.long), torch.ones(8)
    peak = peak_activation_bytes(lambda: torch.sparse_coo_tensor(index, weight, (4, 4)).coalesce())
    assert 0 < peak < KB


def test_kv_bytes():
    cache = DynamicCache()
    cache.update(torch.zeros(2, 4, 10, 8), torch.zeros(2, 4, 10, 8), 0)
    cache.update(torch.zeros(2, 4, 6, 8), torch.zeros(2, 4, 6, 8), 1)  # a layer with fewer tokens
    assert kv_bytes(cache) == 2 * 4 * 8 * (10 + 6) * 2 * 4
