"""Cost of a gradient score and of a row of the gradient store, as a ratio to a forward and backward pass of the batch.

Both are timed in turn on real text (the demo's), in one process and one thread; a ratio is taken in each round. The
budget is 1.2 for full models and 1.1 for LoRA, with one direction and Adam's moments.

    make demo-data && python tools/bench/gradients.py

On a GPU, `--precision bf16` (float32 weights under autocast) or `pure_bf16` and a larger model; the peak memory of a
score is then a ratio to that of a training step, and `--kernels triton,torch` compares the kernel with torch's
operations.

    python tools/bench/gradients.py --hidden 2048 --layers 22 --vocab 32000 --length 512 --batch 16 --precision bf16
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402


def real_batches(options: argparse.Namespace) -> list[Any]:
    """Batches of `length` tokens of the demo's text."""
    import json

    from transformers import AutoTokenizer

    from dataflex_mega.data.collate import collate
    from dataflex_mega.data.pool import Sample

    tokenizer = AutoTokenizer.from_pretrained(options.demo / "model")
    ids: list[int] = []
    for name in ("demo_c4", "demo_python"):
        for line in (options.demo / "data" / f"{name}.jsonl").read_text().splitlines()[:200]:
            ids += tokenizer.encode(json.loads(line)["text"])
    rows = torch.tensor(ids[: len(ids) // options.length * options.length]).view(-1, options.length).numpy()
    samples = [Sample(i, 0, row, row) for i, row in enumerate(rows)]
    return [collate(samples[i : i + options.batch], 0) for i in range(0, len(samples) - options.batch, options.batch)]


def build(options: argparse.Namespace, lora: bool) -> Any:
    """An engine with a random Llama of the given size, without optimizer steps yet."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from dataflex_mega.distributed.parallel_info import init_distributed
    from dataflex_mega.engines.fsdp.engine import FSDPEngine
    from dataflex_mega.engines.fsdp.parallel import FSDPLayout
    from dataflex_mega.engines.fsdp.runner import FSDPModelRunner
    from dataflex_mega.engines.options import StepOptions

    hidden, parallel_info = options.hidden, init_distributed()
    config = LlamaConfig(
        vocab_size=options.vocab, hidden_size=hidden, intermediate_size=hidden * 11 // 4,
        num_hidden_layers=options.layers, num_attention_heads=max(4, hidden // 64),
        num_key_value_heads=max(2, hidden // 512), tie_word_embeddings=False,
    )  # fmt: skip
    with parallel_info.device:
        model: Any = LlamaForCausalLM(config)
    if lora:
        from peft import LoraConfig, get_peft_model

        if options.precision != "fp32":
            model.to(torch.bfloat16)  # as LLaMA-Factory loads it; what LoRA adds stays float32
        model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
    elif options.precision == "pure_bf16":
        model.to(torch.bfloat16)
    model.to(parallel_info.device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    precision = "fp32" if options.precision == "fp32" else "bf16"
    runner = FSDPModelRunner(model, FSDPLayout("single", precision), parallel_info)
    return FSDPEngine(runner, optimizer, scheduler, StepOptions(1))


def time_call(work: Callable[[], Any]) -> float:
    """Seconds of a call."""
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_gib(work: Callable[[], Any]) -> float:
    """GiB allocated at most during a call, with everything allocated before it; NaN without a GPU."""
    if not torch.cuda.is_available():
        return float("nan")
    torch.cuda.reset_peak_memory_stats()
    work()
    return torch.cuda.max_memory_allocated() / 2**30


def plain_pass(engine: Any, batch: Any) -> None:
    """Forward and backward, as in training."""
    engine.runner.token_losses(batch.to(engine.runner.device)).sum().backward()
    engine.optimizer.zero_grad(set_to_none=True)


def measure(options: argparse.Namespace, lora: bool) -> Iterator[tuple[str, list[float], float]]:
    """(kind of score, its ratio to a plain pass in each round, its peak memory as a ratio to a training step's)."""
    from dataflex_mega.types import ProjectionSpec

    engine, batches = build(options, lora), real_batches(options)
    for batch in batches[:2]:
        engine.train_step([batch], None)
    step = peak_gib(lambda: engine.train_step([batches[2]], None))
    base = statistics.median([time_call(lambda: plain_pass(engine, batches[0])) for _ in range(5)])
    size = sum(p.numel() for p in engine.model.parameters())
    print(
        f"# {size / 1e6:.0f}M parameters, {base * 1000:.1f} ms per pass, {step:.1f} GiB per training step", flush=True
    )
    for kernel in options.kernels.split(","):
        for groups in (int(s) for s in options.directions.split(",")):
            os.environ["DATAFLEX_GRADIENT_KERNEL"] = kernel
            scorers = [engine.gradient_scorer(adam) for adam in (False, True)]
            if kernel != "auto":
                assert scorers[0].choice.uses_triton == (kernel == "triton")
            directions = scorers[0].directions([[batches[3 + g % 4]] for g in range(groups)])
            for scorer in scorers:
                name = f"{kernel} {'adam' if scorer.adam else 'sgd'}, S={groups}"
                yield name, *compare(options, engine, batches, lambda b, s=scorer, d=directions: s.score(b, d), step)
            del directions, scorers
    maker = engine.feature_maker(ProjectionSpec("two_sided", 16, 0), adam=True)
    yield "features of a store", *compare(options, engine, batches, lambda b: maker.features(b).bfloat16(), step)


def compare(
    options: argparse.Namespace, engine: Any, batches: list[Any], score: Callable[[Any], Any], step: float
) -> tuple[list[float], float]:
    """(ratio in each round, peak memory of a score / of a training step)."""
    ratios: list[float] = []
    for number in range(options.rounds + 1):
        batch = batches[number % len(batches)]
        base, spent = time_call(lambda b=batch: plain_pass(engine, b)), time_call(lambda b=batch: score(b))
        if number:  # the first round warms up
            ratios.append(spent / base)
    return ratios, peak_gib(lambda: score(batches[0])) / step


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=ROOT / ".demo", help="folder with data/ and model/ (.demo)")
    parser.add_argument("--hidden", type=int, default=256, help="hidden size (256)")
    parser.add_argument("--layers", type=int, default=4, help="layers (4)")
    parser.add_argument("--vocab", type=int, default=4096, help="vocabulary, at least the demo's 4096 (4096)")
    parser.add_argument("--length", type=int, default=352, help="tokens per sample (352)")
    parser.add_argument("--batch", type=int, default=8, help="samples per batch (8)")
    parser.add_argument("--rounds", type=int, default=15, help="rounds (15)")
    parser.add_argument("--precision", choices=("fp32", "bf16", "pure_bf16"), default="fp32", help="(fp32)")
    parser.add_argument("--kernels", default="auto", help="of auto, torch, triton (auto)")
    parser.add_argument("--directions", default="1,16", help="numbers of directions (1,16)")
    parser.add_argument("--models", default="full,lora", help="which (full,lora)")
    options = parser.parse_args()
    from dataflex_mega.distributed.parallel_info import shutdown_distributed

    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"score / forward + backward, {options.rounds} rounds, {options.batch} x {options.length} tokens")
    print(f"{'':26}{'median':>9}{'quartiles':>20}{'budget':>9}{'memory':>9}", flush=True)
    for model in options.models.split(","):
        for name, values, memory in measure(options, model == "lora"):
            low, middle, high = statistics.quantiles(values, n=4)
            limit = ("1.1" if model == "lora" else "1.2") if name.endswith("adam, S=1") else ""
            spread = f"{low:.3f} - {high:.3f}"
            print(f"{f'{model} {name}':26}{middle:9.3f}{spread:>20}{limit:>9}{memory:9.2f}", flush=True)
        gc.collect()  # the engine and its hooks refer to each other
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    shutdown_distributed(orderly=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
