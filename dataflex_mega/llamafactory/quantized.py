"""A model whose checkpoint is quantised already, checked before it is loaded."""

from __future__ import annotations

import importlib.util
from typing import Any

from dataflex_mega.errors import ConfigError
from dataflex_mega.llamafactory.args import LFArgs
from dataflex_mega.llamafactory.model_checks import read_config

# Method -> (the package that computes with such weights, its module).
PACKAGES = {
    "gptq": ("gptqmodel", "gptqmodel"), "awq": ("autoawq", "awq"), "aqlm": ("aqlm", "aqlm"),
    "bitsandbytes": ("bitsandbytes", "bitsandbytes"), "hqq": ("hqq", "hqq"), "eetq": ("eetq", "eetq"),
}  # fmt: skip
DEQUANTIZED = ("mxfp4", "fp8")  # LLaMA-Factory does so when it loads them
NEEDS_WEIGHTS = ("pissa_init", "resize_vocab")


def check_quantized_model(args: LFArgs) -> None:
    """Raises ConfigError for quantised weights without their package, and for keys that need others."""
    found: Any = getattr(read_config(args), "quantization_config", None)
    method = str(found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None))
    if found is None or method in DEQUANTIZED:
        return
    where = f"model_name_or_path {args.model.model_name_or_path!r}: quantised with {method}"
    package, module = PACKAGES.get(method, ("", ""))
    if module and importlib.util.find_spec(module) is None:
        raise ConfigError(f"{where}, for which the package {package} is not installed: pip install {package}")
    tuning = args.finetuning.finetuning_type
    if tuning not in ("lora", "oft"):
        raise ConfigError(f"{where}: finetuning_type {tuning} would train its weights; use lora or oft")
    for key in NEEDS_WEIGHTS:
        if getattr(args.finetuning, key, False) or getattr(args.model, key, False):
            raise ConfigError(f"{where}: {key} needs weights that are not")
