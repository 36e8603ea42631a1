"""The Megatron engine gives the FSDP engine's answers in every layout, and megatron-core's own loop's where nothing is
weighed. `python -m tests.parity.megatron` prints the same comparison over 20 steps and more layouts."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.parity import megatron
from tests.support import corpus, runs

pytest.importorskip("megatron.core")
pytestmark = pytest.mark.exhaustive
STEPS, FEW = megatron.STEPS, 6
TWICE = {"warmup_step": 6, "update_step": 7, "update_times": 2}  # re-planning takes most of a run's time
BY_NAME = {(layout[1], layout[0]): layout for layout in megatron.LAYOUTS}
FIRST = {"dense": BY_NAME["dense", "FSDP engine"], "experts": BY_NAME["experts", "FSDP engine"]}
NAMES = [
    ("dense", "TP2"), ("dense", "TP2 + SP"), ("dense", "PP2"), ("dense", "PP2 x VPP2"),
    ("dense", "DP2, sharded optimizer, overlaps"), ("dense", "TP2 x PP2"), ("experts", "EP2 (DP2)"), ("dense", "CP2"),
    ("dense", "CP2 x PP2, sharded optimizer"), ("experts", "CP2 x EP2 (DP1)"),
]  # fmt: skip
NO_ROLES = {
    "selector": None, "mixer": None, "weighter": None, "warmup_step": None, "update_step": None, "update_times": None,
    "weight_scope": None,
}  # fmt: skip
DOREMI = {**NO_ROLES, "mixer": {"name": "doremi"}, "update_step": 2, "update_times": -1}
RHO1 = {**NO_ROLES, "weighter": {"name": "rho1", "keep_ratio": 0.6}, "init_mixture_proportions": None}
EVALUATES = {
    "eval_dataset": "prose,tables", "eval_on_each_dataset": True, "eval_strategy": "steps", "eval_steps": 10,
}  # fmt: skip
# Name -> (keys, the layout that is compared with the FSDP engine)
REFERENCES = {
    "doremi": (DOREMI, BY_NAME["dense", "TP2 x PP2"]),
    "doremi, domains alike": (
        {**DOREMI, "mixer": {"name": "doremi", "loss_norm": "per_domain"}}, BY_NAME["dense", "PP2 x VPP2"],
    ),
    "rho1": (RHO1, BY_NAME["dense", "PP2"]),
    "rho1, whole step": ({**RHO1, "weight_scope": "step"}, BY_NAME["dense", "TP2 x PP2"]),
}  # fmt: skip
# Weights by hidden states, with the layout in which each is compared with the FSDP engine.
HIDDEN = {
    "adapt": (
        {**NO_ROLES, "weighter": {"name": "adapt", "tau": 0.1, "refresh_interval": 2}, "weight_scope": "step"},
        BY_NAME["dense", "TP2 x PP2"],
    ),
    "joint": (
        {
            **NO_ROLES, "weighter": {"name": "joint_update_aware", "tau": 0.2, "target_num_batches": 5},
            "weight_scope": "step",
        },
        BY_NAME["dense", "PP2 x VPP2"],
    ),
    "joint, micro-batch by micro-batch": (
        {**NO_ROLES, "weighter": {"name": "joint_update_aware", "tau": 0.2, "pooling": "mean_pool"}},
        BY_NAME["dense", "TP2 + SP"],
    ),
}  # fmt: skip
LESS = {
    **NO_ROLES, "selector": {"name": "less", "checkpoints": 2}, "init_mixture_proportions": None, "warmup_step": 2,
    "update_step": 2, "update_times": 2, "eval_dataset": "tables,prose", "eval_on_each_dataset": True, "max_samples": 4,
    "max_steps": FEW,
}  # fmt: skip
EVEN = {
    **NO_ROLES, "mixer": "static", "weighter": "custom", "lr_scheduler_type": "constant",
    "use_distributed_optimizer": True,
    "weight_decay": 0.0,  # a bare loop without Megatron-LM's scheduler decays norms too
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return megatron.prepare(tmp_path_factory.mktemp("engines"))


def jobs_of(folder):
    """(what it is, layout, configuration) of every run; those of one number of processes share them."""
    jobs = [(name, BY_NAME[name], config_of(folder, BY_NAME[name], **EVALUATES)) for name in NAMES]
    jobs += [
        ((model, "FSDP engine"), layout, config_of(folder, layout, **EVALUATES)) for model, layout in FIRST.items()
    ]
    for name, (keys, layout) in REFERENCES.items():
        for other in (FIRST["dense"], layout):
            # The FSDP engine compares over a whole step, as rho1 does with micro-batches only where they are the same.
            split = {} if name != "rho1" else {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
            more = {**keys, **split, "max_steps": FEW, "reference_model": str(folder / "model")}
            jobs.append(((name, other[0]), other, config_of(folder, other, name, **more)))
    for name, (keys, layout) in HIDDEN.items():
        for other in (FIRST["dense"], layout):
            # Where micro-batches are compared one by one they have to be the same.
            split = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2} if "micro" in name else {}
            more = {**keys, **split, "max_steps": FEW, "eval_dataset": "tables", "max_samples": 4}
            jobs.append(((name, other[0]), other, config_of(folder, other, name, **more)))
    layout = BY_NAME["dense", "TP2 x PP2"]
    jobs += [
        (("less", other[0]), other, config_of(folder, other, "less", **LESS)) for other in (FIRST["dense"], layout)
    ]
    for kind in ("engine", "bare loop", "bare loop, megatron-core's own layers"):
        keys = {**EVEN, "sequence_parallel": False}
        jobs.append((("even", kind), layout, config_of(folder, layout, kind, **keys) | {"run": kind}))
    return jobs


def config_of(folder, layout, name="", **keys):
    config = megatron.config_of(folder, layout, **{**TWICE, **keys})
    return {**config, "output_dir": f"{config['output_dir']}-{name}".replace(" ", "-").replace("'", "")}


def evaluations(config):
    """Step -> what evaluation found, by name."""
    state = json.loads((Path(config["output_dir"]) / "trainer_state.json").read_text())
    by_step: dict[int, dict[str, float]] = {}
    for row in state["log_history"]:  # each set has its row
        values = {key: value for key, value in row.items() if key.startswith("eval_")}
        if values:
            by_step.setdefault(row["step"], {}).update(values)
    return by_step


@pytest.fixture(scope="module")
def finished(folder):
    """What it is -> its configuration."""
    jobs = jobs_of(folder)
    for world in (1, 2, 4):
        same_world = [(name, config) for name, layout, config in jobs if layout[2] == world]
        ended = runs.train_many(world, [config for _, config in same_world], run)
        for (name, _), (status, stderr) in zip(same_world, ended, strict=True):
            assert status == 0, f"{name}: {stderr}"
    return {name: config for name, _, config in jobs}


def run(config):
    """A training run, or megatron-core's own loop on the same data."""
    keys = {key: value for key, value in config.items() if key != "run"}
    if config.get("run", "engine") == "engine":
        return runs.train_here(keys)
    return bare_run(keys, own_layers="own layers" in config["run"])


