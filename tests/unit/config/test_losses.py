"""The keys of losses against each other: one line that names them, or a note."""

import pytest

from dataflex_mega.config.fates import check_fates
from dataflex_mega.config.losses import FORMS, check_losses
from dataflex_mega.errors import ConfigError

ON = {"label_smoothing_factor": 0.1, "use_dft_loss": True, "use_eaft_loss": True, "use_asft_loss": True}


@pytest.mark.parametrize("key", FORMS)
@pytest.mark.parametrize("other", FORMS)
def test_two_losses_of_a_token_are_refused_and_one_is_not(key, other):
    keys = {key: ON[key], other: ON[other]}
    if key == other:
        assert check_losses(keys) == []
        return
    with pytest.raises(ConfigError) as caught:
        check_losses(keys)
    first, second = sorted((key, other), key=FORMS.index)
    assert str(caught.value) == f"{first}, {second}: each replaces the loss of a token; keep one of them"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"label_smoothing_factor": 1.5}, "label_smoothing_factor: must be >= 0 and <= 1, found 1.5"),
        ({"label_smoothing_factor": -0.1}, "label_smoothing_factor: must be >= 0 and <= 1, found -0.1"),
        ({"use_eaft_loss": True, "eaft_alpha": -1.0}, "eaft_alpha: must be >= 0, found -1"),
        ({"asft_alpha": float("nan")}, "asft_alpha: must be finite and >= 0, found nan"),
        ({"neftune_noise_alpha": -5.0}, "neftune_noise_alpha: must be >= 0, found -5"),
        ({"moe_aux_loss_coef": -0.1}, "moe_aux_loss_coef: must be >= 0, found -0.1"),
        ({"use_dft_loss": True, "stage": "dpo"}, "use_dft_loss: needs stage: pt or sft, found 'dpo'"),
        ({"moe_aux_loss_coef": 0.1, "stage": "rm"}, "moe_aux_loss_coef: needs stage: pt or sft, found 'rm'"),
        (
            {"use_asft_loss": True, "train_from_scratch": True},
            "use_asft_loss: train_from_scratch leaves no model to stay",
        ),
        ({"use_asft_loss": True, "pissa_init": True}, "use_asft_loss: pissa_init moves weights into the adapter"),
        ({"moe_aux_loss_coef": 0.1, "use_reentrant_gc": True}, "moe_aux_loss_coef: re-entrant gradient checkpointing"),
        (
            {"compute_accuracy": True, "predict_with_generate": True},
            "compute_accuracy, predict_with_generate: LLaMA-Fac",
        ),
    ],
)
def test_what_cannot_be_is_refused(keys, message):
    with pytest.raises(ConfigError) as caught:
        check_losses(keys)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "keys",
    [
        {}, {"label_smoothing_factor": 0.0, "use_dft_loss": False, "neftune_noise_alpha": None, "moe_aux_loss_coef": 0},
        {"label_smoothing_factor": 0, "use_eaft_loss": True, "eaft_alpha": 0.5},
        {"use_asft_loss": True, "train_from_scratch": True, "ref_model": "base"},
        {"use_asft_loss": True, "pissa_init": True, "finetuning_type": "full"},
        {"moe_aux_loss_coef": 0.1, "use_reentrant_gc": True, "disable_gradient_checkpointing": True},
        {"compute_accuracy": True, "eval_strategy": "steps"},
    ],
)  # fmt: skip
def test_what_can_be_passes_without_a_note(keys):
    assert check_losses(keys) == []


def test_keys_without_effect_are_noted():
    assert check_fates({"use_eaft_loss": True, "eaft_alpha": 2.0}) == []
    assert check_fates({"eaft_alpha": 2.0}) == ["eaft_alpha: has no effect without use_eaft_loss"]
    assert check_losses({"compute_accuracy": True}) == [
        "compute_accuracy: has no effect: nothing is evaluated; eval_strategy says when"
    ]
