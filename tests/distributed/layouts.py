"""What the distributed tests run in each process: a few steps of a tiny Llama in some layout."""

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dataflex_mega.data.collate import collate
from dataflex_mega.data.loader import Split
from dataflex_mega.data.pool import Sample
from dataflex_mega.distributed.collectives import Collectives
from dataflex_mega.engines.fsdp.engine import FSDPEngine, Options
from dataflex_mega.engines.fsdp.parallel import Layout, parallelize, unwrap

GLOBAL = 8


def tiny_llama(seed=0):
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )
    )  # fmt: skip


def build_engine(mesh, mode, lora=False, precision="fp32", **options):
    model = tiny_llama()
    if lora:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(1)
        model = get_peft_model(
            model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights="gaussian")
        )
    layout = Layout(mode, precision)
    module = parallelize(model, layout, mesh)
    trained = [p for p in unwrap(module).parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=20)
    return FSDPEngine(module, optimizer, scheduler, mesh, layout, Options(2, **options))


def samples_of(step, count=GLOBAL):
    rng = np.random.default_rng(step)
    made = []
    for i in range(count):
        ids = rng.integers(3, 128, int(rng.integers(5, 30)))
        labels = ids.copy()
        labels[: int(rng.integers(0, 4))] = -100
        made.append(Sample(100 * step + i, i % 2, ids, labels))
    return made


def micro_batches(mesh, step, micro, pack=False):
    made = samples_of(step)
    split = Split(mesh.dp_rank, mesh.dp_size, micro, GLOBAL // mesh.dp_size // micro)
    return [collate([made[i] for i in ids], 0, 64 if pack else None) for ids in split.share(np.arange(GLOBAL))]


def by_loss(mesh):
    """Weights that depend on the whole data-parallel batch."""
    ranks = Collectives(mesh)

    def weigh(obs):
        losses = ranks.gather(obs.loss)
        return ranks.own(torch.softmax(losses, 0) * len(losses), len(obs.sample_id))

    return weigh


def run_cases(mesh, cases):
    """Several cases in one set of processes."""
    return [run_steps(mesh, case) for case in cases]


def run_steps(mesh, case, steps=4):
    """Losses, norms and sums of a few steps."""
    engine = build_engine(mesh, case["mode"], case.get("lora", False), case.get("precision", "fp32"), lookahead="exact")
    weigh = by_loss(mesh) if case.get("weigh", True) else None
    found = []
    for step in range(steps):
        stats = engine.train_step(micro_batches(mesh, step, case["micro"], case.get("pack", False)), weigh)
        found.append(
            [stats.loss, stats.mean_loss, stats.grad_norm, *stats.domain_loss.tolist(), *stats.domain_tokens.tolist()]
        )
    return found
