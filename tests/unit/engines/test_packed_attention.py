"""Packed rows: every sample has the loss that it has alone through plain transformers, or the model is refused."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers

from dataflex_mega.data.collate import collate
from dataflex_mega.data.pool import Sample
from dataflex_mega.distributed.parallel_info import ParallelInfo
from dataflex_mega.engines.fsdp.masks import CHUNKED, FULL, SLIDING, AttentionKinds
from dataflex_mega.engines.fsdp.packing import check_packing
from dataflex_mega.engines.fsdp.parallel import FSDPLayout
from dataflex_mega.engines.fsdp.runner import FSDPModelRunner
from dataflex_mega.errors import ConfigError
from dataflex_mega.objective import make_sample_stats, sample_sums

SIZE = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.2, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
WINDOW = 8
# name -> (configuration class, keys, kinds of layers with a short reach)
MODELS = {
    "llama": ("Llama", {}, []),
    "mistral": ("Mistral", {"sliding_window": WINDOW}, [SLIDING]),
    "mixtral": ("Mixtral", {"sliding_window": WINDOW, "num_local_experts": 2}, [SLIDING]),
    "phi3": ("Phi3", {"sliding_window": WINDOW, "attention_dropout": 0.0}, [SLIDING]),
    "qwen2": ("Qwen2", {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 2}, [SLIDING]),
    "qwen2 without": ("Qwen2", {"sliding_window": WINDOW, "use_sliding_window": False}, []),
    "gemma2": ("Gemma2", {"sliding_window": WINDOW, "head_dim": 8, "query_pre_attn_scalar": 8}, [SLIDING]),
    "gemma3": ("Gemma3Text", {"sliding_window": WINDOW, "head_dim": 8, "query_pre_attn_scalar": 8}, [SLIDING]),
    "cohere2": ("Cohere2", {"sliding_window": WINDOW}, [SLIDING]),
    "llama4": (
        "Llama4Text",
        {"attention_chunk_size": WINDOW, "num_local_experts": 2, "intermediate_size_mlp": 64, "head_dim": 8,
         "moe_layers": [], "no_rope_layers": [1, 1, 1, 0]},
        [CHUNKED],
    ),
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}, []),
    "gpt_neo": (
        "GPTNeo",
        {"attention_types": [[["global", "local"], 2]], "num_heads": 4, "window_size": WINDOW},
        [],
    ),
    "opt": ("OPT", {"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 256}, []),
}  # fmt: skip


def runner_of(kind, keys):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SIZE, **keys})
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    return FSDPModelRunner(model, FSDPLayout("single"), ParallelInfo(0, 1, torch.device("cpu"), 0, 1))


def samples():
    rng = np.random.default_rng(0)
    ids = [rng.integers(2, 96, length) for length in (30, 20, 27, 9)]
    return [Sample(i, 0, tokens, tokens) for i, tokens in enumerate(ids)]


def alone(model, sample):
    """Mean loss of one sample by transformers itself."""
    ids = torch.tensor(sample.input_ids).unsqueeze(0)
    with torch.no_grad():
        logits = model.eval()(input_ids=ids, use_cache=False).logits[0, :-1]
    return float(torch.nn.functional.cross_entropy(logits, ids[0, 1:]))


@pytest.mark.parametrize("name", MODELS)
def test_a_packed_sample_has_the_loss_that_it_has_alone(name):
    kind, keys, short = MODELS[name]
    runner = runner_of(kind, keys)
    kinds = AttentionKinds.of(runner.model.config)
    assert [known for known in kinds.names if known != FULL] == short
    batch = collate(samples(), pad_id=1, pack_length=64)
    assert batch.is_packed
    with torch.no_grad(), runner.evaluation_mode():
        packed = make_sample_stats(sample_sums(runner.token_losses(batch), batch), batch).loss
    expected = torch.tensor([alone(runner.model, sample) for sample in samples()])
    torch.testing.assert_close(packed, expected, atol=2e-4, rtol=0)
    check_packing(runner, 64)


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        ("Bloom", {"n_layer": 2, "n_head": 4}),
        ("Mamba", {"state_size": 4}),
        ("Mamba2", {"state_size": 4, "num_heads": 8, "head_dim": 8, "n_groups": 1}),
        ("Lfm2", {"layer_types": ["conv", "full_attention", "conv", "full_attention"], "block_ff_dim": 64}),
        ("Falcon", {"alibi": True}),
    ],
)
def test_a_model_that_cannot_keep_samples_apart_is_refused_by_name(kind, keys):
    runner = runner_of(kind, keys)
    before = torch.get_rng_state()
    with pytest.raises(ConfigError, match=f"packing: model type '{runner.model.config.model_type}'.*packing: false"):
        check_packing(runner, 64)
    assert torch.equal(before, torch.get_rng_state()) and runner.module.training


def test_a_window_is_counted_inside_a_sample():
    segment = torch.tensor([[0, 0, 0, 1, 1, 1, 1, -1]])
    position = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0]])
    batch = SimpleNamespace(segment_ids=segment, position_ids=position)
    kinds = AttentionKinds((CHUNKED, FULL, SLIDING), window=2, chunk=2)
    masks = kinds.mask(batch, torch.float32)  # type: ignore[arg-type]
    assert isinstance(masks, dict)
    for query in range(8):
        for key in range(8):
            same = segment[0, query] == segment[0, key] and key <= query
            allowed = {
                FULL: same,
                SLIDING: same and query - key < 2,
                CHUNKED: same and position[0, query] // 2 == position[0, key] // 2,
            }
            for kind, expected in allowed.items():
                assert bool(masks[kind][0, 0, query, key] == 0) == bool(expected)
