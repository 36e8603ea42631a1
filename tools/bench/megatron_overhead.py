"""Cost of a step against megatron-core's own loop, and cost of the roles, as paired ratios in one set of processes.

Five loops of one model on one data set take their steps in turn, in an order that changes each round and is the same on
every rank: a bare loop (below: megatron-core's schedule, gradient buckets, `finalize_model_grads` and optimizer, with
the data loader of dataflex_mega), dataflex_mega without a role, and with ODM re-mixing at every step, loss weighting,
and both. Ratios are taken within each round; the median over rounds is printed with its quartiles. The budget of each
is 1.01.

    make demo-data
    python tools/bench/megatron_overhead.py --rounds 60
    torchrun --nproc_per_node 2 tools/bench/megatron_overhead.py --pipeline 2 --rounds 60

On a GPU, `--bf16` and `--model FOLDER` measure another model; tokens per second and, with `--peak-tflops`, the
model-FLOPs utilisation are printed too.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROLES: dict[str, dict[str, Any]] = {
    "none": {},
    "mix": {"mixer": "odm", "update_step": 1, "update_times": -1},
    "weight": {"weighter": "loss"},
    "mix+weight": {"mixer": "odm", "update_step": 1, "update_times": -1, "weighter": "loss"},
}


class BareLoop:
    """megatron-core's pre-training loop with nothing around it. `chunks` are bare and filled.

    Its learning rate is constant. It follows Megatron-LM's train_step with --calculate-per-token-loss: gradients are sums
    over target tokens, divided by their number in `finalize_model_grads`; the loss is reduced from the last stage to all.
    """

    def __init__(self, chunks: Sequence[Any], ddp_config: Any, optimizer_config: Any) -> None:
        from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
        from megatron.core.optimizer import get_megatron_optimizer
        from megatron.core.pipeline_parallel import get_forward_backward_func
        from megatron.core.transformer.module import Float16Module

        self.config = chunks[0].config
        self.config.finalize_model_grads_func = finalize_model_grads
        mixed = self.config.bf16 or self.config.fp16
        inner = [Float16Module(self.config, chunk) if mixed else chunk for chunk in chunks]
        self.chunks: list[Any] = [
            DistributedDataParallel(self.config, ddp_config, chunk, disable_bucketing=number > 0)
            for number, chunk in enumerate(inner)
        ]
        self.optimizer: Any = get_megatron_optimizer(optimizer_config, self.chunks)
        self.config.grad_scale_func = self.optimizer.scale_loss
        self.schedule: Any = get_forward_backward_func()

    def step(self, micro_batches: Sequence[dict[str, Tensor]]) -> tuple[float, float]:
        """Micro-batches of input_ids, labels, position_ids [b, S] -> (mean token loss, gradient norm before clipping)."""
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        sources = [iter(micro_batches) for _ in self.chunks]
        reports = self.schedule(
            forward_step_func=forward_step,
            data_iterator=sources if len(sources) > 1 else sources[0],
            model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
            num_microbatches=len(micro_batches),
            seq_length=micro_batches[0]["input_ids"].shape[1],
            micro_batch_size=len(micro_batches[0]["input_ids"]),
            forward_only=False,
        )
        _, grad_norm, _ = self.optimizer.step()
        return self._mean_loss(reports), float(grad_norm)

    @staticmethod
    def _mean_loss(reports: Sequence[dict[str, Tensor]]) -> float:
        from megatron.core import parallel_state

        device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
        sums = torch.stack([report["sums"] for report in reports]).sum(0) if reports else torch.zeros(2, device=device)
        torch.distributed.all_reduce(sums, group=parallel_state.get_data_parallel_group())
        torch.distributed.all_reduce(sums, group=parallel_state.get_pipeline_model_parallel_group())
        total, count = sums.tolist()
        return total / count


def forward_step(source: Iterator[dict[str, Tensor]], model: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """Called by megatron-core's schedules for each micro-batch and chunk."""
    batch = next(source)
    losses = model(batch["input_ids"], batch["position_ids"], None, labels=batch["labels"].clamp(min=0))
    return losses, partial(loss_of, batch["labels"])


