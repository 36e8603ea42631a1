"""Run in each process by the distributed tests: a few steps of a tiny Llama in some layout."""

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dataflex_mega.data.collate import collate
from dataflex_mega.data.loader import BatchPartition
from dataflex_mega.data.pool import Sample
from dataflex_mega.distributed.collectives import TorchCollectives
from dataflex_mega.engines.fsdp.engine import FSDPEngine
from dataflex_mega.engines.fsdp.parallel import FSDPLayout, parallelize, unwrap
from dataflex_mega.engines.fsdp.runner import FSDPModelRunner
from dataflex_mega.engines.options import StepOptions

GLOBAL = 8


def tiny_llama(seed=0):
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )
    )  # fmt: skip


def build_engine(parallel_info, mode, lora=False, precision="fp32", **options):
    model = tiny_llama()
    if lora:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(1)
        model = get_peft_model(
            model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights="gaussian")
        )
    layout = FSDPLayout(mode, precision)
    module = parallelize(model, layout, parallel_info)
    trained = [p for p in unwrap(module).parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=20)
    return FSDPEngine(FSDPModelRunner(module, layout, parallel_info), optimizer, scheduler, StepOptions(2, **options))


def samples_of(step, count=GLOBAL):
    rng = np.random.default_rng(step)
    samples = []
    for i in range(count):
        ids = rng.integers(3, 128, int(rng.integers(5, 30)))
        labels = ids.copy()
        labels[: int(rng.integers(0, 4))] = -100
        samples.append(Sample(100 * step + i, i % 2, ids, labels))
    return samples


def micro_batches(parallel_info, step, micro, pack=False):
    samples = samples_of(step)
    partition = BatchPartition(
        parallel_info.dp_rank, parallel_info.dp_size, micro, GLOBAL // parallel_info.dp_size // micro
    )
    return [
        collate([samples[i] for i in ids], 0, 64 if pack else None)
        for ids in partition.local_micro_batches(np.arange(GLOBAL))
    ]


def by_loss(parallel_info):
    """Weights that depend on the whole data-parallel batch."""
    collectives = TorchCollectives(parallel_info)

    def weigh(samples):
        losses = collectives.all_gather(samples.loss)
        return collectives.local_rows(torch.softmax(losses, 0) * len(losses), len(samples.sample_ids))

    return weigh


def run_cases(parallel_info, cases):
    """Several cases in one set of processes."""
    return [run_steps(parallel_info, case) for case in cases]


def run_steps(parallel_info, case, steps=4):
    """Losses, norms and sums of a few steps."""
    engine = build_engine(
        parallel_info, case["mode"], case.get("lora", False), case.get("precision", "fp32"), weight_scope="step"
    )
    weigh = by_loss(parallel_info) if case.get("weigh", True) else None
    rows = []
    for step in range(steps):
        stats = engine.train_step(micro_batches(parallel_info, step, case["micro"], case.get("pack", False)), weigh)
        rows.append(
            [stats.loss, stats.mean_loss, stats.grad_norm, *stats.domain_loss.tolist(), *stats.domain_tokens.tolist()]
        )
    return rows