def bare_run(keys, own_layers):
    """Write losses and norms as a run does -> (0, nothing said)."""
    from dataflex_mega.config.parse import parse_config
    from dataflex_mega.engines.megatron import cpu, weights
    from dataflex_mega.engines.megatron.build import build_chunks
    from dataflex_mega.llamafactory.args import argument_types
    from dataflex_mega.run.build import prepare

    built = prepare(parse_config(keys, argument_types()))
    builder = built.session.engine_builder
    with cpu.cuda_calls_on_cpu():
        if own_layers:
            chunks = core_chunks()
            hf = builder.decoder.hf_config
            weights.load(chunks, hf, weights.HFCheckpointReader(Path(keys["model_name_or_path"]), hf))
        else:
            chunks = build_chunks(builder.decoder, builder.settings, built.session.args.training.seed)
            builder.fill(chunks)
        loop = corpus.tool("bench/megatron_overhead").BareLoop(chunks, *configs_of_bare(keys))
        trained = [loop.step([batch.tensors() for batch in micro_batches]) for micro_batches in batches_of(built)]
    if built.session.parallel_info.is_main:
        lines = [json.dumps({"loss": loss, "grad_norm": norm}) + "\n" for loss, norm in trained]
        (Path(keys["output_dir"]) / "metrics.jsonl").write_text("".join(lines))
    return 0, ""


