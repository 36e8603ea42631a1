"""Agreement of scores with LESS as the paper defines it, computed without any shortcut.

The reference takes one candidate at a time: autograd's gradient in float64, Adam's update by formula, its cosine with
every target's gradient, the mean over a sub-task, the largest of the sub-tasks. Compared with it are the streamed
scores of `selector: less` and scores from random projections: dense ones (Johnson-Lindenstrauss) and the two-sided ones
of the gradient store, each with two seeds. The model has trained on the same text before, so the moments are those of a
real run.

    make demo-data && python tools/bench/agreement.py

Status 0: Spearman's correlation of the streamed scores is at least 0.999 and their top shares are the same up to ties.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

DOMAINS = ("demo_alpaca_text", "demo_c4", "demo_python", "demo_wiki")
SUBTASKS = ("demo_alpaca_text_validation", "demo_python_validation")
TOP_FRACTIONS = (0.05, 0.2)
LR, BETAS, EPS = 2e-3, (0.9, 0.999), 1e-8


def rows_of(data: Path, name: str, tokenizer: Any, length: int, count: int) -> list[list[int]]:
    """`count` pieces of `length` tokens, the first of every row before the second of any."""
    lines = (data / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")
    texts = [json.loads(line)["text"] for line in lines if line]
    encoded = [tokenizer.encode(text) for text in texts]
    pieces: list[list[int]] = []
    for start in range(0, max(map(len, encoded)), length):
        pieces += [ids[start : start + length] for ids in encoded if len(ids) >= start + length]
        if len(pieces) >= count:
            return pieces[:count]
    raise SystemExit(f"agreement: {name} has {len(pieces)} pieces of {length} tokens, {count} are needed")


def batches(rows: Sequence[Sequence[int]], size: int) -> list[Any]:
    """Token lists -> batches of the library."""
    import numpy as np

    from dataflex_mega.data.collate import collate
    from dataflex_mega.data.pool import Sample

    samples = [Sample(i, 0, np.array(row), np.array(row)) for i, row in enumerate(rows)]
    return [collate(samples[i : i + size], 0) for i in range(0, len(samples), size)]


def train_engine(options: argparse.Namespace, tokenizer: Any, rows: list[list[int]]) -> Any:
    """An engine whose model has taken `steps` steps of Adam on the candidates."""
    from dataflex_mega.distributed.parallel_info import init_distributed
    from dataflex_mega.engines.fsdp.engine import FSDPEngine
    from dataflex_mega.engines.fsdp.parallel import FSDPLayout
    from dataflex_mega.engines.fsdp.runner import FSDPModelRunner
    from dataflex_mega.engines.options import StepOptions
    from tools.tiny_model import ModelOptions, make_model

    shape = ModelOptions(options.hidden, options.layers, 4, 2, len(tokenizer), context=options.length)
    model = make_model(shape)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, eps=EPS)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    engine = FSDPEngine(
        FSDPModelRunner(model, FSDPLayout("single"), init_distributed()), optimizer, scheduler, StepOptions(1)
    )
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    losses = []
    for step in range(options.steps):
        batch_rows = [rows[order[(step * 16 + i) % len(rows)]] for i in range(16)]
        losses.append(engine.train_step(batches(batch_rows, 16), None).mean_loss)
    print(f"trained {options.steps} steps of Adam, loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    return engine


# -- the reference -------------------------------------------------------------------------------------------------------


def gradient(model: Any, weights: list[Any], row: Sequence[int]) -> torch.Tensor:
    """[P] autograd's gradient of one sample's mean token loss."""
    ids = torch.tensor([row])
    loss = F.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:])
    return torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, weights)])


def autograd_scores(engine: Any, rows: list[list[int]], groups: list[list[list[int]]]) -> torch.Tensor:
    """[n] scores of candidates by the definition, in float64."""
    import copy

    linears = [m.weight for m in engine.model.modules() if isinstance(m, torch.nn.Linear)]
    state = [engine.optimizer.state[weight] for weight in linears]
    first, second = (torch.cat([s[key].double().flatten() for s in state]) for key in ("exp_avg", "exp_avg_sq"))
    t, (b1, b2) = int(state[0]["step"]) + 1, BETAS
    model = copy.deepcopy(engine.model).double().eval()
    weights = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)]
    targets = [[F.normalize(gradient(model, weights, row), dim=0) for row in group] for group in groups]
    stacked = [torch.stack(group) for group in targets]
    scores = torch.zeros(len(rows), dtype=torch.float64)
    for i, row in enumerate(rows):
        g = gradient(model, weights, row)
        m, v = b1 * first + (1 - b1) * g, b2 * second + (1 - b2) * g**2
        update = (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + EPS)
        scores[i] = max(float((group @ (update / update.norm())).mean()) for group in stacked)
    return scores


# -- the scores that are compared with it --------------------------------------------------------------------------------


def streamed_scores(engine: Any, rows: list[list[int]], groups: list[list[list[int]]], size: int) -> torch.Tensor:
    """[n] scores as `selector: less` computes them."""
    from dataflex_mega.algorithms.selectors.less import Less
    from dataflex_mega.types import SignalTable

    scorer = engine.gradient_scorer(adam=True)
    directions = scorer.directions([batches(group, size) for group in groups])
    scores = [scorer.score(batch, directions) for batch in batches(rows, size)]
    dot, norm2 = (torch.cat(values) for values in zip(*scores, strict=True))
    ids = torch.arange(len(rows))
    return Less().score(SignalTable(ids, torch.zeros_like(ids), {"dot": dot, "norm2": norm2})).double()


def projected_scores(
    engine: Any, rows: list[list[int]], groups: list[list[list[int]]], kind: tuple[str, int, int], size: int
) -> tuple[torch.Tensor, int]:
    """([n] scores from features normalised after projection, numbers per sample). `kind`: (name, size, seed)."""
    from dataflex_mega.types import ProjectionSpec

    maker = engine.feature_maker(ProjectionSpec(*kind), adam=True)  # type: ignore[arg-type]  # one of the two kinds
    targets = [
        F.normalize(torch.cat([maker.features(b, plain=True) for b in batches(group, size)]), dim=1).mean(0)
        for group in groups
    ]
    directions = torch.stack(targets, dim=1)
    features = [F.normalize(maker.features(batch), dim=1) @ directions for batch in batches(rows, size)]
    return torch.cat(features).amax(1).double(), maker.width


# -- figures -------------------------------------------------------------------------------------------------------------


def spearman(first: torch.Tensor, second: torch.Tensor) -> float:
    """Correlation of ranks; ties share the mean of theirs."""
    ranks = []
    for values in (first, second):
        _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
        ends = counts.cumsum(0).double()
        ranks.append((ends - (counts - 1) / 2)[inverse])
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def overlap(scores: torch.Tensor, reference: torch.Tensor, fraction: float) -> float:
    """Fraction of the reference's top that is in the other top too."""
    count = max(1, round(fraction * len(reference)))
    return len(set(scores.topk(count).indices.tolist()) & set(reference.topk(count).indices.tolist())) / count