def loss_of(labels: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """[b, S] token losses -> (their sum, the number of target tokens, both for the report)."""
    mask = labels >= 0
    total, count = (losses.float() * mask).sum(), mask.sum()
    return total, count.int(), {"sums": torch.stack([total.detach(), count.float()])}


# -- measurement ---------------------------------------------------------------------------------------------------------


def keys_of(options: argparse.Namespace, output: Path) -> dict[str, Any]:
    """A pre-training run on the demo's four domains."""
    return {
        "engine": "megatron",
        "tensor_model_parallel_size": options.tensor,
        "pipeline_model_parallel_size": options.pipeline,
        "sequence_parallel": options.tensor > 1,
        "use_distributed_optimizer": True,
        "model_name_or_path": str(options.model or options.demo / "model"),
        "train_from_scratch": True,
        "stage": "pt",
        "do_train": True,
        "dataset_dir": str(options.demo / "data"),
        "dataset": "demo_c4,demo_wiki,demo_alpaca_text,demo_python",
        "cutoff_len": options.length,
        "finetuning_type": "full",
        "output_dir": str(output),
        "max_steps": 1_000_000,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": options.micro,
        "gradient_accumulation_steps": options.accumulation,
        "learning_rate": 1.0e-4,
        "bf16": options.bf16,
        "logging_steps": 1_000_000,
        "save_strategy": "no",
        "disable_gradient_checkpointing": True,
        "disable_tqdm": True,
    }


def our_trainer(keys: dict[str, Any], roles: dict[str, Any]) -> tuple[Any, Any]:
    """(trainer, state) before the first step."""
    from dataflex_mega.config.parse import parse_config
    from dataflex_mega.llamafactory.args import argument_types
    from dataflex_mega.run.build import build
    from dataflex_mega.types import TrainState

    train_type = "dynamic" if roles else "static"
    _, trainer = build(
        parse_config({**keys, **roles, "train_type": train_type, "tensorboard": False}, argument_types())
    )
    return trainer, TrainState(0, trainer.controller.initial_plan())


def bare_step(keys: dict[str, Any]) -> Callable[[], Any]:
    """A step of the bare loop on the model, the layout and the data that `keys` describe."""
    from dataflex_mega.config.parse import parse_config
    from dataflex_mega.data.loader import Loader
    from dataflex_mega.engines.megatron import cpu
    from dataflex_mega.engines.megatron.build import build_chunks
    from dataflex_mega.llamafactory.args import argument_types
    from dataflex_mega.run.build import prepare

    run = prepare(parse_config({**keys, "train_type": "static", "tensorboard": False}, argument_types()))
    builder: Any = run.session.engine_builder
    with cpu.cuda_calls_on_cpu():
        chunks = build_chunks(builder.decoder, builder.settings, run.session.args.training.seed)
        builder.fill(chunks)
        loop = BareLoop(chunks, builder.settings.ddp, builder.settings.optimizer)
    schedule, prefetch = run.schedule, run.session.config.dataflex.prefetch
    loader = Loader(run.data.pool, schedule.sampler, schedule.partition, run.data.collate, prefetch, 1)
    plan = schedule.sampler.next_plan(None, 0, schedule.domains.initial_proportions)
    numbers = itertools.count()

    def step() -> tuple[float, float]:
        micro_batches = loader.micro_batches(plan, next(numbers), schedule.max_steps)
        with cpu.cuda_calls_on_cpu():
            return loop.step([batch.to(run.session.parallel_info.device).tensors() for batch in micro_batches])

    return step


def time_call(work: Callable[[], Any]) -> float:
    """Seconds of a call, from all ranks' start to this rank's end."""
    torch.distributed.barrier()
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def show(options: argparse.Namespace, spent: dict[str, list[float]], pairs: Sequence[tuple[str, str]]) -> None:
    """Print a line for each ratio."""
    print(f"\nTP{options.tensor} x PP{options.pipeline}, {options.rounds} rounds")
    print(f"{'':30}{'median':>9}{'quartiles':>20}{'budget':>9}")
    for above, below in pairs:
        values = [a / b for a, b in zip(spent[above], spent[below], strict=True)]
        low, middle, high = statistics.quantiles(values, n=4)
        print(f"{f'{above} / {below}':30}{middle:9.4f}{f'{low:.4f} - {high:.4f}':>20}{1.01:9.2f}")


def throughput(options: argparse.Namespace, seconds: float, engine: Any) -> None:
    """Print the tokens per second without a role, and on one process the model-FLOPs utilisation if the peak is given."""
    tokens = options.micro * options.accumulation * options.length * engine.parallel_info.dp_size
    print(f"\nnone: {seconds * 1000:.1f} ms per step of {tokens} tokens, {tokens / seconds:,.0f} tokens/s")
    if engine.parallel_info.world_size > 1:
        return
    # 6 operations per parameter and token, and attention's two products: 12 x layers x hidden x length a token, halved by
    # causality, which leaves 6.
    config, chunks = engine.runner.config, engine.runner.model_chunks
    size = sum(p.numel() for chunk in chunks for p in chunk.parameters())
    operations = (6 * size + 6 * config.num_layers * config.hidden_size * options.length) * tokens
    print(f"{size / 1e6:.0f}M parameters, {operations / seconds / 1e12:.2f} TFLOP/s")
    if options.peak_tflops:
        print(f"{operations / seconds / 1e12 / options.peak_tflops:.1%} of {options.peak_tflops:g} TFLOP/s")


def compare(options: argparse.Namespace, folder: Path) -> None:
    """Time all loops in turn and print their ratios."""
    steps: dict[str, Callable[[], Any]] = {}
    engine = None
    for name in options.loops.split(","):
        keys = keys_of(options, folder / name.replace("+", "-"))
        if name == "bare":
            steps[name] = bare_step(keys)
            continue
        trainer, state = our_trainer(keys, ROLES[name])
        steps[name] = partial(trainer.step, state)
        engine = engine or trainer.engine
    for step in steps.values():
        for _ in range(3):
            step()
    order, spent = list(steps), {name: [] for name in steps}
    for number in range(options.rounds):
        random.Random(number).shuffle(order)
        for name in order:
            spent[name].append(time_call(steps[name]))
    if torch.distributed.get_rank() == 0:
        pairs = [(name, "bare" if name == "none" else "none") for name in steps if name != "bare"]
        show(options, spent, [(above, below) for above, below in pairs if below in spent])
        if "none" in spent:
            throughput(options, statistics.median(spent["none"]), engine)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=ROOT / ".demo", help="folder with data/ and model/ (.demo)")
    parser.add_argument("--model", type=Path, help="a folder with another config.json and tokenizer")
    parser.add_argument("--rounds", type=int, default=60, help="rounds (60)")
    parser.add_argument("--tensor", type=int, default=1, help="tensor_model_parallel_size (1)")
    parser.add_argument("--pipeline", type=int, default=1, help="pipeline_model_parallel_size (1)")
    parser.add_argument("--micro", type=int, default=4, help="samples per micro-batch (4)")
    parser.add_argument("--accumulation", type=int, default=2, help="micro-batches per step (2)")
    parser.add_argument("--length", type=int, default=256, help="tokens per sample (256)")
    parser.add_argument("--bf16", action="store_true", help="train in bf16")
    parser.add_argument("--peak-tflops", type=float, default=0.0, help="of the device, for its utilisation")
    parser.add_argument("--loops", default="bare,none,mix,weight,mix+weight", help="which of them")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    from dataflex_mega.distributed.parallel_info import init_distributed, shutdown_distributed

    parallel_info = init_distributed()
    with tempfile.TemporaryDirectory() as folder:  # every rank has its own; only the first writes
        compare(options, Path(folder))
        if parallel_info.world_size > 1:
            torch.distributed.barrier()
    shutdown_distributed(orderly=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
