"""The fates of keys that LLaMA-Factory has got after the release that is installed with this package.

A YAML written for that version may set them; the installed one would refuse them as unknown.
"""

from __future__ import annotations

from dataflex_mega.config.fate import Fate, Switch, acts, acts_with
from dataflex_mega.config.fates_model import KTRANSFORMERS

NEWER_FATES: dict[str, Fate] = {
    **acts("use_megatron_bridge"),
    **acts_with(
        KTRANSFORMERS, dict.fromkeys(("kt_config", "kt_cpu_activation", "kt_non_expert_weight_path"))
    ),
    **acts_with(Switch(("use_hyper_parallel",)), {"hyper_parallel_cp_size": 1}),
}  # fmt: skip