def same_top(scores: torch.Tensor, reference: torch.Tensor, fraction: float) -> bool:
    """Whether the tops are equal, or differ by samples whose reference scores tie with the last one up to rounding."""
    count = max(1, round(fraction * len(reference)))
    best = reference.topk(count)
    border = float(best.values[-1])
    differ = set(scores.topk(count).indices.tolist()) ^ set(best.indices.tolist())
    return all(abs(float(reference[i]) - border) < 1e-5 for i in differ)


def table_row(name: str, width: str, scores: torch.Tensor, reference: torch.Tensor, seconds: float) -> str:
    """One row of the table."""
    tops = "".join(f"{overlap(scores, reference, fraction):>10.3f}" for fraction in TOP_FRACTIONS)
    error = float((scores - reference).abs().max())
    return f"{name:28}{width:>10}{spearman(scores, reference):>10.5f}{tops}{error:>12.1e}{seconds:>9.1f}"


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / ".demo" / "data", help="folder of tools/demo_data.py")
    parser.add_argument("--candidates", type=int, default=2048, help="samples scored, from four domains (2048)")
    parser.add_argument("--targets", type=int, default=16, help="targets of each of two sub-tasks (16)")
    parser.add_argument("--length", type=int, default=48, help="tokens per sample (48)")
    parser.add_argument("--steps", type=int, default=200, help="steps of Adam before scoring (200)")
    parser.add_argument("--hidden", type=int, default=32, help="hidden size (32)")
    parser.add_argument("--layers", type=int, default=2, help="layers (2)")
    parser.add_argument("--dense", type=int, nargs="*", default=[1024, 8192], help="sizes of dense projections")
    parser.add_argument("--two-sided", type=int, nargs="*", default=[8, 16, 32], help="sizes of two-sided ones")
    return parser.parse_args()


def main() -> int:
    from tools.tiny_model import make_tokenizer, training_texts

    options = parse_arguments()
    torch.set_num_threads(1)
    tokenizer = make_tokenizer(training_texts(options.data), 512)
    per_domain = options.candidates // len(DOMAINS)
    rows = [row for name in DOMAINS for row in rows_of(options.data, name, tokenizer, options.length, per_domain)]
    groups = [rows_of(options.data, name, tokenizer, options.length, options.targets) for name in SUBTASKS]
    engine = train_engine(options, tokenizer, rows)
    linear = sum(m.weight.numel() for m in engine.model.modules() if isinstance(m, torch.nn.Linear))
    print(f"{len(rows)} candidates, 2 sub-tasks of {options.targets} targets, {linear:,} weights of linear layers")
    start = time.perf_counter()
    reference = autograd_scores(engine, rows, groups)
    print(f"\n{'scores':28}{'numbers':>10}{'Spearman':>10}{'top 5%':>10}{'top 20%':>10}{'max error':>12}{'seconds':>9}")
    print(table_row("autograd, one by one", f"{linear}", reference, reference, time.perf_counter() - start))
    start = time.perf_counter()
    exact = streamed_scores(engine, rows, groups, 32)
    print(table_row("streamed", "1 + S", exact, reference, time.perf_counter() - start))
    kinds = [("dense", size) for size in options.dense] + [("two_sided", size) for size in options.two_sided]
    for kind, size in kinds:
        for seed in (0, 1):
            start = time.perf_counter()
            scores, width = projected_scores(engine, rows, groups, (kind, size, seed), 512 if kind == "dense" else 64)
            name = f"{kind.replace('_', '-')} {size}, seed {seed}"
            print(table_row(name, f"{width}", scores, reference, time.perf_counter() - start), flush=True)
    same_tops = all(same_top(exact, reference, fraction) for fraction in TOP_FRACTIONS)
    good = spearman(exact, reference) >= 0.999 and same_tops
    print(f"\nstreamed: {'agrees' if good else 'DOES NOT AGREE'}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
