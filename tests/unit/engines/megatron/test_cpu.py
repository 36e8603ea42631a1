"""Which questions for CUDA are answered with the CPU, only while `redirected` is entered and only where there is no CUDA."""

import inspect

import pytest
import torch
from megatron.core.tensor_parallel import random as rng
from megatron.core.transformer.moe import moe_utils

from dataflex_mega.engines.megatron import cpu

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA nothing is redirected")


@pytest.fixture
def redirected():
    with cpu.cuda_calls_on_cpu():
        yield


# What megatron-core calls, written as it writes it.
COVERED = {
    "torch.cuda.current_device": lambda: torch.cuda.current_device() == CPU,
    "torch.cuda.synchronize": lambda: torch.cuda.synchronize() is None,
    "torch.cuda.empty_cache": lambda: torch.cuda.empty_cache() is None,
    "torch.cuda.get_rng_state": lambda: torch.equal(torch.cuda.get_rng_state(), torch.get_rng_state()),
    "Tensor.cuda": lambda: torch.ones(2).cuda().device == CPU,
    "Tensor.to(device)": lambda: (
        torch.ones(2).to("cuda").device == torch.ones(2).to(torch.device("cuda", 0)).device == CPU
    ),
    "factory on the current device": lambda: torch.empty(2, device=torch.cuda.current_device()).device == CPU,
    "factory on cuda": lambda: torch.tensor([0.0], dtype=torch.float, device="cuda").device == CPU,
    "factory on cuda:1": lambda: torch.zeros(1, device=torch.device("cuda:1")).device == CPU,
    "factory in pinned memory": lambda: torch.tensor([0], pin_memory=True).device == CPU,
    "Tensor.type": lambda: torch.ones(1).type() == "torch.cuda.FloatTensor",
    "_get_cuda_rng_state": lambda: torch.equal(rng._get_cuda_rng_state(), torch.get_rng_state()),
    "te_general_gemm": lambda: hasattr(moe_utils, "te_general_gemm"),
}


@pytest.mark.parametrize("name", COVERED)
def test_covered(redirected, name):
    assert COVERED[name]()


@pytest.mark.parametrize("name", ["torch.cuda.current_device", "Tensor.cuda", "factory on cuda", "Tensor.to(device)"])
def test_outside_it_is_as_without_cuda(name):
    with pytest.raises((RuntimeError, AssertionError)):
        COVERED[name]()
    assert torch.ones(1).type() == "torch.FloatTensor"


def test_random_states_are_torchs(redirected):
    torch.cuda.manual_seed(5)
    first, state = torch.rand(3), rng._get_cuda_rng_state()
    rng._set_cuda_rng_state(state)
    again = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), first)
    assert torch.equal(torch.rand(3), again)


def test_named_random_states_of_megatron_core_work_on_a_cpu(redirected):
    tracker = rng.CudaRNGStatesTracker()
    tracker.add("mine", 7)
    with tracker.fork("mine"):
        inside = torch.rand(2)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(2), inside)


def test_entered_within_itself_and_left_everything_is_as_before():
    before = (torch.cuda.current_device, torch.cuda.synchronize, rng._get_cuda_rng_state)
    with cpu.cuda_calls_on_cpu():
        with cpu.cuda_calls_on_cpu():
            assert torch.cuda.current_device() == CPU
        assert torch.cuda.current_device() == CPU
    assert (torch.cuda.current_device, torch.cuda.synchronize, rng._get_cuda_rng_state) == before


def test_with_cuda_nothing_is_replaced(monkeypatch):
    before = torch.cuda.current_device
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with cpu.cuda_calls_on_cpu():
        assert torch.cuda.current_device is before


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("megatron.core.tensor_parallel.layers", "torch.cuda.current_device()"),
        ("megatron.core.tensor_parallel.random", "torch.cuda.get_rng_state"),
        ("megatron.core.optimizer.distrib_optimizer", "torch.cuda.FloatTensor"),
        ("megatron.core.optimizer.optimizer", "device='cuda'"),
        ("megatron.core.pipeline_parallel.p2p_communication", "torch.cuda.synchronize()"),
    ],
)
def test_megatron_core_still_asks_these_questions(place, words):
    """When a new version stops asking, its answer can go from cpu.py."""
    module = __import__(place, fromlist=["_"])
    assert words in inspect.getsource(module).replace('"', "'").replace("'cuda'", "'cuda'")
