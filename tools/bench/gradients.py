"""What gradient scores and the gradient store's features cost, as ratios to ordinary training on the same batch.

Time is compared with a forward and backward pass: both in turn on real text (the demo's), in one process and one thread, a
ratio in each round. The budget is 1.2 for full models and 1.1 for LoRA, with one direction and Adam's moments. Memory is
compared with a training step: the most bytes of tensors at once, parameters and optimizer state included, counted in a pass of
its own. Its budget is 1.2.

    make demo-data && python tools/bench/gradients.py
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402


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


@dataclass
class Kind:
    """One thing that is compared."""

    work: Callable[[Any], Any]  # of a batch
    kept: list[torch.Tensor]  # what it holds from one batch to the next, besides parameters and optimizer state


def kinds_of(engine: Any, batches: list[Any]) -> dict[str, Kind]:
    """Everything that is compared, by name."""
    from dataflex_mega.engines.fsdp.features import FeatureMaker
    from dataflex_mega.engines.fsdp.gradients import GradientScorer
    from dataflex_mega.types import FeatureSpec

    kinds: dict[str, Kind] = {}
    for groups in (1, 16):
        directions = GradientScorer(engine, False).directions([[batches[2 + g]] for g in range(groups)])
        for adam in (False, True):
            score = partial(GradientScorer(engine, adam).score, directions=directions)
            kinds[f"{'adam' if adam else 'sgd'}, S={groups}"] = Kind(score, list(directions.by_layer.values()))
    maker = FeatureMaker(engine, FeatureSpec("two_sided", 16, 0), adam=True)
    parts = [part for layer in maker.layers.values() for part in (layer.outputs, layer.inputs, *(layer.scaled or ()))]
    kinds["store's features"] = Kind(lambda batch: maker.features(batch).bfloat16(), [p for p in parts if p is not None])
    return kinds


def measure(options: argparse.Namespace, lora: bool) -> tuple[dict[str, list[float]], dict[str, float]]:
    """(ratio of the time of each kind to a plain pass, a number for each round; ratio of its memory to a step's)."""
    engine, batches = build(options, lora), real_batches(options)
    for batch in batches[:2]:
        engine.train_step([batch], None)
    kinds = kinds_of(engine, batches)
    ratios: dict[str, list[float]] = {name: [] for name in kinds}
    for number in range(options.rounds + 1):
        batch = batches[number % len(batches)]
        base = lap(lambda b=batch: plain(engine, b))
        for name, kind in kinds.items():
            spent = lap(lambda b=batch, k=kind: k.work(b))
            if number:  # the first round warms up
                ratios[name].append(spent / base)
    step = peak(engine, Kind(lambda batch: engine.train_step([batch], None), []), batches[0])
    return ratios, {name: peak(engine, kind, batches[0]) / step for name, kind in kinds.items()}


class Bytes(TorchDispatchMode):
    """Counts the storages that are alive among those that operations inside make, and the most at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor)
        return found

    def add(self, tensor: torch.Tensor) -> None:
        """Count the storage of a tensor, once, until it is freed."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.seen:
            return
        self.seen.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


def peak(engine: Any, kind: Kind, batch: Any) -> float:
    """Most bytes of tensors at once: what is there before, and what the work makes."""
    engine.optimizer.zero_grad(set_to_none=True)
    state = [value for entry in engine.optimizer.state.values() for value in entry.values()]
    counted = Bytes()
    for tensor in (*engine.model.parameters(), *state, *kind.kept):
        counted.add(tensor)
    with counted:
        kind.work(batch)
    return float(counted.most)


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
    print(f"{'':24}{'median':>9}{'quartiles':>20}{'budget':>9}{'memory / step':>15}{'budget':>9}")
    for lora, budget in ((False, 1.2), (True, 1.1)):
        times, sizes = measure(options, lora)
        for name, values in times.items():
            low, middle, high = statistics.quantiles(values, n=4)
            limits = (f"{budget:.1f}", "1.2") if name == "adam, S=1" else ("", "")
            label = f"{'LoRA' if lora else 'full'} {name}"
            print(f"{label:24}{middle:9.3f}{f'{low:.3f} - {high:.3f}':>20}{limits[0]:>9}{sizes[name]:15.2f}{limits[1]:>9}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
