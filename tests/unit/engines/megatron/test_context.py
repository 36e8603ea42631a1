"""Rows that are shared among ranks: who has which positions, and attention of one rank's positions to all."""

import pytest
import torch
import torch.nn.functional as F

from dataflex_mega.engines.megatron.context import ContextParallel, gather_order, local_positions
from dataflex_mega.types import Batch


def test_a_rank_has_a_piece_from_each_end():
    assert local_positions(8, 2, 0).tolist() == [0, 1, 6, 7]
    assert local_positions(8, 2, 1).tolist() == [2, 3, 4, 5]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_places_put_the_ranks_parts_in_order(size):
    length = 12 * size
    parts = torch.cat([local_positions(length, size, rank) for rank in range(size)])
    assert parts[gather_order(length, size)].tolist() == list(range(length))


@pytest.mark.parametrize("size", [2, 3])
def test_every_rank_is_asked_for_as_much_attention(size):
    """Pairs of a position and one that it attends to, but for the pairs within a piece."""
    length, piece = 12 * size, 6
    work = [int((local_positions(length, size, rank) // piece).sum()) for rank in range(size)]
    assert len(set(work)) == 1


CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_of_shares_is_causal_attention_and_so_are_its_gradients(size, groups, device, dtype):
    torch.manual_seed(0)
    length = 32 * size
    whole = [torch.randn(2, n, length, 16, device=device, dtype=dtype, requires_grad=True) for n in (4, groups, groups)]
    out_grad = torch.randn(2, 4, length, 16, device=device, dtype=dtype)
    options = {"dropout_p": 0.0, "scale": None, "enable_gqa": groups != 4}
    expected = F.scaled_dot_product_attention(*whole, is_causal=True, **options)
    expected_grads = torch.autograd.grad(expected, whole, out_grad)
    grads = [torch.zeros_like(part) for part in whole]
    close = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    for rank in range(size):
        mine = local_positions(length, size, rank).to(device)
        q, k, v = whole
        found = ContextParallel(size, rank).attend(q[:, :, mine], k, v, **options)
        torch.testing.assert_close(found, expected[:, :, mine], **close)
        for total, grad in zip(grads, torch.autograd.grad(found, whole, out_grad[:, :, mine]), strict=True):
            total += grad
    for total, grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(total, grad, **close)


def test_a_share_of_a_batch_has_its_positions_and_all_samples():
    grid = torch.arange(16).view(2, 8)
    batch = Batch(grid, grid + 1, torch.zeros_like(grid), grid % 8, torch.tensor([5, 6]), torch.tensor([0, 1]))
    part, mine = ContextParallel(2, 1).shard(batch)
    assert part.input_ids.tolist() == [[2, 3, 4, 5], [10, 11, 12, 13]] == (part.labels - 1).tolist()
    assert part.position_ids[0].tolist() == mine.tolist() == [2, 3, 4, 5]
    assert part.sample_ids.tolist() == [5, 6]
    assert ContextParallel().shard(batch) == (batch, None)
