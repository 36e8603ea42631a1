"""The FSDP layout from Hugging Face's keys, and the attention mask of packed rows."""

from types import SimpleNamespace

import pytest
import torch

from dataflex_mega.engines.fsdp.masks import attention_mask
from dataflex_mega.engines.fsdp.parallel import read_layout
from dataflex_mega.engines.fsdp.precision import LossScale
from dataflex_mega.errors import ConfigError

CPU = torch.device("cpu")


def parallel_info(world, device=CPU):
    return SimpleNamespace(world_size=world, device=device)


@pytest.mark.parametrize(
    ("keys", "world", "expected"),
    [
        ({}, 1, ("single", "fp32", True)),
        ({"bf16": True}, 4, ("ddp", "bf16", True)),
        ({"fsdp": "full_shard auto_wrap"}, 2, ("fsdp2", "fp32", True)),
        ({"fsdp": ["full_shard auto_wrap"]}, 2, ("fsdp2", "fp32", True)),
        ({"fsdp": True}, 2, ("fsdp2", "fp32", True)),
        ({"fsdp": ["shard_grad_op"]}, 2, ("fsdp2", "fp32", False)),
        (
            {"fsdp": "full_shard", "fsdp_config": {"reshard_after_forward": False, "version": 2}},
            2,
            ("fsdp2", "fp32", False),
        ),
    ],
)
def test_hugging_face_keys_become_a_layout(keys, world, expected):
    layout = read_layout(keys, parallel_info(world))
    assert (layout.mode, layout.precision, layout.reshard_after_forward) == expected


def test_layer_classes_and_offload():
    keys = {"fsdp": "full_shard offload", "fsdp_config": {"fsdp_transformer_layer_cls_to_wrap": "LlamaDecoderLayer"}}
    layout = read_layout(keys, parallel_info(2))
    assert layout.layer_classes == ("LlamaDecoderLayer",) and layout.offload


def test_the_loss_scale_and_pinned_memory():
    cuda = parallel_info(2, torch.device("cuda"))
    moving = {"initial_scale_power": 10, "loss_scale_window": 7, "min_loss_scale": 4}
    layout = read_layout({"fp16": True, "fsdp_config": {**moving, "pin_memory": False}}, cuda)
    assert layout.loss_scale == LossScale(start=1024.0, interval=7, floor=4.0) and not layout.pin_memory
    assert read_layout({"fp16": True, "fsdp_config": {"loss_scale": 64}}, cuda).loss_scale.constant
    default = read_layout({"fp16": True, "fsdp": "full_shard offload"}, cuda)
    assert default.pin_memory and default.loss_scale == LossScale(65536.0, 2000, 1.0)
    assert not read_layout({"fsdp": "full_shard offload"}, parallel_info(2)).pin_memory  # needs a device to pin it for


def test_keys_without_effect_are_said():
    layout = read_layout({"fsdp": True, "fsdp_config": {"fsdp_state_dict_type": "FULL_STATE_DICT"}}, parallel_info(2))
    assert layout.notes == ("fsdp_config: state_dict_type has no effect on FSDP2",)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"fp16": True}, "fp16"),
        ({"fsdp": "full_shart"}, "full_shart"),
        ({"fsdp": "hybrid_shard"}, "hybrid_shard"),
        ({"fsdp": "full_shard", "fsdp_config": {"wrap": 1}}, "wrap"),
        ({"fsdp": "full_shard", "fsdp_config": "file.json"}, "mapping"),
        ({"fsdp_config": {"loss_scale_window": "often"}}, "often"),
        (
            {"fsdp_config": {"activation_checkpointing": True}, "disable_gradient_checkpointing": True},
            "disable_gradient_checkpointing",
        ),
    ],
)
def test_what_is_not_understood_is_named(keys, said):
    with pytest.raises(ConfigError, match=said):
        read_layout(keys, parallel_info(2))


def test_the_mask_is_causal_inside_a_sample_and_closed_between():
    segment = torch.tensor([[0, 0, 1, 1, 1, -1]])
    allowed = attention_mask(segment, torch.float32)[0, 0] == 0
    for query in range(6):
        for key in range(6):
            same = segment[0, query] == segment[0, key]
            assert bool(allowed[query, key]) == bool(same and key <= query)
