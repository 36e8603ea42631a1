"""Peak memory of gradient scores and of the gradient store's features on a CPU, as ratios to a training step.

Peak memory is the most bytes of tensors at once, with parameters, moments and directions, on the same batch of real
text (the demo's). `gradients.py` measures times, and on a GPU memory too. The budget is 1.2 with one direction.

    make demo-data && python tools/bench/gradient_memory.py
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from tools.bench import gradients, tensor_bytes  # noqa: E402


def kinds_of(engine: Any, batches: list[Any]) -> Iterator[tuple[str, Callable[[Any], Any], list[Any]]]:
    """(name, work on a batch, tensors that stay in memory between batches)."""
    from dataflex_mega.types import ProjectionSpec

    for groups in (1, 16):
        directions = engine.gradient_scorer(False).directions([[batches[2 + g % 4]] for g in range(groups)])
        for adam in (False, True):
            score = partial(engine.gradient_scorer(adam).score, directions=directions)
            yield f"{'adam' if adam else 'sgd'}, S={groups}", score, list(directions.by_layer.values())
    maker = engine.feature_maker(ProjectionSpec("two_sided", 16, 0), adam=True)
    projections: list[torch.Tensor] = []
    for layer in maker.layers.values():
        tensors = (layer.outputs, layer.inputs, *(layer.preconditioned or ()))
        projections += [tensor for tensor in tensors if tensor is not None]
    yield "store's features", lambda batch: maker.features(batch).bfloat16(), projections


def peak(engine: Any, work: Callable[[], Any], extra: Sequence[torch.Tensor] = ()) -> int:
    """Most bytes at once, with parameters, moments and `extra`."""
    engine.optimizer.zero_grad(set_to_none=True)
    state = [value for entry in engine.optimizer.state.values() for value in entry.values()]
    return tensor_bytes.peak(work, [*engine.model.parameters(), *state, *extra])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=ROOT / ".demo", help="folder with data/ and model/ (.demo)")
    parser.add_argument("--hidden", type=int, default=256, help="hidden size (256)")
    parser.add_argument("--layers", type=int, default=4, help="layers (4)")
    parser.add_argument("--length", type=int, default=352, help="tokens per sample (352)")
    parser.add_argument("--batch", type=int, default=8, help="samples per batch (8)")
    options = parser.parse_args()
    options.vocab, options.precision = 4096, "fp32"
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"peak memory / training step, {options.batch} x {options.length} tokens")
    for lora in (False, True):
        engine, batches = gradients.build(options, lora), gradients.real_batches(options)
        for batch in batches[:2]:
            engine.train_step([batch], None)
        step = peak(engine, lambda e=engine, b=batches[0]: e.train_step([b], None))
        print(f"{'LoRA' if lora else 'full'} training step: {step / 2**20:.0f} MiB")
        for name, work, extra in kinds_of(engine, batches):
            print(
                f"{'LoRA' if lora else 'full'} {name:20}{peak(engine, partial(work, batches[0]), extra) / step:8.2f}",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
