"""What `accelerate launch` exports becomes the layout of a run with a role, once, and nobody acts on it again."""

import pytest

from dataflex_mega.config import launchers
from dataflex_mega.config.identity import identity
from dataflex_mega.config.parse import parse_config
from dataflex_mega.errors import ConfigError
from tests.unit.config.test_deepspeed import KEYS

RAY = {"ray_num_workers": int, "ray_init_kwargs": dict | str | None, "disable_gradient_checkpointing": bool}
ALWAYS = {
    "ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_DYNAMO_MODE": "default",
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": "False", "ACCELERATE_DYNAMO_USE_DYNAMIC": "False", "RANK": "0", "WORLD_SIZE": "2",
}  # fmt: skip
FSDP_1 = {
    **ALWAYS, "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1", "FSDP_SHARDING_STRATEGY": "FULL_SHARD",
    "FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_OFFLOAD_PARAMS": "false", "FSDP_MIN_NUM_PARAMS": "100000000",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_BACKWARD_PREFETCH": "BACKWARD_PRE",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT", "FSDP_FORWARD_PREFETCH": "false", "FSDP_USE_ORIG_PARAMS": "false",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true", "FSDP_SYNC_MODULE_STATES": "true", "FSDP_ACTIVATION_CHECKPOINTING": "false",
}  # fmt: skip
FSDP_2 = {**FSDP_1, "FSDP_VERSION": "2"}
DEEPSPEED = {
    "ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none", "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true", "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1", "ACCELERATE_CONFIG_DS_FIELDS": "", "RANK": "0", "WORLD_SIZE": "2",
}  # fmt: skip


def parse(environment, **keys):
    return parse_config({"weighter": "loss", **keys}, {**KEYS, **RAY}, None, environment)


def taken(environment, **keys):
    return {key: value for key, value in parse(environment, **keys).llamafactory.items() if key not in keys}


