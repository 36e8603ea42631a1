"""All callbacks of a run: Hugging Face's, LLaMA-Factory's, trackers, profilers and the user's, in the order of the two."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dataflex_mega.errors import UserCall
from dataflex_mega.llamafactory.args import LFArgs
from dataflex_mega.llamafactory.trackers import Trackers


def make_handler(*arguments: Any) -> Any:
    """transformers' CallbackHandler, which names the callback that raises; a callback of the user's may."""
    from transformers.trainer_callback import CallbackHandler

    class NamingHandler(CallbackHandler):
        def call_event(self, event: str, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            every = self.callbacks
            try:
                for callback in every:
                    self.callbacks = [callback]
                    with UserCall(f"callback {type(callback).__module__}:{type(callback).__name__}.{event}"):
                        control = super().call_event(event, args, state, control, **kwargs)
            finally:
                self.callbacks = every
            return control

    return NamingHandler(*arguments)


def in_order(
    args: LFArgs, user_callbacks: Sequence[Any], early_stopping: Any, trackers: Trackers, processor: Any
) -> list[Any]:
    """All callbacks of a run, in the order in which LLaMA-Factory and Hugging Face's Trainer line them up."""
    from llamafactory.train.callbacks import LogCallback, ReporterCallback, SaveProcessorCallback
    from transformers.trainer_callback import DefaultFlowCallback

    return [
        DefaultFlowCallback(),
        *trackers.before,
        *user_callbacks,
        LogCallback(),
        *trackers.after,
        *([] if early_stopping is None else [early_stopping]),
        *_profilers(args),
        ReporterCallback(args.model, args.data, args.finetuning, args.generating),
        *([] if processor is None else [SaveProcessorCallback(processor)]),
    ]


def _profilers(args: LFArgs) -> list[Any]:
    """LLaMA-Factory's profilers of steps and of modules, where the configuration asks for them."""
    from llamafactory.train.callbacks import ModuleProfilerCallback, TorchProfilerCallback

    modules = getattr(args.training, "profile_modules", None)
    steps = [TorchProfilerCallback(args.training)] if getattr(args.training, "enable_torch_profiler", False) else []
    return steps + ([ModuleProfilerCallback(modules)] if modules else [])
