"""The fates of DataArguments' and GeneratingArguments' keys."""

from __future__ import annotations

from dataflex_mega.config.fate import Fate, Switch, acts, acts_with, refused
from dataflex_mega.config.fates_model import GENERATION

DATA_FATES: dict[str, Fate] = {
    **acts(
        "template", "dataset", "eval_dataset", "dataset_dir", "cutoff_len", "train_on_prompt", "mask_history",
        "overwrite_cache", "preprocessing_batch_size", "preprocessing_num_workers", "max_samples", "val_size",
        "eval_on_each_dataset", "packing", "neat_packing", "tool_format", "default_system", "enable_thinking",
        "preserve_thinking", "data_shared_file_system", "media_dir", "mix_strategy", "interleave_probs",
        "streaming", "tokenized_path",
    ),
    **acts_with(Switch(("streaming",)), {"buffer_size": 16384}),
    "ignore_pad_token_for_loss": refused("padding is never a target", None, True),
    **acts_with(GENERATION, {"eval_num_beams": None}),
}  # fmt: skip

GENERATING_FATES: dict[str, Fate] = acts_with(
    GENERATION,
    {
        "do_sample": True, "temperature": 0.95, "top_p": 0.7, "top_k": 50, "num_beams": 1, "max_length": 1024,
        "max_new_tokens": 1024, "repetition_penalty": 1.0, "length_penalty": 1.0, "skip_special_tokens": True,
    },
)  # fmt: skip
