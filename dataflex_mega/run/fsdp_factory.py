"""The FSDP engine's parts: a Hugging Face model as LLaMA-Factory loads it, laid out over processes."""

from __future__ import annotations

from typing import Any

from dataflex_mega.config.parse import RunConfig
from dataflex_mega.distributed.parallel_info import init_distributed
from dataflex_mega.engines.fsdp.engine import FSDPEngine
from dataflex_mega.engines.fsdp.parallel import parallelize, read_layout, unwrap
from dataflex_mega.engines.fsdp.runner import FSDPModelRunner
from dataflex_mega.engines.options import StepOptions
from dataflex_mega.types import EmbeddingSpec


class FSDPBackend:
    """Implements run.engines.Backend."""

    def __init__(self, config: RunConfig) -> None:
        self.config, self.ours = config, config.dataflex

    def start(self, args: Any, tokens: int) -> None:  # a Hugging Face model can grow
        """See Backend."""
        self.args = args
        self.parallel_info = init_distributed()
        self.layout = read_layout(self.config.llamafactory, self.parallel_info)
        self.notes = self.layout.notes

    def engine(
        self, tokenizer: Any, domains: int, steps: int, hidden: EmbeddingSpec | None = None, loads: bool = False
    ) -> FSDPEngine:
        """See Backend."""
        from dataflex_mega.llamafactory.model import build_model, freeze_gates
        from dataflex_mega.llamafactory.optim import build_optimizer, build_scheduler

        # With FSDP2 the model is read into host memory; a device holds only its shards.
        if self.layout.mode == "fsdp2":
            self.args.model.device_map = {"": "cpu"}
        model = build_model(self.args, tokenizer)
        if self.ours.freeze_gate:
            freeze_gates(model)
        module = parallelize(model, self.layout, self.parallel_info)
        optimizer = build_optimizer(self.args, unwrap(module))
        return FSDPEngine(
            FSDPModelRunner(module, self.layout, self.parallel_info),
            optimizer,
            build_scheduler(self.args, optimizer, steps),
            StepOptions(
                num_domains=domains,
                max_grad_norm=self.args.training.max_grad_norm,
                weight_scope=self.ours.weight_scope,
                normalization=self.ours.loss_normalization,
                on_non_finite=self.ours.on_non_finite,
                count_router_loads=loads,
                embedding_spec=hidden,
            ),
        )
