"""LLaMA-Factory's arguments: which keys exist, and parsing them."""

from __future__ import annotations

import dataclasses
import os
import sys
import typing
from importlib.metadata import PackageNotFoundError
from typing import Any, NamedTuple

import torch

from dataflex_mega.errors import ConfigError, UserError
from dataflex_mega.llamafactory.compat import ensure_importable

ENGINE_KEYS = ("fsdp", "fsdp_config")  # ours to act on in dynamic runs, so accelerate must not see them
REFUSALS = (ValueError, TypeError, ImportError, OSError, NotImplementedError)  # by which libraries say no
# What else comes out of a library that was given a wrong value and did not look at it first.
FAILURES = (*REFUSALS, RuntimeError, ArithmeticError, LookupError, AttributeError, AssertionError)
FUSED_ADAMW = "adamw_torch_fused"
PREDICTION_KEYS = ("do_predict", "predict_with_generate")  # llamafactory.predict acts on them when the training is over


class LFArgs(NamedTuple):
    """LLaMA-Factory's five argument objects."""

    model: Any
    data: Any
    training: Any
    finetuning: Any
    generating: Any


def argument_types() -> dict[str, Any]:
    """Every key of a LLaMA-Factory training YAML -> its annotation."""
    ensure_importable()
    from llamafactory.hparams import (
        DataArguments,
        FinetuningArguments,
        GeneratingArguments,
        ModelArguments,
        TrainingArguments,
    )

    types: dict[str, Any] = {}
    for cls in (ModelArguments, DataArguments, TrainingArguments, FinetuningArguments, GeneratingArguments):
        hints = typing.get_type_hints(cls)  # not field.type: transformers' parser rewrites it when it parses
        types.update({field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init})
    return types


def prepare_arguments(lf: dict[str, Any]) -> dict[str, Any]:
    """LLaMA-Factory's keys of a dynamic run, with the defaults under which our engine runs them."""
    prepared = {key: value for key, value in lf.items() if key not in ENGINE_KEYS}
    if prepared.setdefault("do_train", True):
        for key in PREDICTION_KEYS:
            prepared.pop(key, None)
    prepared.setdefault("logging_steps", 10)
    prepared.setdefault("use_reentrant_gc", False)  # re-entrant checkpointing does not compose with fully_shard
    prepared.setdefault(
        "ddp_timeout", 1800
    )  # seconds; LLaMA-Factory's default is years, also for a process that never comes
    if (lf.get("use_galore") or lf.get("use_apollo")) and lf.get("optim", FUSED_ADAMW) == FUSED_ADAMW:
        prepared["optim"] = "adamw_torch"  # which they take for their own; transformers' default they do not know
    prepared["report_to"] = "none"  # our own metrics write TensorBoard; see metrics.py
    if not torch.cuda.is_available():
        prepared.setdefault("use_cpu", True)  # transformers refuses bf16 on a CPU without it
    return prepared


def parse_arguments(lf: dict[str, Any]) -> LFArgs:
    """Parse once per process. Seeds all generators and, under torchrun, starts the process group.

    Raises ConfigError with LLaMA-Factory's or transformers' own words when a value is refused.
    """
    ensure_importable()
    import datasets
    from llamafactory.hparams import get_train_args
    from transformers.utils import logging as hf_logging

    try:
        parsed = LFArgs(*get_train_args(without_idle_ddp_backend(lf)))
    except UserError:
        raise
    except REFUSALS as error:
        message = first_line(error)
        about = "ddp_backend: " if message.startswith("Your assigned backend") else ""
        raise ConfigError(f"{about}{message}") from error
    if not sys.stderr.isatty():
        hf_logging.disable_progress_bar()
        datasets.disable_progress_bars()  # in a log file every frame of a bar is a line
    if "log_level" not in lf:
        hf_logging.set_verbosity_warning()  # LLaMA-Factory has just set it to info, which prints every configuration file
    return parsed


def without_idle_ddp_backend(lf: dict[str, Any]) -> dict[str, Any]:
    """A copy, in one process without `ddp_backend`, which would make it wait for a process group."""
    return {key: value for key, value in lf.items() if key != "ddp_backend" or "RANK" in os.environ}


def first_line(error: BaseException) -> str:
    """The first line with words in it of an error raised by a library; all of them for a package that is missing."""
    if isinstance(error, PackageNotFoundError):  # says after a line's end what to install
        return " ".join(str(error.name).split())
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
