"""What a streaming gradient score costs, as a ratio to an ordinary forward and backward pass of the same batch.

Both are timed in turn on real text (the demo's), in one process and one thread; a ratio is taken in each round. The budget
is 1.2 for full models and 1.1 for LoRA, with one direction and Adam's moments.

    make demo-data && python tools/bench/gradients.py
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
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
    """An engine with a random Llama of the given size that has taken two steps, so that Adam has moments."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from dataflex_mega.distributed import mesh
    from dataflex_mega.engines.fsdp.engine import FSDPEngine, Options
    from dataflex_mega.engines.fsdp.parallel import Layout

    hidden = options.hidden
    config = LlamaConfig(
        vocab_size=4096, hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=options.layers,
        num_attention_heads=max(4, hidden // 64), num_key_value_heads=max(2, hidden // 128), tie_word_embeddings=False,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    return FSDPEngine(model, optimizer, scheduler, mesh.start(), Layout("single"), Options(1))


def lap(work: Callable[[], Any]) -> float:
    """Seconds of a call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def plain(engine: Any, batch: Any) -> None:
    """Forward and backward, as in training."""
    engine.token_losses(batch).sum().backward()
    engine.optimizer.zero_grad(set_to_none=True)


def measure(options: argparse.Namespace, lora: bool) -> dict[str, list[float]]:
    """Ratio of each kind of score to a plain pass, a number for each round."""
    from dataflex_mega.engines.fsdp.gradients import GradientScorer

    engine, batches = build(options, lora), real_batches(options)
    for batch in batches[:2]:
        engine.train_step([batch], None)
    kinds: dict[str, Callable[[Any], Any]] = {}
    for name, adam, groups in (("sgd, S=1", False, 1), ("adam, S=1", True, 1), ("adam, S=16", True, 16)):
        scorer = GradientScorer(engine, adam)
        directions = scorer.directions([[batches[2 + g]] for g in range(groups)])
        kinds[name] = lambda batch, s=scorer, d=directions: s.score(batch, d)
    ratios: dict[str, list[float]] = {name: [] for name in kinds}
    for number in range(options.rounds + 1):
        batch = batches[number % len(batches)]
        base = lap(lambda b=batch: plain(engine, b))
        for name, work in kinds.items():
            spent = lap(lambda b=batch, w=work: w(b))
            if number:  # the first round warms up
                ratios[name].append(spent / base)
    return ratios


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=ROOT / ".demo", help="folder with data/ and model/ (.demo)")
    parser.add_argument("--hidden", type=int, default=256, help="hidden size (256)")
    parser.add_argument("--layers", type=int, default=4, help="layers (4)")
    parser.add_argument("--length", type=int, default=352, help="tokens a sample (352)")
    parser.add_argument("--batch", type=int, default=8, help="samples a batch (8)")
    parser.add_argument("--rounds", type=int, default=15, help="rounds (15)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"score / forward + backward, {options.rounds} rounds, {options.batch} x {options.length} tokens")
    print(f"{'':20}{'median':>9}{'quartiles':>20}{'budget':>9}")
    for lora, budget in ((False, 1.2), (True, 1.1)):
        for name, values in measure(options, lora).items():
            low, middle, high = statistics.quantiles(values, n=4)
            limit = f"{budget:.1f}" if name == "adam, S=1" else ""
            label = f"{'LoRA' if lora else 'full'} {name}"
            print(f"{label:20}{middle:9.3f}{f'{low:.3f} - {high:.3f}':>20}{limit:>9}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
