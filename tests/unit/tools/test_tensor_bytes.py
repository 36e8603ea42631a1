"""The counter of tensor bytes against hand calculations."""

import torch

from tools.bench.tensor_bytes import peak

KB = 1024


def test_storages_count_once_while_they_live():
    kept = torch.zeros(KB // 4)  # 1 KB
    weight = torch.ones(KB // 4, requires_grad=True)  # 1 KB

    def work():
        first = torch.zeros(KB)  # 4 KB
        view = first.view(2, -1)[0]  # the same storage
        second = view + 1  # 2 KB
        del first, view
        third = second.repeat(4)  # 8 KB, with second alive: 10 KB and no first
        return third.sum()

    assert peak(work, [kept, weight]) == 2 * KB + 10 * KB + 4


def test_what_a_backward_pass_keeps_and_makes_is_counted():
    weight = torch.ones(KB // 4, requires_grad=True)
    # weight, exp(weight), kept for the backward pass, its sum (4 bytes) and the gradient of one (4), then the gradient
    found = peak(lambda: weight.exp().sum().backward(), [weight])
    assert 3 * KB < found <= 4 * KB + 16
