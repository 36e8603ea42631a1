"""megatron-core's configurations from keys: what comes last, what is refused, what is said."""

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, MixtralConfig

from dataflex_mega.config.megatron import MegatronArguments
from dataflex_mega.engines.megatron import cpu, version
from dataflex_mega.engines.megatron.decoder_config import DecoderConfig
from dataflex_mega.engines.megatron.layout import MegatronLayout
from dataflex_mega.engines.megatron.settings import TrainingSettings, build_settings
from dataflex_mega.errors import ConfigError, UserError
from tests.unit.engines.megatron.small import SIZES

ADAM = TrainingSettings("adam", 1e-3, 0.1, (0.9, 0.95), 1e-8, 1.0, "fp32")


def made(layout=None, config=None, training=ADAM, **given):
    shape = DecoderConfig.from_hf_config(config or LlamaConfig(**SIZES))
    with cpu.cuda_calls_on_cpu():
        return build_settings(replace(MegatronArguments(), **given), layout or MegatronLayout(1), shape, training)


def test_further_fields_come_last_under_both_names_and_in_every_configuration_that_has_them():
    found = made(additional_configs={"optimizer.adam_eps": 1e-5}, extra_config='{"model.hidden_dropout": 0.25}')
    assert found.optimizer.adam_eps == 1e-5 and found.model.hidden_dropout == 0.25
    assert made(additional_configs={"grad_reduce_in_fp32": True}).ddp.grad_reduce_in_fp32


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"additional_configs": {"adam_epz": 1}}, "additional_configs: 'adam_epz' is no field of Megatron's configuration "
         "(did you mean 'adam_eps'?)"),
        ({"extra_config": "{"}, "extra_config: not JSON"),
        ({"extra_config": "[1]"}, "extra_config: expected a mapping, found [1]"),
        ({"additional_configs": {"tensor_model_parallel_size": 2}}, "tensor_model_parallel_size is a key of its own"),
        ({"additional_configs": {"model.num_layers": 2}}, "num_layers follows from the model's configuration"),
        ({"recompute_granularity": "selective", "recompute_modules": ["all"]}, "megatron-core refuses"),
        ({"transformer_impl": "transformer_engine"}, "transformer_impl: transformer_engine is not installed"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_one_line(given, message):
    if "transformer_impl" in given and torch.cuda.is_available():
        pytest.skip("Transformer Engine may be there")
    with pytest.raises(ConfigError) as caught:
        made(**given)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("further", [{"batch_p2p_comm": True}, {"batch_p2p_comm": True, "overlap_p2p_comm": False}])
def test_batched_messages_between_two_interleaved_stages_are_refused(further):
    interleaved = MegatronLayout(2, pipeline=2, interleaved=2)
    found = made(interleaved).model
    assert found.overlap_p2p_comm and not found.batch_p2p_comm
    with pytest.raises(ConfigError, match=r"batch_p2p_comm with two interleaved stages gives wrong numbers|its own"):
        made(interleaved, additional_configs=further)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there the kernels may be used")
def test_kernels_that_are_not_there_are_named_and_left_off():
    config = MixtralConfig(**SIZES, num_local_experts=4)
    given = {
        "apply_rope_fusion": True, "moe_grouped_gemm": True, "overlap_grad_reduce": True,
        "moe_token_dispatcher_type": "alltoall",
    }  # fmt: skip
    found = made(config=config, **given)
    assert [note.partition(":")[0] for note in found.notes] == list(given)
    assert not (found.model.apply_rope_fusion or found.model.moe_grouped_gemm or found.ddp.overlap_grad_reduce)
    assert found.model.moe_token_dispatcher_type == "allgather"
    assert made(config=config).notes == ()


def test_full_recomputation_needs_no_further_keys():
    model = made(recompute_granularity="full").model
    assert (model.recompute_method, model.recompute_num_layers) == ("uniform", 1)
    assert made().model.recompute_method is None


@pytest.mark.parametrize(("precision", "in_fp32"), [("bf16", True), ("fp32", False)])
def test_gradients_of_bf16_are_summed_in_fp32(precision, in_fp32):
    found = made(training=replace(ADAM, precision=precision))
    assert found.ddp.grad_reduce_in_fp32 == in_fp32
    assert found.model.bf16 == found.optimizer.bf16 == (precision == "bf16")


@pytest.mark.parametrize("found", ["0.15.9", "0.16.0", "0.20.0", "1.0.0"])
def test_another_megatron_core_is_refused(monkeypatch, found):
    monkeypatch.setattr(version.importlib.metadata, "version", lambda _name: found)
    with pytest.raises(UserError, match=f"megatron-core {found} is installed; 0.16.1 up to but not 0.20 is supported"):
        version.check()


@pytest.mark.parametrize("found", ["0.16.1", "0.17.0", "0.19.2", "0.18.0rc1"])
def test_supported_versions(monkeypatch, found):
    monkeypatch.setattr(version.importlib.metadata, "version", lambda _name: found)
    assert version.check() == found