def batches_of(built):
    """The micro-batches of every step, as the run with that configuration has them."""
    schedule, data = built.schedule, built.data
    plan = schedule.sampler.next_plan(None, 0, schedule.domains.initial_proportions)
    for step in range(STEPS):
        ids = schedule.partition.local_micro_batches(schedule.sampler.global_batch(plan, step))
        yield [data.collate(data.pool.fetch(part)) for part in ids]


def core_chunks():
    """megatron-core's model as its examples build it, with its own norms and attention."""
    import torch.nn.functional as F
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    tensor_parallel.model_parallel_cuda_manual_seed(1)
    config = TransformerConfig(
        num_layers=4, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4, num_query_groups=2,
        tensor_model_parallel_size=2, pipeline_model_parallel_size=2, pipeline_dtype=torch.float32,
        normalization="RMSNorm", layernorm_epsilon=1e-6, add_bias_linear=False, gated_linear_unit=True,
        activation_func=F.silu, hidden_dropout=0.0, attention_dropout=0.0, calculate_per_token_loss=True,
        bias_activation_fusion=False, masked_softmax_fusion=False, gradient_accumulation_fusion=False,
    )  # fmt: skip
    return [
        GPTModel(
            config, get_gpt_layer_local_spec(normalization="RMSNorm"), vocab_size=512, max_sequence_length=256,
            pre_process=parallel_state.is_pipeline_first_stage(), post_process=parallel_state.is_pipeline_last_stage(),
            share_embeddings_and_output_weights=True, position_embedding_type="rope", parallel_output=True,
        )
    ]  # fmt: skip


def configs_of_bare(keys):
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig

    ddp = DistributedDataParallelConfig(use_distributed_optimizer=True)
    optimizer = OptimizerConfig(
        optimizer="adam", lr=keys["learning_rate"], weight_decay=keys["weight_decay"], adam_eps=keys["adam_epsilon"],
        clip_grad=1.0, use_distributed_optimizer=True, params_dtype=torch.float32,
    )  # fmt: skip
    return ddp, optimizer


# -- tests ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES, ids=" ".join)
def test_losses_norms_mixtures_draws_selections_and_weights_are_those_of_the_fsdp_engine(finished, name):
    actual, expected = (megatron.outcome(finished[key]) for key in (name, (name[0], "FSDP engine")))
    assert len(actual[0]) == len(expected[0]) == STEPS
    assert list(actual[1]) == ["step_13.json", "step_6.json"]
    for key, difference in megatron.differences(actual[0], expected[0]).items():
        assert difference < 1e-5, key
    assert megatron.same_data(actual, expected)


@pytest.mark.parametrize("name", NAMES, ids=" ".join)
def test_evaluations_of_each_dataset_are_those_of_the_fsdp_engine(finished, name):
    actual, expected = (evaluations(finished[key]) for key in (name, (name[0], "FSDP engine")))
    assert list(actual) == list(expected) == [10, 20]
    for step, values in expected.items():
        assert {"eval_prose_loss", "eval_tables_loss"} <= set(values)
        for key, value in values.items():
            within = 1e-5 if key.endswith("_loss") else 1e-4  # a perplexity is the exponential of a loss
            assert actual[step][key] == pytest.approx(value, rel=within), (step, key)


