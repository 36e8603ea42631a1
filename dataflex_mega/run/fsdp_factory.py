"""The FSDP engine's parts: a Hugging Face model as LLaMA-Factory loads it, laid out over processes."""

from __future__ import annotations

from typing import Any

from dataflex_mega.config.parse import RunConfig
from dataflex_mega.distributed import mesh as meshes
from dataflex_mega.engines.fsdp.engine import FSDPEngine
from dataflex_mega.engines.fsdp.features import FeatureMaker
from dataflex_mega.engines.fsdp.gradients import GradientScorer
from dataflex_mega.engines.fsdp.parallel import parallelize, read_layout, unwrap
from dataflex_mega.engines.options import Options
from dataflex_mega.types import FeatureSpec, HiddenSpec


class FSDPBackend:
    """Implements run.engines.Backend."""

    def __init__(self, config: RunConfig) -> None:
        self.config, self.ours = config, config.ours

    def start(self, args: Any, tokens: int) -> None:  # a Hugging Face model can grow
        """See Backend."""
        self.args = args
        self.mesh = meshes.start()
        self.layout = read_layout(self.config.lf, self.mesh)
        self.notes = self.layout.notes

    def engine(
        self, tokenizer: Any, domains: int, steps: int, hidden: HiddenSpec | None = None, loads: bool = False
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
        module = parallelize(model, self.layout, self.mesh)
        optimizer = build_optimizer(self.args, unwrap(module))
        return FSDPEngine(
            module,
            optimizer,
            build_scheduler(self.args, optimizer, steps),
            self.mesh,
            self.layout,
            Options(
                domains=domains,
                max_grad_norm=self.args.training.max_grad_norm,
                lookahead=self.ours.lookahead,
                normalization=self.ours.loss_normalization,
                on_nan=self.ours.nan_loss,
                loads=loads,
                hidden=hidden,
            ),
        )

    def gradient_scorer(self, engine: FSDPEngine, adam: bool) -> GradientScorer:
        """See Backend."""
        return GradientScorer(engine, adam)

    def feature_maker(self, engine: FSDPEngine, spec: FeatureSpec, adam: bool) -> FeatureMaker:
        """See Backend."""
        return FeatureMaker(engine, spec, adam)
