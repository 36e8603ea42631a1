"""Where routers send tokens, counted in the training forward pass, against the router computed by hand."""

from __future__ import annotations

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from dataflex_mega.data.collate import collate
from dataflex_mega.distributed.parallel_info import init_distributed, shutdown_distributed
from dataflex_mega.errors import ConfigError, TrainingFault
from dataflex_mega.signals.router_load import RouterLoadCounter
from tests.distributed.layouts import samples_of, tiny_llama
from tests.unit.engines.test_domain_weights import engine_of

SIZES = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_experts_per_tok": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def alone():
    yield init_distributed()
    shutdown_distributed(orderly=True)


def model_of(kind):
    torch.manual_seed(0)
    if kind == "mixtral":
        return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4))
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SIZES, num_experts=4, moe_intermediate_size=16, head_dim=8, mlp_only_layers=[0])
    )


def by_hand(model, made):
    """[layers, 2, 4] from each sample alone: transformers' own router logits, the two largest of each token."""
    found = []
    with torch.no_grad():
        for sample in made:
            ids = torch.from_numpy(sample.input_ids).unsqueeze(0)
            logits = model(ids, output_router_logits=True).router_logits
            counts = torch.stack([torch.zeros_like(x).scatter(1, x.topk(2).indices, 1.0).sum(0) for x in logits])
            found.append((sample.domain_id, counts.double()))
    total = torch.zeros(len(found[0][1]), 2, 4, dtype=torch.float64)
    for domain, counts in found:
        total[:, domain] += counts
    return total


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize(
    ("micro", "pack", "weight_scope"), [(8, None, "micro_batch"), (2, None, "step"), (4, 64, "micro_batch")]
)
def test_counts_are_those_of_each_sample_alone(alone, kind, micro, pack, weight_scope):
    model, made = model_of(kind), samples_of(1)
    expected = by_hand(model, made)
    batches = [collate(made[i : i + micro], 0, pack) for i in range(0, len(made), micro)]
    weigh = (lambda samples: torch.ones(len(samples.sample_ids))) if weight_scope == "step" else None
    engine = engine_of(alone, model, count_router_loads=True, weight_scope=weight_scope)
    found = engine.train_step(batches, weigh).expert_load
    assert torch.equal(found, expected)
    assert float(found.sum()) == 2 * len(found) * sum(len(sample.input_ids) for sample in made)


def test_layers_computed_once_more_in_the_backward_pass_are_counted_once(alone):
    model, made = model_of("mixtral"), samples_of(1)
    expected = by_hand(model, made)
    model.gradient_checkpointing_enable()
    found = engine_of(alone, model, count_router_loads=True).train_step([collate(made, 0)], None).expert_load
    assert torch.equal(found, expected)


def test_they_are_counted_only_when_asked_for_and_only_of_experts(alone):
    assert engine_of(alone, model_of("mixtral")).train_step([collate(samples_of(1), 0)], None).expert_load is None
    with pytest.raises(ConfigError, match="needs a mixture of experts, and llama has no routers"):
        engine_of(alone, tiny_llama(), count_router_loads=True)


def test_a_router_that_saw_other_tokens_is_a_fault():
    with pytest.raises(TrainingFault, match="layer 0 saw 3 tokens, the batch has 2"):
        RouterLoadCounter(1, 2, 4, torch.device("cpu")).add(0, torch.ones(3, 4), torch.zeros(2, dtype=torch.long))
