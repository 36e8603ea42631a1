"""Training on a GPU against the CPU; skipped without one."""

import pytest
import torch

from dataflex_mega.distributed.testing import run_distributed_test
from tests.distributed.layouts import run_steps

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def on_cpu(parallel_info, case):
    """The same steps on the CPU of this machine."""
    from dataclasses import replace

    return run_steps(replace(parallel_info, device=torch.device("cpu")), case)


@pytest.mark.parametrize("mode", ["single", "fsdp2"])
def test_float32_losses_equal_the_cpu(mode):
    case = {"mode": mode, "micro": 4}
    actual = torch.tensor(run_distributed_test(run_steps, 1, case)[0])
    expected = torch.tensor(run_distributed_test(on_cpu, 1, {"mode": "single", "micro": 4})[0])
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("mode", ["single", "fsdp2"])
def test_low_precision_follows_float32(mode, precision):
    exact = torch.tensor(run_distributed_test(run_steps, 1, {"mode": mode, "micro": 4})[0])
    actual = torch.tensor(run_distributed_test(run_steps, 1, {"mode": mode, "micro": 4, "precision": precision})[0])
    torch.testing.assert_close(actual[:, 1], exact[:, 1], rtol=3e-2, atol=0)


def test_a_repeated_run_is_bit_equal():
    case = {"mode": "single", "micro": 4, "pack": True}
    assert run_distributed_test(run_steps, 1, case) == run_distributed_test(run_steps, 1, case)
