"""What Hugging Face's Trainer does for `full_determinism` and `debug` when it is made; our loop makes none."""

from __future__ import annotations

from typing import Any

from dataflex_mega.errors import TrainingFault
from dataflex_mega.llamafactory.args import LFArgs


def make_deterministic(args: LFArgs) -> None:
    """Under `full_determinism`: let torch use deterministic algorithms only, before anything is built."""
    if args.training.full_determinism:
        from transformers import enable_full_determinism

        enable_full_determinism(args.training.seed)


def watch_for_overflow(args: LFArgs, model: Any) -> None:
    """Under `debug: underflow_overflow`: look at every module's weights, inputs and outputs.

    The forward pass in which one is infinite or NaN raises TrainingFault; what came before it is printed.
    """
    from transformers.debug_utils import DebugOption, DebugUnderflowOverflow

    if DebugOption.UNDERFLOW_OVERFLOW not in args.training.debug:
        return

    class Watch(DebugUnderflowOverflow):
        def forward_hook(self, module: Any, input: Any, output: Any) -> None:
            try:
                super().forward_hook(module, input, output)
            except ValueError as error:
                raise TrainingFault(
                    f"debug: underflow_overflow: inf or NaN in forward pass {self.batch_number}; the lines above show in "
                    "which module, and what came before"
                ) from error

    Watch(model)
