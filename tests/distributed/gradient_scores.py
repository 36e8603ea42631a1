"""Gradient scores of a few samples on either engine in some layout, after a few steps of Adam."""

from dataclasses import replace

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from dataflex_mega.config.megatron import MegatronArguments
from dataflex_mega.data.collate import collate
from dataflex_mega.data.loader import BatchPartition
from dataflex_mega.data.pool import Sample
from dataflex_mega.distributed.collectives import TorchCollectives
from dataflex_mega.distributed.parallel_info import init_distributed
from dataflex_mega.engines.fsdp.engine import FSDPEngine
from dataflex_mega.engines.fsdp.parallel import FSDPLayout, parallelize, unwrap
from dataflex_mega.engines.fsdp.runner import FSDPModelRunner
from dataflex_mega.engines.named_init import NamedInit, reinitialise
from dataflex_mega.engines.options import StepOptions
from tests.unit.engines.megatron import small

LR, BETAS, EPS, SEED, STEPS = 1e-2, (0.8, 0.95), 1e-7, 5, 3


def samples(seed, count):
    rng = np.random.default_rng(seed)
    samples_list = []
    for i in range(count):
        ids = rng.integers(3, 53, int(rng.integers(5, 30)))
        labels = ids.copy()
        labels[: int(rng.integers(0, 4))] = -100
        samples_list.append(Sample(100 * seed + i, i % 2, ids, labels))
    return samples_list


def constant(optimizer):
    return torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)


def fsdp_engine(parallel_info, name, mode, **options):
    hf = AutoModelForCausalLM.from_config(small.configs()[name])
    reinitialise(hf, SEED)
    layout = FSDPLayout(mode)
    module = parallelize(hf, layout, parallel_info)
    optimizer = torch.optim.AdamW(unwrap(module).parameters(), lr=LR, betas=BETAS, eps=EPS, weight_decay=0.0)
    return FSDPEngine(
        FSDPModelRunner(module, layout, parallel_info),
        optimizer,
        constant(optimizer),
        StepOptions(2, max_grad_norm=1.0, **options),
    )


def megatron_engine(parallel_info, name, keys, rows=2, **options):
    """`keys`: as in a YAML. `options`: further ones of a step."""
    from dataflex_mega.engines.megatron import cpu, process_groups, weights
    from dataflex_mega.engines.megatron.build import build_chunks, build_engine
    from dataflex_mega.engines.megatron.decoder_config import DecoderConfig
    from dataflex_mega.engines.megatron.layout import read_layout
    from dataflex_mega.engines.megatron.settings import TrainingSettings, build_settings

    config = small.configs()[name]
    arguments = replace(MegatronArguments(), **keys)
    layout = read_layout(arguments, parallel_info.world_size)
    shape = DecoderConfig.from_hf_config(config, 8 * layout.tensor)
    with cpu.cuda_calls_on_cpu():
        settings = build_settings(arguments, layout, shape, TrainingSettings("adam", LR, 0.0, BETAS, EPS, 1.0, "fp32"))
        parallel_info = process_groups.init_model_parallel(parallel_info, layout)
        chunks = build_chunks(shape, settings, 1)
        weights.load(chunks, config, NamedInit(config, SEED))
        step_options = StepOptions(2, max_grad_norm=1.0, **options)
        return build_engine(chunks, settings, layout, parallel_info, step_options, constant, rows, lambda *_: None)


def make_micro_batches(parallel_info, samples_list, rows, pack=None):
    """This rank's micro-batches of samples that are shared out by data-parallel rank."""
    partition = BatchPartition(
        parallel_info.dp_rank, parallel_info.dp_size, rows, len(samples_list) // parallel_info.dp_size // rows
    )
    return [
        collate([samples_list[i] for i in ids], 0, pack)
        for ids in partition.local_micro_batches(np.arange(len(samples_list)))
    ]


def scored(parallel_info, case):
    """([8, 2] inner products, [8] squared norms) of all candidates, the change that scoring made, later gradient norms, and
    the [2, 2] inner products of the groups' mean gradients."""
    build = megatron_engine if "keys" in case else fsdp_engine
    engine = build(parallel_info, case["model"], case.get("keys", case.get("mode")), **case.get("options", {}))
    parallel_info, rows = engine.parallel_info, case.get("rows", 2)
    for step in range(STEPS):
        engine.train_step(make_micro_batches(parallel_info, samples(step, 8), rows), None)
    before = state_of(engine)
    scorer = engine.gradient_scorer(case.get("adam", True))
    groups = [
        make_micro_batches(parallel_info, samples(7, 8), 8 // parallel_info.dp_size),
        make_micro_batches(parallel_info, samples(8, 4), 1, case.get("pack")),
    ]
    directions = scorer.directions(groups)
    local_scores = [
        scorer.score(b, directions)
        for b in make_micro_batches(parallel_info, samples(9, 8), 8 // parallel_info.dp_size, case.get("pack"))
    ]
    dot, norm2 = (torch.cat(parts) for parts in zip(*local_scores, strict=True))
    gram = engine.gradient_gram(groups)
    after = state_of(engine)
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    later = [engine.train_step(make_micro_batches(parallel_info, samples(10, 8), rows), None).grad_norm]
    collectives = engine.collectives
    return collectives.all_gather(dot), collectives.all_gather(norm2), changed, later, gram


def state_of(engine):
    """Every tensor of parameters, optimizer and random state, copied."""
    tensors = {"random": torch.get_rng_state()}
    modules = getattr(engine.runner, "model_chunks", None) or [engine.model]
    optimizers = [p.optimizer for p in getattr(engine.optimizer, "chained_optimizers", [])] or [engine.optimizer]
    for number, module in enumerate(modules):
        for name, parameter in module.named_parameters():
            tensors[f"{number}/{name}"] = local(parameter.detach())
            assert parameter.requires_grad
        assert all(m.training for m in module.modules())
    for number, optimizer in enumerate(optimizers):
        for index, state in enumerate(optimizer.state.values()):
            for name, value in state.items():
                tensors[f"{number}/{index}/{name}"] = local(torch.as_tensor(value))
    return tensors


def local(tensor):
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).clone()


def scored_on_all(case):
    """What each rank found, as plain values; called in every process."""
    parallel_info = init_distributed()
    dot, norm2, changed, later, gram = scored(parallel_info, case)
    return TorchCollectives(parallel_info).all_gather_objects(
        (dot.tolist(), norm2.tolist(), changed, later, gram.tolist())
    )
