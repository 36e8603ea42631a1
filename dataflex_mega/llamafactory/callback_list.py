"""All callbacks of a run: Hugging Face's, LLaMA-Factory's, trackers, profilers and the user's, in the order of the two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dataflex_mega.errors import ConfigError, UserCall
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
    args: LFArgs, user_callbacks: Sequence[Any], early_stopping: Any, trackers: Trackers, parts: Mapping[str, Any]
) -> list[Any]:
    """All callbacks of a run, in the order in which LLaMA-Factory and Hugging Face's Trainer line them up. `parts`: the
    model. LLaMA-Factory's SaveProcessorCallback is left out: a processor is in checkpoints and exports anyway."""
    from llamafactory.train.callbacks import LogCallback, ReporterCallback
    from transformers.trainer_callback import DefaultFlowCallback

    return [
        DefaultFlowCallback(),
        *trackers.before,
        *user_callbacks,
        LogCallback(),
        *([_make_pissa_converter(parts["model"])] if getattr(args.finetuning, "pissa_convert", False) else []),
        *trackers.after,
        *([] if early_stopping is None else [early_stopping]),
        *_profilers(args),
        ReporterCallback(args.model, args.data, args.finetuning, args.generating),
    ]


def _make_pissa_converter(model: Any) -> Any:
    """LLaMA-Factory's, which at the end writes pissa_converted, an adapter for the model as it was loaded. What it compares
    with, the adapter before the first step, is that of the first start when a run goes on.

    Raises ConfigError for parameters that are divided among processes: it writes them from one.
    """
    from llamafactory.train.callbacks import PissaConvertCallback

    if model is not None and any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):
        raise ConfigError("pissa_convert: needs whole parameters in every process, found fsdp; use one process or DDP")

    class PissaConverter(PissaConvertCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            initial = Path(args.output_dir) / "pissa_init"
            if state.global_step == 0:
                super().on_train_begin(args, state, control, **kwargs)
            elif not initial.is_dir():
                raise ConfigError(
                    f"pissa_convert: {initial} is missing, which the first start of this run has written; copy it from there"
                )

    return PissaConverter()


def _profilers(args: LFArgs) -> list[Any]:
    """LLaMA-Factory's profilers of steps and of modules, where the configuration asks for them."""
    from llamafactory.train.callbacks import ModuleProfilerCallback, TorchProfilerCallback

    modules = getattr(args.training, "profile_modules", None)
    steps = [TorchProfilerCallback(args.training)] if getattr(args.training, "enable_torch_profiler", False) else []
    return steps + ([ModuleProfilerCallback(modules)] if modules else [])
