"""Gradient scores and Gram matrices are equal on both engines, in every layout, on 1, 2 and 4 processes."""

import pytest
import torch

from tests.distributed.gradient_scores import scored_on_all
from tests.support import runs

pytest.importorskip("megatron.core")
TP, PP = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
SP, VPP = {"sequence_parallel": True}, {"virtual_pipeline_model_parallel_size": 2}
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
SHARDED, EP = {"use_distributed_optimizer": True, "overlap_grad_reduce": True}, {"expert_model_parallel_size": 2}
ONE, DENSE, EXPERTS = "llama-tied", "qwen3", "mixtral"

# (model, processes, name) -> the case; each is compared with the first of its model
CASES = {
    (ONE, 1, "one process"): {"mode": "single", "rows": 8},
    (ONE, 1, "Megatron"): {"keys": {}},
    (ONE, 1, "Megatron, packed rows"): {"keys": {}, "pack": 64},
    (ONE, 2, "FSDP2"): {"mode": "fsdp2"},
    (ONE, 2, "TP2"): {"keys": TP},
    (ONE, 2, "TP2 + SP"): {"keys": {**TP, **SP}},
    (ONE, 2, "PP2, everything recomputed"): {"keys": {**PP, **RECOMPUTE}},
    (ONE, 2, "PP2 x VPP2"): {"keys": {**PP, **VPP}},
    (ONE, 2, "DP2, sharded optimizer"): {"keys": SHARDED},
    (ONE, 4, "FSDP2"): {"mode": "fsdp2"},
    (ONE, 4, "TP2 x PP2 + SP"): {"keys": {**TP, **SP, **PP}},
    (ONE, 4, "PP2 x DP2, sharded optimizer"): {"keys": {**PP, **SHARDED}},
    (DENSE, 1, "one process"): {"mode": "single", "rows": 8, "adam": False},
    (DENSE, 4, "TP2 x PP2"): {"keys": {**TP, **PP}, "adam": False},
    (EXPERTS, 1, "one process"): {"mode": "single", "rows": 8},
    (EXPERTS, 2, "FSDP2"): {"mode": "fsdp2"},
    (EXPERTS, 2, "EP2"): {"keys": {**EP, **SHARDED}},
    (EXPERTS, 2, "TP2 + SP x EP2"): {"keys": {**TP, **SP, **EP}},
}  # fmt: skip


@pytest.fixture(scope="module")
def results():
    """Case -> what each rank found."""
    results = {}
    for world in (1, 2, 4):
        keys = [key for key in CASES if key[1] == world]
        cases = [{"model": key[0], **CASES[key]} for key in keys]
        results.update(zip(keys, runs.train_many(world, cases, scored_on_all), strict=True))
    return results


@pytest.mark.parametrize("key", CASES, ids=lambda key: f"{key[0]} {key[2]} on {key[1]}")
def test_every_layout_gives_the_scores_of_one_process(results, key):
    dot, norm2 = map(torch.tensor, results[key[0], 1, "one process"][0][:2])
    assert norm2.min() > 0 and (dot[:, 0] - dot[:, 1]).abs().max() > 0.1 * dot.abs().max(), "two unlike directions"
    for rank_dot, rank_norm2, *_ in results[key]:
        torch.testing.assert_close(torch.tensor(rank_norm2), norm2, rtol=2e-5, atol=0)
        torch.testing.assert_close(torch.tensor(rank_dot), dot, rtol=0, atol=1e-4 * float(dot.abs().max()))


@pytest.mark.parametrize("key", CASES, ids=lambda key: f"{key[0]} {key[2]} on {key[1]}")
def test_every_layout_gives_the_products_of_gradients_of_one_process(results, key):
    """Of all parameters, embeddings and norms too, each counted once."""
    gram = torch.tensor(results[key[0], 1, "one process"][0][4], dtype=torch.float64)
    lengths = gram.diagonal().sqrt()
    assert 1e-3 < gram[0, 1].abs() / lengths.prod() < 0.9, "two unlike gradients"
    for *_, other in results[key]:
        apart = (torch.tensor(other, dtype=torch.float64) - gram).abs() / torch.outer(lengths, lengths)
        assert apart.max() < 2e-5


@pytest.mark.parametrize("key", CASES, ids=lambda key: f"{key[0]} {key[2]} on {key[1]}")
def test_scoring_changes_no_bit_and_training_goes_on_as_before(results, key):
    expected = results[key[0], 1, "one process"][0][3]
    for _, _, changed, later, _ in results[key]:
        assert changed == []
        assert later == pytest.approx(expected, rel=1e-4)