def fails(environment, **keys):
    with pytest.raises(ConfigError) as caught:
        parse(environment, **keys)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, {}),
        (ALWAYS, {}),
        (FSDP_1, {"fsdp": "full_shard"}),
        ({**FSDP_1, "FSDP_SHARDING_STRATEGY": "1"}, {"fsdp": "full_shard"}),
        ({**FSDP_1, "FSDP_SHARDING_STRATEGY": "SHARD_GRAD_OP"}, {"fsdp": "shard_grad_op"}),
        ({**FSDP_1, "FSDP_SHARDING_STRATEGY": "2"}, {"fsdp": "shard_grad_op"}),
        ({**FSDP_1, "FSDP_SHARDING_STRATEGY": "NO_SHARD"}, {}),
        ({**FSDP_1, "FSDP_SHARDING_STRATEGY": "3"}, {}),
        ({**FSDP_1, "FSDP_RESHARD_AFTER_FORWARD": "false"}, {"fsdp": "full_shard"}),  # version 2 only
        (FSDP_2, {"fsdp": "full_shard"}),
        ({**FSDP_2, "FSDP_RESHARD_AFTER_FORWARD": "false"}, {"fsdp": "shard_grad_op"}),
        ({**FSDP_2, "FSDP_SHARDING_STRATEGY": "HYBRID_SHARD"}, {"fsdp": "full_shard"}),  # version 1 only
        ({**FSDP_1, "FSDP_OFFLOAD_PARAMS": "true"}, {"fsdp": "full_shard offload"}),
        ({**FSDP_1, "ACCELERATE_USE_FSDP": "false"}, {}),
        ({**FSDP_1, "ACCELERATE_MIXED_PRECISION": "bf16"}, {"fsdp": "full_shard", "bf16": True}),
        ({**FSDP_1, "ACCELERATE_MIXED_PRECISION": "fp16"}, {"fsdp": "full_shard", "fp16": True}),
        ({**ALWAYS, "ACCELERATE_MIXED_PRECISION": "bf16"}, {"bf16": True}),
        ({**FSDP_1, "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer, Other"},
         {"fsdp": "full_shard", "fsdp_config": {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer", "Other"]}}),
        ({**ALWAYS, "ACCELERATE_USE_CPU": "True"}, {"use_cpu": True}),
        ({**ALWAYS, "ACCELERATE_USE_CPU": "False"}, {}),
        (DEEPSPEED, {"fsdp": "full_shard", "bf16": True}),
        ({**DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}, {"bf16": True}),
        ({**DEEPSPEED, "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"}, {"fsdp": "full_shard offload", "bf16": True}),
        ({**DEEPSPEED, "ACCELERATE_GRADIENT_CLIPPING": "0.5", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
         {"fsdp": "full_shard", "bf16": True, "max_grad_norm": 0.5, "gradient_accumulation_steps": 4}),
        ({**FSDP_2, "ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2",
          "PARALLELISM_CONFIG_TP_SIZE": "1"}, {"fsdp": "full_shard"}),
    ],
)  # fmt: skip
def test_variables_become_keys(environment, expected):
    assert taken(environment) == expected


@pytest.mark.parametrize(
    ("environment", "keys", "message"),
    [
        (FSDP_1, {"fsdp": "shard_grad_op"},
         "FSDP_SHARDING_STRATEGY=FULL_SHARD (accelerate launch) contradicts fsdp: shard_grad_op; drop one of them"),
        (FSDP_2, {"fsdp": "full_shard", "fsdp_config": {"reshard_after_forward": False}},
         "FSDP_RESHARD_AFTER_FORWARD=true (accelerate launch) contradicts fsdp: full_shard; drop one of them"),
        (FSDP_1, {"fsdp": "full_shard offload"},
         "FSDP_OFFLOAD_PARAMS=false (accelerate launch) contradicts fsdp: full_shard offload; drop one of them"),
        (FSDP_2, {"fsdp_config": {"fsdp_reshard_after_forward": False}},
         "FSDP_RESHARD_AFTER_FORWARD=true (accelerate launch) contradicts fsdp_config.reshard_after_forward: false"),
        (FSDP_1, {"engine": "megatron"}, "ACCELERATE_USE_FSDP=true (accelerate launch) contradicts engine: megatron"),
        (FSDP_1, {"deepspeed": {"zero_optimization": {"stage": 3}}},
         "deepspeed contradicts ACCELERATE_USE_FSDP=true (accelerate launch); drop one of them"),
        ({**FSDP_1, "FSDP_ACTIVATION_CHECKPOINTING": "true"}, {"disable_gradient_checkpointing": True},
         "FSDP_ACTIVATION_CHECKPOINTING=true (accelerate launch) contradicts disable_gradient_checkpointing: true"),
        ({**FSDP_1, "FSDP_TRANSFORMER_CLS_TO_WRAP": "A"}, {"fsdp_config": {"transformer_layer_cls_to_wrap": ["B"]}},
         "FSDP_TRANSFORMER_CLS_TO_WRAP=A (accelerate launch) contradicts fsdp_config.transformer_layer_cls_to_wrap: "),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, {"bf16": False},
         "ACCELERATE_MIXED_PRECISION=bf16 (accelerate launch) contradicts bf16: false; drop one of them"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, {"fp16": True},
         "ACCELERATE_MIXED_PRECISION=bf16 (accelerate launch) contradicts fp16: true; drop one of them"),
        ({"ACCELERATE_USE_CPU": "true"}, {"use_cpu": False},
         "ACCELERATE_USE_CPU=true (accelerate launch) contradicts use_cpu: false"),
        (DEEPSPEED, {"deepspeed": {"zero_optimization": {"stage": 2}}},
         "deepspeed: zero_optimization.stage: 2 contradicts ACCELERATE_USE_DEEPSPEED: zero_optimization.stage: 3"),
        ({**DEEPSPEED, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, {"gradient_accumulation_steps": 2},
         "ACCELERATE_USE_DEEPSPEED: gradient_accumulation_steps: 4 contradicts gradient_accumulation_steps: 2"),
        (DEEPSPEED, {"fsdp": "shard_grad_op"},
         "ACCELERATE_USE_DEEPSPEED: zero_optimization.stage: 3 contradicts fsdp: [\"shard_grad_op\"]"),
        ({**DEEPSPEED, "ACCELERATE_USE_FSDP": "true"}, {},
         "ACCELERATE_USE_FSDP=true contradicts ACCELERATE_USE_DEEPSPEED=true; drop one of them"),
    ],
)  # fmt: skip
def test_a_contradiction_names_both_sides(environment, keys, message):
    assert fails(environment, **keys).startswith(message)


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"FSDP_SHARDING_STRATEGY": "HYBRID_SHARD", "ACCELERATE_USE_FSDP": "1"}, "FSDP_SHARDING_STRATEGY=HYBRID_SHARD"),
        ({"FSDP_SHARDING_STRATEGY": "5", "ACCELERATE_USE_FSDP": "yes"}, "FSDP_SHARDING_STRATEGY=HYBRID_SHARD_ZERO2"),
        ({"FSDP_SHARDING_STRATEGY": "FULL_SHART", "ACCELERATE_USE_FSDP": "1"}, "did you mean 'FULL_SHARD'?"),
        ({"FSDP_VERSION": "3", "ACCELERATE_USE_FSDP": "1"}, "FSDP_VERSION: expected 1 or 2, found '3'"),
        ({"ACCELERATE_USE_FSDP": "maybe"}, "ACCELERATE_USE_FSDP: expected true or false, found 'maybe'"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "ACCELERATE_USE_MEGATRON_LM=true (accelerate launch): not supported"),
        ({"ACCELERATE_USE_SOMETHING": "true"}, "ACCELERATE_USE_SOMETHING=true (accelerate launch): not supported"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "ACCELERATE_MIXED_PRECISION=fp8 (accelerate launch): not supported"),
        ({"ACCELERATE_MIXED_PRECISION": "fp4"}, "ACCELERATE_MIXED_PRECISION: expected no, fp16 or bf16, found 'fp4'"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "ACCELERATE_DYNAMO_BACKEND=INDUCTOR (accelerate launch): a run with a"),
        ({**FSDP_2, "ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "2"},
         "PARALLELISM_CONFIG_TP_SIZE=2 (accelerate launch): not supported with a role; engine: megatron has"),
        ({**FSDP_2, "ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2"},
         "PARALLELISM_CONFIG_DP_REPLICATE_SIZE=2 (accelerate launch): not supported with a role; fsdp: full_shard"),
        ({**DEEPSPEED, "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "nvme"}, "NVMe offload is not there"),
        ({**DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "x"}, "ACCELERATE_DEEPSPEED_ZERO_STAGE: expected a number"),
        ({**DEEPSPEED, "ACCELERATE_DEEPSPEED_CONFIG_FILE": "/nowhere/ds.json"},
         "ACCELERATE_DEEPSPEED_CONFIG_FILE: /nowhere/ds.json not found"),
        ({"USE_RAY": "1"}, "USE_RAY=1: not supported with a role; Ray starts processes itself; torchrun"),
        ({"USE_V1": "true"}, "USE_V1=true: not supported with a role; LLaMA-Factory's other trainer"),
    ],
)  # fmt: skip
def test_what_cannot_be_heeded_is_refused_by_name(environment, words):
    assert words in fails(environment)


def test_ray_keys_are_refused():
    assert fails({}, ray_num_workers=4).startswith("ray_num_workers: not supported with a role; Ray starts processes")
    assert fails({}, ray_init_kwargs={"a": 1}).startswith("ray_init_kwargs: not supported")
    assert taken({}, ray_num_workers=1) == {}


def test_one_line_says_what_was_taken():
    assert parse({**FSDP_1, "ACCELERATE_MIXED_PRECISION": "bf16", "FSDP_OFFLOAD_PARAMS": "true"}).notes == [
        "accelerate launch: fsdp: full_shard offload, bf16: true; 8 FSDP variables have no counterpart"
    ]
    assert parse({**ALWAYS, "ACCELERATE_USE_FSDP": "1", "FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}).notes == [
        "accelerate launch: fsdp: full_shard; each layer is a unit of its own in spite of SIZE_BASED_WRAP; "
        "1 FSDP variable has no counterpart"
    ]
    assert parse(ALWAYS).notes == []


def test_a_single_process_on_a_cpu_is_said():
    alone = {"ACCELERATE_USE_CPU": "True", "ACCELERATE_MIXED_PRECISION": "no"}
    assert parse(alone).notes[-1] == (
        "accelerate launch started one process (ACCELERATE_USE_CPU is set, WORLD_SIZE is not); "
        "torchrun --nproc_per_node N starts several"
    )
    assert not any("one process" in note for note in parse({**alone, "WORLD_SIZE": "2"}).notes)


def test_the_layout_of_the_configuration_holds_where_both_agree():
    config = {"reshard_after_forward": True, "transformer_layer_cls_to_wrap": "LlamaDecoderLayer"}
    keys = {"fsdp": "full_shard auto_wrap", "fsdp_config": config, "bf16": True}
    environment = {**FSDP_1, "ACCELERATE_MIXED_PRECISION": "bf16", "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer"}
    assert taken(environment, **keys) == {}


def test_a_static_run_is_left_alone():
    given = {"deepspeed": {"zero_optimization": {"stage": 9}}, "ray_num_workers": 4}
    found = parse_config(given, {**KEYS, **RAY}, None, {**FSDP_1, "USE_RAY": "1"})
    assert found.llamafactory == given and found.notes == []


def test_a_run_is_the_same_run_however_it_was_started():
    def of(environment, **keys):
        return identity(parse(environment, **keys), 16, {}, {})

    plain = of({}, fsdp="full_shard", bf16=True)
    assert of({**FSDP_1, "ACCELERATE_MIXED_PRECISION": "bf16"}) == plain
    assert of(DEEPSPEED) == plain
    assert of({}) != plain


def test_variables_are_withdrawn_and_come_back():
    others = {"RANK": "0", "ACCELERATE_DEBUG_MODE": "true", "FSDPX": "1", "PATH": "/bin"}
    megatron = {"MEGATRON_LM_TP_DEGREE": "1", "PARALLELISM_CONFIG_TP_SIZE": "1", "ACCELERATE_FP8_BACKEND": "TE"}
    environment = {**FSDP_1, **DEEPSPEED, **megatron, **others}
    before = dict(environment)
    with launchers.preserved(environment):
        launchers.withdraw(environment)
        assert environment == {**others, "WORLD_SIZE": "2"}
        environment["ACCELERATE_MIXED_PRECISION"] = "fp16"  # as transformers does
    assert environment == before


def test_what_transformers_left_behind_is_not_a_launcher():
    assert launchers.without_traces({"ACCELERATE_MIXED_PRECISION": "bf16", "A": "1"}) == {"A": "1"}
    assert launchers.without_traces(FSDP_1) == FSDP_1
    assert launchers.without_traces(DEEPSPEED) == DEEPSPEED
