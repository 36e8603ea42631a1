"""Packed rows of a model with a sliding window, in whole runs: the losses of rows of one sample."""

import shutil

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from tests.support import corpus, runs

pytestmark = pytest.mark.exhaustive
KEYS = {
    "stage": "sft", "dataset": "sft", "template": "empty", "weighter": {"name": "loss", "strategy": "uniform"},
    "max_steps": 2, "learning_rate": 0.0, "per_device_train_batch_size": 6, "logging_steps": 1,
}  # fmt: skip


def test_packed_rows_have_the_losses_of_rows_of_one_sample(tmp_path):
    folder = corpus.write(tmp_path)
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=8, initializer_range=0.2, eos_token_id=0, bos_token_id=None, pad_token_id=1,
    )  # fmt: skip
    MistralForCausalLM(config).save_pretrained(folder / "mistral")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / "model" / file, folder / "mistral" / file)
    layouts = {"ddp": {}, "fsdp2": {"fsdp": "full_shard"}, "checkpointed": {"disable_gradient_checkpointing": False}}
    configs = [
        runs.base(
            folder, **KEYS, model_name_or_path=str(folder / "mistral"), output_dir=str(folder / f"{layout}-{packs}"),
            packing=packs, cutoff_len=129 if packs else 128, **keys,  # LLaMA-Factory takes one off when packing
        )
        for layout, keys in layouts.items()
        for packs in (False, True)
    ]  # fmt: skip
    for config, (status, stderr) in zip(configs, runs.train_many(2, configs), strict=True):
        assert status == 0, f"{config['output_dir']}: {stderr}"
    losses = [[row["loss"] for row in runs.rows(config)] for config in configs]
    assert all(found == pytest.approx(losses[0], abs=2e-5) for found in losses)
