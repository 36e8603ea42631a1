"""Every optimizer and quantised LoRA on every layout: do the losses equal those of one process, and does a run resume?

    python tools/bench/optimizers.py [NAME ...]          # with the extras `quant` and `optimizers`

Each run has six steps on real text, with a weighter; a second one continues from the checkpoint at step 3. Printed is, for
each layout, the largest difference of a step's loss to one process, and of the steps after the restart ("0" is bit-equal).
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.support import corpus, runs

RANK = "rank=4,update_proj_gap=2"
LORA = {"finetuning_type": "lora", "lora_rank": 4, "lora_target": "all"}
ROLES = {
    "selector": {"name": "loss"}, "mixer": {"name": "odm", "reward_scale": 5.0}, "weighter": {"name": "loss"},
    "warmup_step": 2, "update_step": 3, "update_times": 5, "max_samples": 12,
}  # fmt: skip
QLORA = {**LORA, **ROLES, "quantization_bit": 4, "learning_rate": 1.0e-2}
OPTIM = (
    "adamw_torch", "adamw_torch_fused", "sgd", "rmsprop", "adagrad", "adafactor", "adamw_8bit", "paged_adamw_32bit",
    "ademamix", "ademamix_8bit", "lion_32bit", "lion_8bit", "paged_lion_8bit", "rmsprop_bnb", "rmsprop_bnb_8bit",
    "stable_adamw",
)  # fmt: skip
VARIANTS = {
    **{name: {"optim": name} for name in OPTIM},
    "muon": {"use_muon": True},
    "muon, LoRA": {"use_muon": True, **LORA},
    "galore": {"use_galore": True, "galore_rank": 4, "galore_update_interval": 2},
    "galore, adafactor": {"use_galore": True, "optim": "adafactor", "galore_rank": 4},
    "apollo": {"use_apollo": True, "apollo_rank": 4, "apollo_update_interval": 2},
    "adam_mini": {"use_adam_mini": True},
    "galore_adamw": {"optim": "galore_adamw", "optim_target_modules": ["q_proj", "up_proj"], "optim_args": RANK},
    "galore_adafactor": {"optim": "galore_adafactor", "optim_target_modules": "all-linear", "optim_args": RANK},
    "apollo_adamw": {"optim": "apollo_adamw", "optim_target_modules": "all-linear", "optim_args": RANK},
    "LoRA+": {**LORA, "loraplus_lr_ratio": 4.0},
    "adamw_8bit, LoRA": {**LORA, "optim": "adamw_8bit"},
    "nf4": QLORA,
    "fp4, single scales": {**QLORA, "quantization_type": "fp4", "double_quantization": False},
    "nf4, bf16": {**QLORA, "bf16": True},
    "int8": {**QLORA, "quantization_bit": 8},
    "nf4, gradient checkpointing": {**QLORA, "disable_gradient_checkpointing": False},
    "nf4, OFT": {**QLORA, "finetuning_type": "oft", "lora_rank": None, "oft_rank": 0, "oft_block_size": 8},
}
SHARDED = {"fsdp": "full_shard"}


def main(names: list[str]) -> None:
    folder = corpus.write(Path(tempfile.mkdtemp()) / "data", hidden=64)
    single: dict[str, list[float]] = {}
    for mode, world, layout in (("single", 1, {}), ("ddp", 2, {}), ("fsdp2", 2, SHARDED)):
        for name in names or list(VARIANTS):
            result, losses, difference = try_one(folder, f"{mode}-{name}", world, {**VARIANTS[name], **layout})
            if mode == "single":
                single[name] = losses
            apart = max((abs(a - b) for a, b in zip(losses, single[name], strict=False)), default=float("nan"))
            print(f"{name:28} {mode:7} {f'{apart:.1e}, resumed {difference:g}' if losses else result}", flush=True)


def try_one(folder: Path, name: str, world: int, keys: dict) -> tuple[str, list[float], float]:
    """(the last line of its error, the losses, by how much those after a restart differ)."""
    options = {"per_device_train_batch_size": 8 // world, "learning_rate": 1.0e-3, "weighter": {"name": "loss"}, **keys}
    config = runs.base(folder, output_dir=str(folder / name), save_strategy="steps", save_steps=3, **options)
    ((status, stderr),) = runs.train_many(world, [config], plain=world == 1)
    if status:
        return stderr.strip().splitlines()[-1], [], 0.0
    losses = [row["loss"] for row in runs.rows(config)]
    shutil.rmtree(Path(config["output_dir"]) / "checkpoint-6")
    ((status, stderr),) = runs.train_many(world, [config], plain=world == 1)
    if status:
        return f"resumed: {stderr.strip().splitlines()[-1]}", [], 0.0
    again = [row["loss"] for row in runs.rows(config)]
    return "", losses, max(abs(a - b) for a, b in zip(losses, again, strict=True))


if __name__ == "__main__":
    main(sys.argv[1:])
