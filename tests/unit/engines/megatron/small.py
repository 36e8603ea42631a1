"""One small Hugging Face model of every kind that Megatron can hold, and its chunks under a layout."""

from dataclasses import replace

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from dataflex_mega.config.megatron import MegatronArguments
from dataflex_mega.engines.megatron import cpu, model, process_groups
from dataflex_mega.engines.megatron.decoder_config import DecoderConfig
from dataflex_mega.engines.megatron.layout import MegatronLayout
from dataflex_mega.engines.megatron.settings import TrainingSettings, build_settings

# 4 heads on 2 key-value heads; head_dim is not hidden / heads in some; 53 is no multiple of anything.
SIZES = {
    "vocab_size": 53,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # large, so that an error in a logit is large too
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MULTIPLE = 8  # the vocabulary is padded to 56, or 64 over two ranks


def configs():
    """Name -> configuration."""
    return {
        "llama": LlamaConfig(**SIZES),
        "llama-tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
        "llama-scaled": LlamaConfig(
            **SIZES,
            rope_parameters={
                "rope_theta": 10000.0, "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
            },
        ),
        "mistral": MistralConfig(**SIZES, head_dim=16, sliding_window=None),
        "qwen2": Qwen2Config(**SIZES),
        "qwen2-tied": Qwen2Config(**SIZES, tie_word_embeddings=True),
        "qwen3": Qwen3Config(**SIZES, head_dim=16),
        "qwen3-tied": Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True),
        "mixtral": MixtralConfig(**SIZES, num_local_experts=4),
        "qwen3_moe": Qwen3MoeConfig(
            **SIZES, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, norm_topk_prob=False,
            mlp_only_layers=[1],
        ),
        "qwen3_moe-normalised": Qwen3MoeConfig(
            **SIZES, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, norm_topk_prob=True,
            tie_word_embeddings=True,
        ),
    }  # fmt: skip


def hf_model(config, seed=0, dtype=torch.float32):
    """A model in which no two numbers are alike: norms and biases are random too."""
    torch.manual_seed(seed)
    made = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 1:
                parameter.copy_(torch.randn_like(parameter) * 0.3 + 1.0)
    return made


def build(config, layout, dtype=torch.float32):
    """This rank's chunks, not initialised; parallel state of `layout` must be up. Parameters start as NaN."""
    shape = DecoderConfig.from_hf_config(config, MULTIPLE * layout.tensor)
    precision = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    keys = replace(MegatronArguments(), moe_token_dispatcher_type="allgather")
    made = build_settings(keys, layout, shape, TrainingSettings("adam", 1e-3, 0.0, (0.9, 0.95), 1e-8, 1.0, precision))
    with cpu.cuda_calls_on_cpu():
        model.seed_everything(1)
        chunks = model.create_chunks(shape, made.model, made.transformer_engine)
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.data.fill_(float("nan"))
    return chunks


def start(parallel_info, **sizes):
    """Bring up the parallel state of a layout of all processes."""
    layout = MegatronLayout(parallel_info.world_size, **sizes)
    process_groups.init_model_parallel(parallel_info, layout)
    return layout
