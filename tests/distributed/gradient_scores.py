"""Gradient scores of a few samples on either engine in some layout, after a few steps of Adam: what ranks compare."""

from dataclasses import replace

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from dataflex_mega.config.megatron import MegatronArguments
from dataflex_mega.data.collate import collate
from dataflex_mega.data.loader import Split
from dataflex_mega.data.pool import Sample
from dataflex_mega.distributed import mesh as meshes
from dataflex_mega.distributed.collectives import Collectives
from dataflex_mega.engines.fsdp.engine import FSDPEngine
from dataflex_mega.engines.fsdp.gradients import GradientScorer
from dataflex_mega.engines.fsdp.parallel import Layout as FSDPLayout
from dataflex_mega.engines.fsdp.parallel import parallelize, unwrap
from dataflex_mega.engines.named_init import NamedInit, reinitialise
from dataflex_mega.engines.options import Options
from tests.unit.engines.megatron import small

LR, BETAS, EPS, SEED, STEPS = 1e-2, (0.8, 0.95), 1e-7, 5, 3


def samples(seed, count):
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        ids = rng.integers(3, 53, int(rng.integers(5, 30)))
        labels = ids.copy()
        labels[: int(rng.integers(0, 4))] = -100
        made.append(Sample(100 * seed + i, i % 2, ids, labels))
    return made


def constant(optimizer):
    return torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)


def fsdp_engine(mesh, name, mode):
    hf = AutoModelForCausalLM.from_config(small.configs()[name])
    reinitialise(hf, SEED)
    layout = FSDPLayout(mode)
    module = parallelize(hf, layout, mesh)
    optimizer = torch.optim.AdamW(unwrap(module).parameters(), lr=LR, betas=BETAS, eps=EPS, weight_decay=0.0)
    return FSDPEngine(module, optimizer, constant(optimizer), mesh, layout, Options(2, max_grad_norm=1.0))


def megatron_engine(mesh, name, keys, rows=2):
    """`keys`: as in a YAML."""
    from dataflex_mega.engines.megatron import cpu, weights
    from dataflex_mega.engines.megatron import process_groups as processes
    from dataflex_mega.engines.megatron.build import assemble, chunks_of
    from dataflex_mega.engines.megatron.layout import read_layout
    from dataflex_mega.engines.megatron.settings import Training, settings
    from dataflex_mega.engines.megatron.shape import Shape

    config = small.configs()[name]
    given = replace(MegatronArguments(), **keys)
    layout = read_layout(given, mesh.world)
    shape = Shape.of(config, 8 * layout.tensor)
    with cpu.redirected():
        made = settings(given, layout, shape, Training("adam", LR, 0.0, BETAS, EPS, 1.0, "fp32"))
        mesh = processes.start(mesh, layout)
        chunks = chunks_of(shape, made, 1)
        weights.load(chunks, config, NamedInit(config, SEED))
        return assemble(chunks, made, layout, mesh, Options(2, max_grad_norm=1.0), constant, rows, lambda *_: None)


def megatron_scorer(engine, adam):
    from dataflex_mega.engines.megatron.gradients import GradientScorer as MegatronScorer

    return MegatronScorer(engine, adam)


def micros(mesh, made, rows, pack=None):
    """This rank's micro-batches of samples that are shared out by data-parallel rank."""
    split = Split(mesh.dp_rank, mesh.dp_size, rows, len(made) // mesh.dp_size // rows)
    return [collate([made[i] for i in ids], 0, pack) for ids in split.share(np.arange(len(made)))]


def scored(mesh, case):
    """([8, 2] inner products, [8] squared norms) of all candidates, the change that scoring made, later gradient norms, and
    the [2, 2] inner products of the groups' mean gradients."""
    build = megatron_engine if "keys" in case else fsdp_engine
    engine = build(mesh, case["model"], case.get("keys", case.get("mode")))
    mesh, rows = engine.mesh, case.get("rows", 2)
    for step in range(STEPS):
        engine.train_step(micros(mesh, samples(step, 8), rows), None)
    before = state_of(engine)
    scorer = (megatron_scorer if "keys" in case else GradientScorer)(engine, case.get("adam", True))
    groups = [micros(mesh, samples(7, 8), 8 // mesh.dp_size), micros(mesh, samples(8, 4), 1, case.get("pack"))]
    directions = scorer.directions(groups)
    mine = [scorer.score(b, directions) for b in micros(mesh, samples(9, 8), 8 // mesh.dp_size, case.get("pack"))]
    dot, norm2 = (torch.cat(parts) for parts in zip(*mine, strict=True))
    gram = engine.gradient_gram(groups)
    after = state_of(engine)
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    later = [engine.train_step(micros(mesh, samples(10, 8), rows), None).grad_norm]
    ranks = engine.collectives
    return ranks.gather(dot), ranks.gather(norm2), changed, later, gram


def state_of(engine):
    """Every tensor of parameters, optimizer and random state, copied."""
    found = {"random": torch.get_rng_state()}
    modules = getattr(engine, "chunks", None) or [engine.model]
    optimizers = [p.optimizer for p in getattr(engine.optimizer, "chained_optimizers", [])] or [engine.optimizer]
    for number, module in enumerate(modules):
        for name, parameter in module.named_parameters():
            found[f"{number}/{name}"] = local(parameter.detach())
            assert parameter.requires_grad
        assert all(m.training for m in module.modules())
    for number, optimizer in enumerate(optimizers):
        for place, state in enumerate(optimizer.state.values()):
            for name, value in state.items():
                found[f"{number}/{place}/{name}"] = local(torch.as_tensor(value))
    return found


def local(tensor):
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).clone()


def scored_on_all(case):
    """What each rank found, as plain values; called in every process."""
    mesh = meshes.start()
    dot, norm2, changed, later, gram = scored(mesh, case)
    return Collectives(mesh).gather_objects((dot.tolist(), norm2.tolist(), changed, later, gram.tolist()))
