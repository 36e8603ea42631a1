"""Every mixer: equal proportions at every step on 1, 2 and 4 processes, for every batch partition, on both engines,
and bit-equal when continued from a checkpoint."""

import importlib.util

import pytest

from dataflex_mega.registry import list_builtin_names
from tests.support import corpus, runs

pytestmark = pytest.mark.exhaustive

STEPS, SAVED = 6, 3
MIX = {
    "update_step": 1, "update_times": -1, "init_mixture_proportions": [0.5, 0.3, 0.2], "max_steps": STEPS,
    "per_device_train_batch_size": 8,
}  # fmt: skip
PARAMETERS = {
    "doremi": {"reweight_eta": 50.0},
    "doge": {"eta": 0.5, "probe_samples": 5},
    "ado": {"start_step": 2, "refit_every": 2, "ignore_steps": 0},
    "dynamic_moe": {"count_steps": 2, "eta": 50.0},
    "group_dro": {"eta": 1.0},
    "group_dro sampling": {"eta": 1.0, "act_on": "sampling"},
    "odm": {"reward_scale": 20.0},
}
MIXERS = [*list_builtin_names("mixer"), "group_dro sampling"]
MOVING = {"random", "odm", "dynamic_moe", "group_dro sampling", "doge"}
TWO = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "fsdp": "full_shard"}
FOUR = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
MEGATRON = {
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "tensor_model_parallel_size": 2,
    "pipeline_model_parallel_size": 2, "sequence_parallel": True, "use_distributed_optimizer": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The three domains, a Llama, and a Mixtral for the mixer that needs one."""
    return corpus.write_experts(corpus.write(tmp_path_factory.mktemp("mixers")))


def config_of(folder, mixer, variant, **keys):
    name = mixer.split()[0]
    extra, model = {}, "moe" if name == "dynamic_moe" else "model"
    if name == "doremi":
        extra = {"reference_model": str(folder / "model"), "reference_cache": str(folder / "cache")}
    return runs.base(
        folder,
        output_dir=str(folder / f"{mixer.replace(' ', '-')}-{variant}"),
        mixer={"name": name, **PARAMETERS.get(mixer, {})},
        **{"model_name_or_path": str(folder / model), **MIX, **extra, **keys},
    )


def train(world, configs):
    """Run all of them; each must succeed."""
    for name, (status, stderr) in zip(configs, runs.train_many(world, list(configs.values())), strict=True):
        assert status == 0, f"{name}: {stderr}"


@pytest.fixture(scope="module")
def whole(folder):
    """One process, one micro-batch a step, a checkpoint in the middle; and from there on once more."""
    configs = {mixer: config_of(folder, mixer, "whole", save_strategy="steps", save_steps=SAVED) for mixer in MIXERS}
    rest = {f"{mixer} again": resumed(folder, mixer) for mixer in MIXERS}
    train(1, configs | rest)
    return configs


def resumed(folder, mixer, **keys):
    checkpoint = folder / f"{mixer.replace(' ', '-')}-whole" / f"checkpoint-{SAVED}"
    return config_of(folder, mixer, "again", resume_from_checkpoint=str(checkpoint), **keys)


def compare(config, expected_config, name):
    """Draws and proportions of every step; loss and gradient too."""
    rows, rows0 = runs.rows(config), runs.rows(expected_config)
    assert [row["step"] for row in rows] == [row["step"] for row in rows0] == list(range(1, STEPS + 1)), name
    for row, row0 in zip(rows, rows0, strict=True):
        assert row["drawn"] == row0["drawn"], f"{name}, step {row['step']}"
        assert row["proportions"] == pytest.approx(row0["proportions"], rel=1e-5), f"{name}, step {row['step']}"
        assert row["loss"] == pytest.approx(row0["loss"], rel=1e-5), f"{name}, step {row['step']}"
        assert row["objective"] == pytest.approx(row0["objective"], rel=1e-5), f"{name}, step {row['step']}"


def test_two_processes_with_accumulation_and_shards(folder, whole):
    configs = {mixer: config_of(folder, mixer, "two", **TWO) for mixer in MIXERS}
    train(2, configs)
    for mixer, config in configs.items():
        compare(config, whole[mixer], mixer)


def test_four_processes_and_four_of_megatron(folder, whole):
    configs = {(mixer, "four"): config_of(folder, mixer, "four", **FOUR) for mixer in MIXERS}
    if importlib.util.find_spec("megatron") is not None:
        configs |= {(mixer, "megatron"): config_of(folder, mixer, "megatron", **MEGATRON) for mixer in MIXERS}
    train(4, configs)
    for (mixer, variant), config in configs.items():
        compare(config, whole[mixer], f"{mixer}, {variant}")


def test_mixers_did_something(whole):
    first = {mixer: runs.rows(config)[-1] for mixer, config in whole.items()}
    for mixer in MOVING:
        assert list(first[mixer]["proportions"].values()) != pytest.approx([0.5, 0.3, 0.2], rel=1e-3), mixer
    for mixer in ("doremi", "group_dro"):
        assert first[mixer]["objective"] != pytest.approx(first[mixer]["loss"], rel=1e-4), mixer


def test_every_mixer_goes_on_from_a_checkpoint_bit_by_bit(folder, whole):
    for mixer, config in whole.items():
        rest = runs.rows(resumed(folder, mixer))
        assert [row["step"] for row in rest] == list(range(SAVED + 1, STEPS + 1))
        for row, row0 in zip(rest, runs.rows(config)[SAVED:], strict=True):
            assert {k: v for k, v in row.items() if k != "seconds"} == {
                k: v for k, v in row0.items() if k != "seconds"
            }, mixer
        for file in (folder / f"{mixer.replace(' ', '-')}-again").glob("*_weights.jsonl"):
            later = [row for row in runs.rows(config, file.name) if row["step"] >= SAVED]
            resumed_rows = runs.rows(resumed(folder, mixer), file.name)
            assert [{**row, "timestamp": 0} for row in resumed_rows] == [{**row, "timestamp": 0} for row in later], (
                mixer
            )


def test_a_mixer_with_other_domains_is_refused_with_the_difference_named(folder, whole):
    fewer = resumed(folder, "odm", dataset="code,prose", init_mixture_proportions=[0.6, 0.4])
    order = resumed(folder, "ado", dataset="prose,code,tables")
    other = resumed(folder, "group_dro")
    other["mixer"] = {"name": "group_dro", "eta": 0.5}
    dense = config_of(folder, "dynamic_moe", "dense", model_name_or_path=str(folder / "model"))
    finished = runs.train_many(1, [fewer, order, other, dense])
    expected = (
        'dataset: "code,prose,tables" there, "code,prose" here',
        'dataset: "code,prose,tables" there, "prose,code,tables" here',
    )
    for message, (status, stderr) in zip((*expected, "mixer: ", "needs a mixture of experts"), finished, strict=True):
        assert status == 2 and message in stderr and stderr.count("error: ") == 1, stderr
