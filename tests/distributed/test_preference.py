"""Runs with pairs of answers: every layout, resumed, beside LLaMA-Factory's own trainer, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest

from tests.support import pairs, runs

DPO = {
    "stage": "dpo", "dataset": "first,second", "template": "default", "cutoff_len": 64, "per_device_eval_batch_size": 3,
    "max_steps": 4, "val_size": 4, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2,
    "warmup_step": 1, "update_step": 2, "learning_rate": 1.0e-3,
}  # fmt: skip
LORA = {"finetuning_type": "lora", "lora_rank": 4, "lora_target": "all"}
ROLES = {
    "mixer": {"name": "odm", "reward_scale": 5.0}, "weighter": {"name": "loss"}, "weight_scope": "step",
}  # fmt: skip
SELECTED = {"selector": {"name": "loss"}, "update_times": 2, "max_samples": 8}
# Name -> (keys of all layouts): each is trained by one process, by two with DDP, and by two with FSDP2.
TRAINED = {
    "lora": {**LORA, **ROLES},
    "full": {**ROLES, "ref_model": "reference", "pref_ftx": 0.3},
    "orpo": {**LORA, **SELECTED, "weighter": {"name": "focal"}, "weight_scope": "step", "pref_loss": "orpo"},
}
LAYOUTS = {
    "single": (1, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}),
    "ddp": (2, {"per_device_train_batch_size": 2}),
    "fsdp2": (2, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "fsdp": "full_shard"}),
}


def config_of(folder, name, **keys):
    keys = {**DPO, **keys}
    if "ref_model" in keys:
        keys["ref_model"] = str(folder / keys["ref_model"])
    return runs.base(folder, output_dir=str(folder / "out" / name), **keys)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return pairs.write(tmp_path_factory.mktemp("preference"))


@pytest.fixture(scope="module")
def trained(folder):
    """A name of TRAINED -> by layout its configuration, after the run; each is trained when it is first asked for."""
    finished = {}

    def train(name):
        if name not in finished:
            finished[name] = {
                layout: config_of(folder, f"{name}-{layout}", **TRAINED[name], **keys)
                for layout, (_, keys) in LAYOUTS.items()
            }
            for world in (1, 2):
                mine = [config for layout, config in finished[name].items() if LAYOUTS[layout][0] == world]
                for config, (status, stderr) in zip(mine, runs.train_many(world, mine), strict=True):
                    assert status == 0, f"{config['output_dir']}: {stderr[-3000:]}"
        return finished[name]

    return train


def evaluations(config):
    return [row for row in runs.rows(config, "trainer_log.jsonl") if "eval_loss" in row]


OFTEN, SELDOM = "lora", [pytest.param(name, marks=pytest.mark.exhaustive) for name in TRAINED if name != "lora"]


@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", [OFTEN, *SELDOM])
def test_all_layouts_train_the_same(trained, name, layout):
    configs = trained(name)
    one, other = runs.rows(configs["single"]), runs.rows(configs[layout])
    assert len(one) == len(other) == DPO["max_steps"]
    for row, expected in zip(other, one, strict=True):
        assert row["drawn"] == expected["drawn"] and row["proportions"] == pytest.approx(
            expected["proportions"], rel=1e-4
        )
        for key in ("loss", "objective", "grad_norm", "logps/chosen", "rewards/margins"):
            assert row[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-5), key
        weights, alone = row.get("weights"), expected.get("weights")
        assert weights == (None if row["step"] == 1 else pytest.approx(alone, rel=1e-4)), "none in the warm-up"
    losses = [[row["eval_loss"] for row in evaluations(configs[name])] for name in ("single", layout)]
    assert len(losses[0]) == 2 and losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_the_first_step_has_no_margin_where_the_model_is_its_own_reference(trained):
    first = runs.rows(trained("lora")["fsdp2"])[0]
    assert first["loss"] == pytest.approx(0.69314718, abs=1e-5) and first["rewards/margins"] == pytest.approx(
        0, abs=1e-4
    )


@pytest.mark.exhaustive
def test_adapters_are_trained_in_bf16_sharded_as_they_are_whole(folder):
    """The reference pass, in which adapters are off, is the first that FSDP2 sees."""
    keys = {**LORA, **ROLES, "bf16": True, "max_steps": 3, "save_strategy": "no"}
    configs = [config_of(folder, f"bf16-{layout}", **keys, **LAYOUTS[layout][1]) for layout in ("ddp", "fsdp2")]
    for status, stderr in runs.train_many(2, configs):
        assert status == 0, stderr[-3000:]
    whole, sharded = ([row["logps/chosen"] for row in runs.rows(config)] for config in configs)
    assert sharded == pytest.approx(whole, rel=1e-3)


@pytest.mark.exhaustive
def test_another_reference_gives_a_margin_at_once(trained):
    assert abs(runs.rows(trained("full")["fsdp2"])[0]["rewards/margins"]) > 1e-3


@pytest.mark.exhaustive
def test_a_selection_is_of_pairs_by_their_loss(trained):
    """ORPO's is close to the mean token loss of the chosen answer, some 6 per pair, not 60 as the sum of a row."""
    selection = json.loads((Path(trained("orpo")["single"]["output_dir"]) / "selections" / "step_1.json").read_text())
    scores = selection["metric"]["loss"]
    assert len(set(scores)) > 3 and all(5 < score < 8 for score in scores)


