"""Values of single samples from their logits are the same on both engines, in every layout, packed or not."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from dataflex_mega import objective
from dataflex_mega.distributed.parallel_info import init_distributed
from dataflex_mega.engines.named_init import reinitialise
from dataflex_mega.types import IGNORE_INDEX
from tests.distributed import gradient_scores
from tests.support import runs
from tests.unit.engines.megatron import small

pytest.importorskip("megatron.core")
TP, PP, CP = ({f"{name}_parallel_size": 2} for name in ("tensor_model", "pipeline_model", "context"))
SP, VPP = {"sequence_parallel": True}, {"virtual_pipeline_model_parallel_size": 2}
EP = {"expert_model_parallel_size": 2}
DENSE, EXPERTS = "llama-tied", "mixtral"
CASES = {
    (DENSE, 1, "one process"): {"mode": "single"},
    (DENSE, 1, "one process, packed rows"): {"mode": "single", "pack": 64},
    (DENSE, 1, "Megatron"): {"keys": {}, "pack": 64},
    (DENSE, 2, "DDP"): {"mode": "ddp"},
    (DENSE, 2, "FSDP2"): {"mode": "fsdp2", "pack": 64},
    (DENSE, 2, "TP2"): {"keys": TP},
    (DENSE, 2, "TP2 + SP, packed rows"): {"keys": {**TP, **SP}, "pack": 64},
    (DENSE, 2, "PP2"): {"keys": PP},
    (DENSE, 2, "PP2 x VPP2, packed rows"): {"keys": {**PP, **VPP}, "pack": 64},
    (DENSE, 2, "DP2"): {"keys": {"use_distributed_optimizer": True}},
    (DENSE, 2, "CP2, packed rows"): {"keys": CP, "pack": 64},
    (EXPERTS, 2, "EP2"): {"keys": EP},
}
SAMPLES = gradient_scores.samples(3, 8)


def entropy_and_length(logits, labels):
    """Entropy of the token after the last one, the number of positions, and the sum of the losses."""
    loss = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
    return torch.stack(
        [torch.distributions.Categorical(logits=logits[-1]).entropy(), logits.new_tensor(len(logits)), loss]
    )


def values_on_all(case):
    """What each rank sees: [8, 3] values and [8, 1] entropies of all samples, [8] losses twice, the mode afterwards."""
    build = gradient_scores.megatron_engine if "keys" in case else gradient_scores.fsdp_engine
    engine = build(init_distributed(), case["model"], case.get("keys", case.get("mode")))
    rows = len(SAMPLES) // engine.parallel_info.dp_size
    (batch,) = gradient_scores.make_micro_batches(engine.parallel_info, SAMPLES, rows, case.get("pack"))
    tables = [
        engine.per_sample(batch, entropy_and_length),
        engine.per_sample(batch, lambda logits, labels: entropy_and_length(logits, labels)[0]),
        objective.sample_sums(engine.token_losses(batch), batch),
        engine.sample_losses(batch).loss_sum,
    ]
    gathered = [engine.collectives.all_gather(table).tolist() for table in tables]
    return engine.collectives.all_gather_objects((*gathered, engine.model.training))


@pytest.fixture(scope="module")
def results():
    """Case -> what each rank returned."""
    found = {}
    for world in (1, 2):
        keys = [key for key in CASES if key[1] == world]
        cases = [{"model": key[0], **CASES[key]} for key in keys]
        found.update(zip(keys, runs.train_many(world, cases, values_on_all), strict=True))
    return found


def by_hand(name):
    """[8, 3]: every sample alone through the Hugging Face model."""
    model = AutoModelForCausalLM.from_config(small.configs()[name]).eval()
    reinitialise(model, gradient_scores.SEED)
    rows = []
    for sample in SAMPLES:
        ids, labels = torch.from_numpy(sample.input_ids), torch.from_numpy(sample.labels)
        labels = torch.cat([labels[1:], labels.new_tensor([IGNORE_INDEX])])
        with torch.no_grad():
            rows.append(entropy_and_length(model(ids.unsqueeze(0)).logits[0].float(), labels))
    return torch.stack(rows)


@pytest.mark.parametrize("key", CASES, ids=lambda key: f"{key[0]} {key[2]} on {key[1]}")
def test_every_layout_gives_the_values_of_each_sample_alone(results, key):
    expected = by_hand(key[0])
    assert expected[:, 0].std() > 1e-3, "entropies that differ"
    for values, entropy, sums, losses, training in results[key]:
        torch.testing.assert_close(torch.tensor(values), expected, rtol=2e-5, atol=1e-5)
        torch.testing.assert_close(torch.tensor(entropy), expected[:, :1], rtol=2e-5, atol=1e-5)
        for found in (sums, losses):
            torch.testing.assert_close(torch.tensor(found), expected[:, 2], rtol=2e-5, atol=1e-5)
        assert training
