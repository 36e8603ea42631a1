"""A small set of LLaMA-Factory's keys, for tests that do not import it."""

from typing import Any, Literal

import pytest


class Other:
    """Stands for a class of transformers or LLaMA-Factory, such as an enum."""


# Some of LLaMA-Factory's keys with their annotations; test_llamafactory_keys.py has the real ones.
LF_KEYS = {
    "model_name_or_path": str | None,
    "stage": Literal['pt', 'sft', 'rm', 'ppo', 'dpo', 'kto'],
    "finetuning_type": Literal['lora', 'oft', 'freeze', 'full'],
    "dataset": str | None,
    "eval_dataset": str | None,
    "val_size": float,
    "output_dir": str | None,
    "run_name": str | None,
    "overwrite_output_dir": bool,
    "learning_rate": float,
    "weight_decay": float,
    "warmup_steps": float,
    "cutoff_len": int,
    "max_steps": int,
    "num_train_epochs": float,
    "max_samples": int | None,
    "per_device_train_batch_size": int,
    "per_device_eval_batch_size": int,
    "gradient_accumulation_steps": int,
    "seed": int,
    "save_total_limit": int | None,
    "early_stopping_steps": int | None,
    "bf16": bool,
    "fp16": bool,
    "do_train": bool,
    "do_predict": bool,
    "predict_with_generate": bool,
    "use_cpu": bool,
    "packing": bool | None,
    "neat_packing": bool,
    "streaming": bool,
    "optim": Other | str,
    "lr_scheduler_kwargs": dict | str | None,
    "eval_strategy": Other | str,
    "save_strategy": Other | str,
    "train_sampling_strategy": str,
    "mix_strategy": Literal['concat', 'interleave_under', 'interleave_over', 'interleave_once'],
    "interleave_probs": str | None,
    "report_to": None | str | list[str],
    "fsdp": list[Other] | str | None,
    "fsdp_config": dict[str, Any] | str | None,
    "deepspeed": dict | str | None,
    "flash_attn": Other,
    "quantization_bit": int | None,
    "hub_token": str | None,
    "hub_model_id": str | None,
    "include_num_input_tokens_seen": str | bool,
    "accelerator_config": dict | str | None,
    **dict.fromkeys(
        (
            "use_badam", "use_galore", "use_apollo", "use_adam_mini", "use_muon", "use_unsloth", "load_best_model_at_end",
            "fp8", "fp8_enable_fsdp_float8_all_gather", "torch_compile", "compute_accuracy", "disable_shuffling",
            "push_to_hub", "use_swanlab", "use_mca",
        ),
        bool,
    ),
    "neftune_noise_alpha": float | None,
    "label_smoothing_factor": float,
    "tokenized_path": str | None,
}  # fmt: skip


@pytest.fixture
def lf_keys():
    return dict(LF_KEYS)
