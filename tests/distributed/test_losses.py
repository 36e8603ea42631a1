"""Runs with another loss than cross-entropy: equal in every layout, resumed bit-equal, evaluated and refused."""

import re
import shutil
from pathlib import Path

import pytest
import torch

from tests.support import corpus, runs
from tests.support.bad_inputs import check_line
from tests.support.built_run import build_run

ROLES = {"mixer": "odm", "weighter": "loss", "update_step": 2, "update_times": -1}
LORA = {"finetuning_type": "lora", "lora_target": "q_proj,v_proj", "lora_rank": 4}
FORMS = {
    "smoothing": {"label_smoothing_factor": 0.2},
    "dft": {"use_dft_loss": True},
    "eaft": {"use_eaft_loss": True, "eaft_alpha": 0.7},
    "asft": {"use_asft_loss": True, "asft_alpha": 0.5},
    "asft of an adapter": {"use_asft_loss": True, "asft_alpha": 0.5, **LORA},
}
TWO = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "weight_scope": "step"}
NOISY = {"neftune_noise_alpha": 5.0, "per_device_train_batch_size": 4, "weight_scope": "step"}
EVALUATES = {"eval_dataset": "tables", "eval_strategy": "steps", "eval_steps": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return corpus.write_experts(corpus.write(tmp_path_factory.mktemp("losses")))


def config_of(folder, name, **keys):
    options = {"max_steps": 4, "max_samples": 16, **ROLES, **keys}
    return runs.base(folder, output_dir=str(folder / name.replace(" ", "-")), **options)


def same(rows, expected, tolerance=2e-5):
    for row, other in zip(rows, expected, strict=True):
        assert row["drawn"] == other["drawn"]
        for key in ("loss", "objective", "grad_norm"):
            assert row[key] == pytest.approx(other[key], rel=tolerance), key


def train(world, configs):
    results = runs.train_many(world, configs)
    for status, stderr in results:
        assert status == 0, stderr
    return results


def test_a_run_of_each_form_is_evaluated_by_cross_entropy_and_resumes_bit_equal(folder):
    saving = {"save_strategy": "steps", "save_steps": 2, **EVALUATES, "compute_accuracy": True}
    chosen = {"dft": {**FORMS["dft"], **NOISY}, "asft of an adapter": FORMS["asft of an adapter"]}
    configs = [config_of(folder, f"{name} whole", **saving, **keys) for name, keys in chosen.items()]
    printed = [stderr for _, stderr in train(1, configs)]
    resumed = [config_of(folder, f"{name} resumed", **saving, **keys) for name, keys in chosen.items()]
    for whole, again in zip(configs, resumed, strict=True):
        shutil.copytree(whole["output_dir"], again["output_dir"])
        shutil.rmtree(Path(again["output_dir"]) / "checkpoint-4")
    train(1, resumed)
    for whole, again in zip(configs, resumed, strict=True):
        expected, found = ([{**row, "seconds": 0} for row in runs.rows(c)] for c in (whole, again))
        assert found == expected
    for stderr in printed:
        loss, accuracy = (float(re.search(f"eval_{name} ([0-9.]+)", stderr).group(1)) for name in ("loss", "accuracy"))
        assert loss > 3 and 0 <= accuracy <= 1, "plain cross-entropy"
    dft = runs.rows(configs[0])
    assert dft[0]["objective"] < 0.1 < 3 < dft[0]["loss"], "p * ce is small where ce is large"


@pytest.mark.exhaustive
def test_every_layout_gives_the_same(folder):
    alone = {name: config_of(folder, f"{name} 1", **keys) for name, keys in FORMS.items()}
    train(1, list(alone.values()))
    layouts = {"ddp": None, "fsdp2": "full_shard"}
    two = {
        (name, mode): config_of(folder, f"{name} {mode}", fsdp=fsdp, **{**keys, **TWO})
        for name, keys in FORMS.items()
        for mode, fsdp in layouts.items()
    }
    train(2, list(two.values()))
    for (name, _), config in two.items():
        same(runs.rows(config), runs.rows(alone[name]))


@pytest.mark.exhaustive
def test_load_balancing_is_the_same_in_every_layout_also_where_activations_are_recomputed(folder):
    balanced = {"model_name_or_path": str(folder / "moe"), "moe_aux_loss_coef": 0.5, "per_device_train_batch_size": 4,
                "weight_scope": "step"}  # fmt: skip
    recomputing = {**balanced, "disable_gradient_checkpointing": False}
    alone = config_of(folder, "experts 1", gradient_accumulation_steps=2, **balanced)
    without = config_of(folder, "experts unbalanced", **{**balanced, "moe_aux_loss_coef": 0, "max_steps": 1})
    layouts = ({"ddp_find_unused_parameters": True}, {"fsdp": "full_shard"})
    two = [config_of(folder, f"experts two {i}", **recomputing, **keys) for i, keys in enumerate(layouts)]
    train(1, [alone, without])
    train(2, two)
    for config in two:
        same(runs.rows(config), runs.rows(alone))
    assert runs.rows(alone)[0]["objective"] > runs.rows(without)[0]["objective"] + 0.4


TIMES = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")


def evaluated(config):
    run, trainer = build_run(config)
    with run.held:
        before = torch.get_rng_state()
        results = {key: value for key, value in trainer.evaluate().items() if key not in TIMES}
        trainer.loader.close()
        return results, bool(torch.equal(torch.get_rng_state(), before))


@pytest.mark.exhaustive
def test_evaluations_answer_prompts_alike_on_every_layout_and_leave_the_random_state_alone(folder):
    keys = {
        "stage": "sft", "template": "default", "dataset": "sft", "eval_dataset": "sft", "max_samples": 5, "mixer": None,
        "update_step": None, "update_times": None, "predict_with_generate": True, "max_new_tokens": 6, "cutoff_len": 64,
        "eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "rouge-l", "early_stopping_steps": 3,
        "per_device_eval_batch_size": 2,
    }  # fmt: skip
    ((alone, untouched),) = runs.train_many(1, [config_of(folder, "answers", **keys)], run=evaluated)
    assert untouched and {"eval_loss", "eval_rouge-1", "eval_rouge-2", "eval_rouge-l", "eval_bleu-4"} <= set(alone)
    two = [config_of(folder, f"answers {fsdp}", fsdp=fsdp, **keys) for fsdp in (None, "full_shard")]
    for results, untouched in runs.train_many(2, two, run=evaluated):
        assert untouched and results == pytest.approx(alone, rel=1e-5)


@pytest.mark.exhaustive
def test_what_cannot_be_is_refused_in_one_line(folder):
    cases = [
        ({"use_dft_loss": True, "use_eaft_loss": True}, ["use_dft_loss, use_eaft_loss:"]),
        ({"moe_aux_loss_coef": 0.1}, ["moe_aux_loss_coef: a llama has no load-balancing loss"]),
        ({"use_asft_loss": True, "ref_model": "nowhere"}, ["ref_model 'nowhere'"]),
    ]
    results = runs.train_many(1, [config_of(folder, f"bad {i}", **keys) for i, (keys, _) in enumerate(cases)])
    for (status, stderr), (_, words) in zip(results, cases, strict=True):
        check_line(status, stderr, words)


@pytest.mark.exhaustive
def test_the_megatron_engine_acts_on_the_keys_or_refuses_them(folder):
    pytest.importorskip("megatron.core")
    engine = {"engine": "megatron", "max_steps": 2}
    experts = {"model_name_or_path": str(folder / "moe"), "moe_aux_loss_coef": 0.5, **engine}
    cases = {
        "smoothing": ({**engine, **FORMS["smoothing"], **EVALUATES, "eval_steps": 2, "compute_accuracy": True}, []),
        "experts": (experts, []),
        "both names": ({**experts, "moe_aux_loss_coef": 0, "moe_aux_loss_coeff": 0.5}, []),
        "neither": ({**experts, "moe_aux_loss_coef": 0}, []),
        "asft": (
            {**engine, "use_asft_loss": True},
            ["use_asft_loss: engine: megatron does not do this; a second model"],
        ),
        "noise": ({**engine, "neftune_noise_alpha": 5}, ["neftune_noise_alpha: engine: megatron does not do this"]),
        "dense": ({**engine, "moe_aux_loss_coef": 0.1}, ["moe_aux_loss_coef: a llama has no load-balancing loss"]),
        "two values": ({**experts, "moe_aux_loss_coeff": 0.1}, ["moe_aux_loss_coef: 0.5, but Megatron's"]),
    }
    configs = {name: config_of(folder, f"megatron {name}", **keys) for name, (keys, _) in cases.items()}
    for (name, (_, words)), (status, stderr) in zip(
        cases.items(), runs.train_many(1, list(configs.values())), strict=True
    ):
        if words:
            check_line(status, stderr, words)
        else:
            assert status == 0, (name, stderr)
    alone = config_of(folder, "smoothing 2", **{**FORMS["smoothing"], "max_steps": 2})
    train(1, [alone])
    same(runs.rows(configs["smoothing"]), runs.rows(alone), 1e-4)
    norms = [runs.rows(configs[name])[0]["grad_norm"] for name in ("experts", "both names", "neither")]
    assert norms[0] == norms[1] != norms[2]
