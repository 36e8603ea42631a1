"""GPTModel chunks of megatron-core for a Hugging Face configuration."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from dataflex_mega.engines.megatron.context import ContextParallel
from dataflex_mega.engines.megatron.decoder_config import DecoderConfig, inverse_frequencies
from dataflex_mega.engines.megatron.kernels import fused_rms_norm
from dataflex_mega.engines.megatron.vocabulary import ShardedVocabulary
from dataflex_mega.losses.base import LossForm, TokenOutputs


class LocalRMSNorm(nn.Module):
    """RMSNorm of the local layers. Unlike megatron-core's own it may stand in a sequence-parallel region.

    With sequence parallelism each tensor-parallel rank normalises its part of the sequence, so the weight's gradient
    is a partial sum; the attribute tells `finalize_model_grads` to add the parts up.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_unused: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self._fused = fused_rms_norm()

    def forward(self, values: Tensor) -> Tensor:
        """[..., hidden] -> the same decoder."""
        if self._fused is not None and values.is_cuda:
            return self._fused(values, self.weight, self.weight.shape, self.eps)
        return F.rms_norm(values, self.weight.shape, self.weight, self.eps)


class TorchAttention(MegatronModule):
    """Causal attention through torch's scaled_dot_product_attention: flash attention on a GPU, no [s, s] matrix.

    Under context parallelism s positions of a row are this rank's, and S are the whole row's; otherwise both are the same.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        **_unused: Any,
    ) -> None:
        super().__init__(config=config)
        heads, groups = config.num_attention_heads, config.num_query_groups
        self.grouped = groups is not None and groups != heads
        self.scale = softmax_scale
        self.dropout = config.attention_dropout
        self.context = ContextParallel.current()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        **_unused: Any,
    ) -> Tensor:
        """[s, b, heads, d] of this rank -> [s, b, heads * d]. `attention_mask`: [b, 1, s, S], true where closed."""
        s, b = query.shape[:2]
        if self.context.size > 1:
            key, value = self.context.gather_keys_values(key, value)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        dropout = self.dropout if self.training else 0.0
        options = {"dropout_p": dropout, "scale": self.scale, "enable_gqa": self.grouped}
        if attention_mask is not None:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask.logical_not(), **options)
        elif self.context.size > 1:
            out = self.context.attend(q, k, v, **options)
        else:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, **options)
        return out.permute(2, 0, 1, 3).reshape(s, b, -1)


class MegatronGPT(GPTModel):
    """GPTModel whose padded vocabulary entries have no probability.

    Attributes:
        loss_form: what is differentiated of a token in the next pass; None: its cross-entropy.
    """

    real_vocab: int
    loss_form: LossForm | None = None

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """[b, s] labels, [s, b, vocab / TP] logits -> [b, s] float32 token losses; meaningless where a label is not
        a token. With a form [2, b, s]: the cross-entropy without gradient, and what is differentiated."""
        first = logits.shape[-1] * parallel_state.get_tensor_model_parallel_rank()
        real = self.real_vocab - first  # entries of this rank's part that are no padding
        if real < logits.shape[-1]:
            padding = torch.arange(logits.shape[-1], device=logits.device) >= real
            logits = logits.masked_fill(padding, torch.finfo(logits.dtype).min)
        form = self.loss_form
        if form is None:
            return super().compute_language_model_loss(labels, logits)
        # megatron-core computes the softmax in the memory of float32 logits.
        kept = logits.to(torch.float32, copy=True) if form.reads_logits else logits.detach()
        losses = super().compute_language_model_loss(labels, logits)
        vocabulary = ShardedVocabulary(self.real_vocab, first)
        tokens = TokenOutputs(kept.transpose(0, 1), labels, losses, vocabulary=vocabulary)
        return torch.stack([losses.detach(), form.token_losses(tokens)])


def create_chunks(
    decoder: DecoderConfig, config: TransformerConfig, transformer_engine: bool, torch_attention: bool = False
) -> list[MegatronGPT]:
    """The chunks of this pipeline stage: one, or several when stages are interleaved. Parallel state must be up.

    Parameters are on the current device and not initialised; weights.load fills all of them. `torch_attention`: use
    TorchAttention in Transformer Engine's layers too.
    """
    count = config.virtual_pipeline_model_parallel_size
    spec_of = partial(_spec, config, transformer_engine, torch_attention)
    return [_chunk(decoder, config, number, spec_of) for number in range(count or 1)]


def _spec(config: TransformerConfig, transformer_engine: bool, torch_attention: bool, stage: int | None) -> Any:
    """The layers of a chunk."""
    spec: Any = get_gpt_decoder_block_spec(
        config, use_transformer_engine=transformer_engine, normalization="RMSNorm", vp_stage=stage
    )
    if not transformer_engine:
        _replace_local_modules(spec)
    elif torch_attention:
        for layer in spec.layer_specs:
            layer.submodules.self_attention.submodules.core_attention = TorchAttention
    return spec


def _chunk(
    decoder: DecoderConfig, config: TransformerConfig, number: int, spec_of: Callable[[int | None], Any]
) -> MegatronGPT:
    stage = number if config.virtual_pipeline_model_parallel_size else None
    model = MegatronGPT(
        config=config,
        transformer_layer_spec=spec_of(stage),  # type: ignore[arg-type]  # a block spec is taken too
        vocab_size=decoder.padded_vocab_size,
        max_sequence_length=decoder.max_positions,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
        parallel_output=True,
        share_embeddings_and_output_weights=decoder.tie_embeddings,
        position_embedding_type="rope",
        rotary_base=decoder.rotary_base,  # type: ignore[arg-type]
        vp_stage=stage,
    )
    model.real_vocab = decoder.vocab_size
    frequencies = inverse_frequencies(decoder)
    if frequencies is not None:
        model.rotary_pos_emb.inv_freq = frequencies.to(model.rotary_pos_emb.inv_freq)
    return model


def _replace_local_modules(spec: Any) -> None:
    """Put LocalRMSLocalRMSNorm and TorchAttention where the local layers have megatron-core's."""
    spec.layer_norm = LocalRMSNorm
    for layer in spec.layer_specs:
        parts = layer.submodules
        parts.input_layernorm = parts.pre_mlp_layernorm = LocalRMSNorm
        attention = parts.self_attention.submodules
        attention.core_attention = TorchAttention
        for name in ("q_layernorm", "k_layernorm"):
            if getattr(attention, name) not in (None, IdentityOp):
                setattr(attention, name, LocalRMSNorm)


def seed_everything(seed: int) -> None:
    """megatron-core's random states: equal for tensor-parallel ranks outside sharded regions, different inside."""
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