@pytest.mark.parametrize(
    ("name", "layout"), [("lora", "ddp"), pytest.param("full", "fsdp2", marks=pytest.mark.exhaustive)]
)
def test_a_resumed_run_is_bit_equal(folder, trained, name, layout):
    """From its middle, and with the reference computed again because its folder is gone."""
    config = trained(name)[layout]
    copy = {**config, "output_dir": config["output_dir"] + "-resumed"}
    shutil.copytree(config["output_dir"], copy["output_dir"])
    shutil.rmtree(Path(copy["output_dir"]) / "checkpoint-4")
    shutil.rmtree(Path(copy["output_dir"]) / "reference")
    [(status, stderr)] = runs.train_many(2, [copy])
    assert status == 0 and "at step 2 of 4" in stderr, stderr[-3000:]
    assert runs.rows(copy) == runs.rows(config)


@pytest.mark.exhaustive
def test_another_reference_is_refused_on_resume(folder, trained):
    config = trained("full")["single"]
    changed = folder / "changed"
    shutil.copytree(folder / "reference", changed)
    (changed / "generation_config.json").write_text('{"max_length": 7}')
    [(status, stderr)] = runs.train_many(1, [{**config, "ref_model": str(changed), "max_steps": 6}], plain=True)
    assert status != 0 and "ref_model" in stderr and "Traceback" not in stderr


STATIC = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "dataset": "two",
    "logging_steps": 1,
    "ref_model": "reference",
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("loss", ["sigmoid", "simpo"])
def test_two_steps_equal_llamafactorys_own(folder, loss):
    """Both pairs are in each step; the second step's loss is of a model that the first has changed."""
    keys = {
        **STATIC, "learning_rate": 1.0e-3, "warmup_step": None, "update_step": None, "val_size": None, "eval_strategy": None,
        "save_strategy": "no", "pref_loss": loss, "lr_scheduler_type": "constant",
    }  # fmt: skip
    if loss == "simpo":
        del keys["ref_model"]
    ours = config_of(folder, f"ours-{loss}", **keys, weighter={"name": "loss", "strategy": "uniform"})
    theirs = config_of(folder, f"theirs-{loss}", **keys, do_train=True, report_to="none")
    for config in (ours, theirs):
        [(status, stderr)] = runs.train_many(1, [config], plain=True)
        assert status == 0, stderr[-3000:]
    expected = [row["loss"] for row in runs.rows(theirs, "trainer_log.jsonl") if "loss" in row]
    assert [row["loss"] for row in runs.rows(ours)] == pytest.approx(
        expected, abs=1e-4
    )  # theirs is rounded to 4 digits