def test_the_roles_did_something(finished):
    log, _ = megatron.outcome(finished["dense", "TP2 x PP2"])
    assert len({tuple(row["proportions"].values()) for row in log}) == 3, "the mixture moved twice"
    assert log[-1]["weights"]["max"] > 1.02 > 0.98 > log[-1]["weights"]["min"]


@pytest.mark.parametrize("name", REFERENCES)
def test_runs_against_a_reference_model_are_those_of_the_fsdp_engine(finished, name):
    actual, expected = (finished[name, key] for key in (REFERENCES[name][1][0], "FSDP engine"))
    for row, row0 in zip(runs.rows(actual), runs.rows(expected), strict=True):
        assert row["drawn"] == row0["drawn"]
        for key in ("loss", "objective", "grad_norm"):
            assert row[key] == pytest.approx(row0[key], rel=1e-5), (row["step"], key)
        assert row["weights"] == pytest.approx(row0["weights"], rel=1e-5)
    if name.startswith("doremi"):
        log, expected_log = (runs.rows(run_config, "doremi_weights.jsonl") for run_config in (actual, expected))
        assert len(log) == FEW // 2 and log[0]["domain_weights"] != log[-1]["domain_weights"]
        for row, row0 in zip(log, expected_log, strict=True):
            assert row["domain_weights"] == pytest.approx(row0["domain_weights"], rel=1e-5)
    blocks = [
        sorted((Path(run_config["output_dir"]) / "reference").glob("block-*.bin")) for run_config in (actual, expected)
    ]
    assert len(blocks[0]) > 0 and [b.read_bytes() for b in blocks[0]] == [b.read_bytes() for b in blocks[1]]


@pytest.mark.parametrize("name", HIDDEN)
def test_weights_by_hidden_states_are_those_of_the_fsdp_engine(finished, name):
    actual, expected = (runs.rows(finished[name, key]) for key in (HIDDEN[name][1][0], "FSDP engine"))
    assert len(actual) == FEW
    for row, row0 in zip(actual, expected, strict=True):
        for key in ("loss", "objective", "grad_norm"):
            assert row[key] == pytest.approx(row0[key], rel=2e-5), (row["step"], key)
        assert row["weights"] == pytest.approx(row0["weights"], rel=1e-3)
        assert row["weights"]["max"] > 1.01 > 0.99 > row["weights"]["min"]


def test_selections_by_gradients_are_those_of_the_fsdp_engine(finished):
    actual, expected = (megatron.outcome(finished["less", key]) for key in ("TP2 x PP2", "FSDP engine"))
    assert list(actual[1]) == ["step_2.json", "step_4.json"] and megatron.same_data(actual, expected)
    for key, difference in megatron.differences(actual[0], expected[0]).items():
        assert difference < 1e-5, key


def test_kept_tokens_make_another_objective_than_all(finished):
    rows = runs.rows(finished["rho1", "PP2"])
    assert all(abs(row["objective"] - row["loss"]) > 1e-3 for row in rows)


def test_weights_of_one_train_as_megatron_cores_own_loop_does(finished):
    """The same layers: gradients are bit-equal. Its own layers compute attention and norms in another order."""
    ours, bare, core = (runs.rows(finished["even", kind]) for kind in (
        "engine", "bare loop", "bare loop, megatron-core's own layers",
    ))  # fmt: skip
    assert [row["grad_norm"] for row in ours] == [row["grad_norm"] for row in bare]
    assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in bare], rel=1e-6)
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in ours] == pytest.approx([row[key] for row in core], rel=1e-5)
    assert ours[0]["loss"] > ours[-1]["loss"]
    assert SimpleNamespace(**ours[0]["weights"]).max == 1.0
