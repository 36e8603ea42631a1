"""`do_predict` and `predict_with_generate` after a run: LLaMA-Factory's own generation with the model just written."""

from __future__ import annotations

import dataclasses
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dataflex_mega.errors import ConfigError
from dataflex_mega.llamafactory.args import parse_arguments, prepare_arguments

METRICS = {"jieba": "jieba", "nltk": "nltk", "rouge_chinese": "rouge-chinese"}  # module -> package
TRAINING_KEYS = (
    "dataset", "val_size", "packing", "neat_packing", "mix_strategy", "train_on_prompt", "mask_history",
    "eval_on_each_dataset", "tokenized_path", "interleave_probs", "streaming", "buffer_size",
)  # fmt: skip
FURTHER_KEYS = (
    "output_dir", "seed", "per_device_eval_batch_size", "bf16", "fp16", "use_cpu", "ddp_timeout", "ddp_backend",
    "finetuning_type", "stage", "generation_max_length", "generation_num_beams", "generation_config",
    "bf16_full_eval", "fp16_full_eval",
)  # fmt: skip


def is_requested(lf: dict[str, Any]) -> bool:
    """Whether a configuration asks for generation after training."""
    return bool(lf.get("do_predict") or lf.get("predict_with_generate"))


def check(lf: dict[str, Any]) -> None:
    """Raises ConfigError before training when generation could not run after it."""
    key = "do_predict" if lf.get("do_predict") else "predict_with_generate"
    if lf.get("stage", "sft") != "sft":
        raise ConfigError(f"{key}: generation after training needs stage: sft, found {lf['stage']!r}")
    if not lf.get("eval_dataset"):
        raise ConfigError(f"{key}: needs eval_dataset, the prompts to answer")
    missing = [package for module, package in METRICS.items() if find_spec(module) is None]
    if missing:
        raise ConfigError(f"{key}: LLaMA-Factory scores answers with {', '.join(missing)}; pip install them")


def predict(lf: dict[str, Any], output: Path) -> None:
    """Answer the prompts of `eval_dataset` with the model in `output`; every rank answers its share.

    Writes generated_predictions.jsonl and predict_results.json there. Runs in the process group of the training.
    """
    arguments = parse_arguments(prepare_arguments(prediction_keys(lf, output)))
    from llamafactory.train.sft.workflow import run_sft

    run_sft(*arguments, callbacks=[])


def prediction_keys(lf: dict[str, Any], output: Path) -> dict[str, Any]:
    """A training's keys -> those of the generation that follows it: the trained model, no training data."""
    from llamafactory.hparams import DataArguments, GeneratingArguments, ModelArguments

    classes = (DataArguments, GeneratingArguments, ModelArguments)
    allowed = {field.name for cls in classes for field in dataclasses.fields(cls)} - set(TRAINING_KEYS) | set(
        FURTHER_KEYS
    )
    keys = {key: value for key, value in lf.items() if key in allowed}
    keys.update(do_train=False, do_predict=True, predict_with_generate=True)
    if lf.get("finetuning_type", "lora") in ("lora", "oft"):  # what was written is an adapter
        before = lf.get("adapter_name_or_path") if lf.get("create_new_adapter") else None
        keys["adapter_name_or_path"] = f"{before},{output}" if before else str(output)
        keys.pop("create_new_adapter", None)
    else:
        keys["model_name_or_path"] = str(output)
        keys["finetuning_type"] = "full"
    return keys