WEIGHT = {
    "weighter": {"name": "loss"},
    "val_size": None,
    "eval_strategy": None,
    "warmup_step": None,
    "update_step": None,
}
BARE = {"save_strategy": "no", **WEIGHT}
# Name -> (keys, what the line must contain)
REFUSED = {
    "pair of kto": ({**BARE, "pref_loss": "kto_pair"}, ["pref_loss", "kto_pair", "micro-batch", "sigmoid"]),
    "pref_loss typo": ({**BARE, "pref_loss": "sigmoit"}, ["pref_loss", "sigmoit", "sigmoid"]),
    "beta 0": ({**BARE, "pref_beta": 0.0}, ["pref_beta", "0"]),
    "accuracy": ({**BARE, "compute_accuracy": True}, ["compute_accuracy", "rewards/accuracies"]),
    "bco": ({**BARE, "pref_bco_weight": 0.5}, ["pref_bco_weight"]),
    "smoothing": ({**BARE, "pref_loss": "ipo", "dpo_label_smoothing": 0.1}, ["dpo_label_smoothing", "ipo"]),
    "adapters alone": ({**BARE, "ref_model_adapters": "/a"}, ["ref_model_adapters", "ref_model"]),
    "no reference": ({**BARE, "ref_model": "gone"}, ["ref_model", "gone"]),
    "engine": ({**BARE, "engine": "megatron"}, ["stage", "dpo", "engine: fsdp"]),
    "less": ({**DPO, "weighter": None, "selector": {"name": "less"}, "update_times": 1}, ["selector less", "dpo"]),
    "rho1": ({**BARE, "weighter": {"name": "rho1"}, "reference_model": None}, ["weighter rho1", "dpo"]),
    "greats": ({**DPO, **BARE, "val_size": 4, "weighter": {"name": "greats"}}, ["weighter greats", "dpo"]),
    "doge": ({**DPO, "mixer": {"name": "doge"}}, ["mixer doge", "dpo"]),
    "doremi": ({**DPO, "mixer": {"name": "doremi"}}, ["mixer doremi", "dpo"]),
    "not pairs": ({**BARE, "dataset": "sft"}, ["sft", "ranking"]),
    "pairs elsewhere": ({**BARE, "stage": "sft"}, ["first", "ranking", "sft"]),
    "ppo": ({**BARE, "stage": "ppo"}, ["stage", "ppo"]),
    "kto": ({**BARE, "stage": "kto"}, ["stage", "kto"]),
    "rm": ({**BARE, "stage": "rm"}, ["stage", "rm"]),
}


def test_what_cannot_be_is_refused_in_one_line(folder):
    configs = {
        name: config_of(folder, f"refused-{number}", **keys) for number, (name, (keys, _)) in enumerate(REFUSED.items())
    }
    for name, (status, stderr) in zip(configs, runs.train_many(1, list(configs.values()), plain=True), strict=True):
        line = stderr.strip().splitlines()[-1]
        missing = [word for word in REFUSED[name][1] if word not in line]
        assert status == 2 and not missing and "Traceback" not in stderr, f"{name}: {missing} not in {line}"


TALK = {
    "formatting": "sharegpt", "ranking": True,
    "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"},
}  # fmt: skip
ASK, SAY, NO = (
    {"from": role, "value": text} for role, text in (("human", "Why?"), ("gpt", "Because."), ("gpt", "No."))
)
GOOD = {"conversations": [ASK], "chosen": SAY, "rejected": NO}
# Name -> (entry, the second row, what the line must contain); the first row is sound.
BAD_ROWS = {
    "null": (None, {"instruction": "a", "chosen": "b", "rejected": None}, ["'rejected'", "null"]),
    "number": (None, {"instruction": "a", "chosen": None, "rejected": "c"}, ["'chosen'", "null"]),
    "answered": (TALK, {**GOOD, "conversations": [ASK, SAY]}, ["'conversations'", "'gpt'", "'human'"]),
    "by the user": (TALK, {**GOOD, "chosen": ASK}, ["'chosen'", "'from'", "'human'", "'gpt'"]),
    "without text": (TALK, {**GOOD, "rejected": {"from": "gpt", "value": None}}, ["'rejected'", "'value'", "null"]),
    "no column": ({**pairs.COLUMNS, "columns": {"prompt": "instruction", "chosen": "chosen", "rejected": "rejectd"}},
                  pairs.rows(1)[0], ["rejectd", "rejected"]),
    "unnamed": ({"ranking": True, "columns": {"prompt": "instruction", "chosen": "chosen"}}, pairs.rows(1)[0], ["rejected"]),
}  # fmt: skip


@pytest.mark.exhaustive
def test_bad_rows_are_named(folder):
    configs = {}
    for number, (name, (entry, row, _)) in enumerate(BAD_ROWS.items()):
        good = GOOD if entry is TALK else pairs.rows(1)[0]
        pairs.add(folder / "data", f"bad{number}", [good, row], **(entry or {}))
        configs[name] = config_of(folder, f"bad-{number}", **BARE, dataset=f"bad{number}", max_steps=1)
    for number, (name, (_, stderr)) in enumerate(
        zip(configs, runs.train_many(1, list(configs.values()), plain=True), strict=True)
    ):
        lines = [line for line in stderr.splitlines() if f"bad{number}" in line]
        found = [line for line in lines if all(word in line for word in BAD_ROWS[name][2])]
        assert found and "Traceback" not in stderr, f"{name}: {stderr[-1500:]}"
