"""The fates of FinetuningArguments' keys: what is trained, by which optimizer and loss, and the stages."""

from __future__ import annotations

from dataclasses import replace

from dataflex_mega.config.fate import STATIC_DOES, Fate, Switch, acts, acts_with, noted, refused, takes
from dataflex_mega.config.optimizers import BADAM

STAGES = ("pt", "sft", "dpo")
LORA = Switch(("finetuning_type",), ("lora",), default="lora")
OFT = Switch(("finetuning_type",), ("oft",), default="lora")
FREEZE = Switch(("finetuning_type",), ("freeze",), default="lora")
ADAPTER = Switch(("finetuning_type",), ("lora", "oft"), default="lora")
DPO = Switch(("stage",), ("dpo",), default="sft")
KTO = Switch(("stage",), ("kto",), default="sft")
PREFERENCES = Switch(("stage",), ("dpo", "kto"), default="sft")
REFERENCE = Switch(("stage",), ("dpo", "kto", "ppo"), default="sft", alternative=Switch(("use_asft_loss",)))
PPO = Switch(("stage",), ("ppo",), default="sft")

FINETUNING_FATES: dict[str, Fate] = {
    "stage": takes(STAGES, f"other stages run with {STATIC_DOES.removesuffix(' does')}"),
    # what is trained
    **acts(
        "finetuning_type", "pure_bf16", "use_llama_pro", "freeze_vision_tower", "freeze_multi_modal_projector",
        "freeze_language_model",
    ),
    **acts_with(FREEZE, {"freeze_trainable_modules": "all", "freeze_extra_modules": None}),
    **acts_with(replace(FREEZE, alternative=Switch(("use_llama_pro",))), {"freeze_trainable_layers": 2}),
    **acts_with(ADAPTER, {"additional_target": None, "create_new_adapter": False}),
    **acts_with(OFT, {"module_dropout": 0.0, "oft_rank": 0, "oft_block_size": 32, "oft_target": "all"}),
    **acts_with(
        LORA,
        {
            "lora_alpha": None, "lora_dropout": 0.0, "lora_rank": 8, "lora_target": "all", "loraplus_lr_ratio": None,
            "use_rslora": False, "use_dora": False, "pissa_init": False,
        },
    ),
    **acts_with(Switch(("loraplus_lr_ratio",)), {"loraplus_lr_embedding": 1e-6}),
    **acts_with(Switch(("pissa_init",)), {"pissa_iter": 16}),
    **acts("pissa_convert"),
    # the loss
    **acts("use_dft_loss", "use_asft_loss", "use_eaft_loss"),
    **acts_with(Switch(("use_asft_loss",)), {"asft_alpha": 0.1}),
    **acts_with(Switch(("use_eaft_loss",)), {"eaft_alpha": 1.0}),
    # optimizers
    **acts("use_galore"),
    **acts_with(
        Switch(("use_galore",)),
        {
            "galore_target": "all", "galore_rank": 16, "galore_update_interval": 200, "galore_scale": 2.0,
            "galore_proj_type": "std", "galore_layerwise": False,
        },
    ),
    **acts("use_apollo"),
    **acts_with(
        Switch(("use_apollo",)),
        {
            "apollo_target": "all", "apollo_rank": 16, "apollo_update_interval": 200, "apollo_scale": 32.0,
            "apollo_proj": "random", "apollo_proj_type": "std", "apollo_scale_type": "channel",
            "apollo_layerwise": False, "apollo_scale_front": False,
        },
    ),
    "use_badam": refused(BADAM),
    **acts_with(
        Switch(("use_badam",)),
        {
            "badam_mode": "layer", "badam_start_block": None, "badam_switch_mode": "ascending",
            "badam_switch_interval": 50, "badam_update_ratio": 0.05, "badam_mask_mode": "adjacent", "badam_verbose": 0,
        },
    ),
    **acts("use_adam_mini", "use_muon"),
    # who trains
    **acts("use_mca"),
    "use_hyper_parallel": refused(STATIC_DOES),
    **acts_with(Switch(("use_hyper_parallel",)), {"hyper_parallel_args": None}),
    # what is watched and reported
    **acts("early_stopping_steps", "plot_loss", "compute_accuracy"),
    "include_effective_tokens_per_second": noted("metrics.jsonl has the tokens of each step"),
    **acts("disable_shuffling", "use_swanlab"),
    **acts_with(
        Switch(("use_swanlab", "report_to")),
        {
            "swanlab_project": "llamafactory", "swanlab_workspace": None, "swanlab_run_name": None,
            "swanlab_mode": "cloud", "swanlab_api_key": None, "swanlab_logdir": None, "swanlab_lark_webhook_url": None,
            "swanlab_lark_secret": None,
        },
    ),
    # the stages of preferences and rewards
    **acts_with(PREFERENCES, {"pref_beta": 0.1, "pref_ftx": 0.0}),
    **acts_with(
        DPO,
        {
            "pref_loss": "sigmoid", "dpo_label_smoothing": 0.0, "simpo_gamma": 0.5, "ld_alpha": None,
        },
    ),
    "pref_bco_weight": refused("its baseline is a running mean over the batches of a process", 0.0),
    **acts_with(KTO, {"kto_chosen_weight": 1.0, "kto_rejected_weight": 1.0}),
    **acts_with(REFERENCE, {"ref_model": None, "ref_model_adapters": None}),
    "ref_model_quantization_bit": refused("the reference model is read as it is, and freed before training", None),
    **acts_with(
        PPO,
        {
            "ppo_buffer_size": 1, "ppo_epochs": 4, "ppo_score_norm": False, "ppo_target": 6.0,
            "ppo_whiten_rewards": False, "reward_model": None, "reward_model_adapters": None,
            "reward_model_quantization_bit": None, "reward_model_type": "lora",
        },
    ),
}  # fmt: skip
