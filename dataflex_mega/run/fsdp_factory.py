"""The FSDP engine's parts: a Hugging Face model as LLaMA-Factory loads it, laid out over processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.integrations.neftune import activate_neftune

from dataflex_mega.config.optimizers import check_layout, check_visible_gpus
from dataflex_mega.config.parse import RunConfig
from dataflex_mega.config.quantization import check_sharding
from dataflex_mega.distributed.parallel_info import ParallelInfo, init_distributed, timeout_of
from dataflex_mega.engines.fsdp.checkpoint import load_and_export
from dataflex_mega.engines.fsdp.engine import FSDPEngine
from dataflex_mega.engines.fsdp.frozen_model import frozen_logits
from dataflex_mega.engines.fsdp.packing import check_packing
from dataflex_mega.engines.fsdp.parallel import FSDPLayout, parallelize, read_layout, unwrap
from dataflex_mega.engines.fsdp.runner import FSDPModelRunner
from dataflex_mega.llamafactory.debugging import watch_for_overflow
from dataflex_mega.llamafactory.frozen_model import build_frozen_model
from dataflex_mega.llamafactory.model import build_model, freeze_gates
from dataflex_mega.llamafactory.optim import build_optimizer, build_scheduler
from dataflex_mega.llamafactory.quantized import check_quantized_model
from dataflex_mega.run.media import packs_rows
from dataflex_mega.run.preference import disable_dropout, has_pairs
from dataflex_mega.run.step_options import build_step_options


@dataclass(frozen=True)
class FSDPFactory:
    """run.engines.EngineFactory for engine: fsdp."""

    config: RunConfig

    def init_processes(self, args: Any, num_tokens: int) -> FSDPBuilder:
        """Join the processes; a Hugging Face model can grow, so any number of tokens fits."""
        check_quantized_model(args)
        parallel_info = init_distributed(timeout_of(self.config.llamafactory))
        layout = read_layout(self.config.llamafactory, parallel_info)
        check_layout(self.config.llamafactory, layout.mode)
        check_visible_gpus(self.config.llamafactory, torch.cuda.device_count(), parallel_info.world_size)
        if layout.mode == "fsdp2":
            check_sharding(self.config.llamafactory)
        return FSDPBuilder(self.config, args, parallel_info, layout)


@dataclass(frozen=True)
class FSDPBuilder:
    """run.engines.EngineBuilder for engine: fsdp, on joined processes and a layout."""

    config: RunConfig
    args: Any
    parallel_info: ParallelInfo
    layout: FSDPLayout

    @property
    def notes(self) -> tuple[str, ...]:
        return self.layout.notes

    def build_engine(self, tokenizer: Any, num_domains: int, num_steps: int, options: Mapping[str, Any]) -> FSDPEngine:
        """Load, freeze and lay out the model, then make its optimizer."""
        # With FSDP2 the model is read into host memory; a device holds only its shards.
        device_map = {"": "cpu"} if self.layout.mode == "fsdp2" else None
        model = self._build_model(tokenizer, device_map)
        if has_pairs(self.args):
            disable_dropout(model)
        watch_for_overflow(self.args, model)
        if self.args.training.neftune_noise_alpha:
            activate_neftune(model, self.args.training.neftune_noise_alpha)  # a hook that acts in training mode
        module = parallelize(model, self.layout, self.parallel_info)
        runner = FSDPModelRunner(module, self.layout, self.parallel_info)
        if packs_rows(self.args):
            check_packing(runner, self.args.data.cutoff_len)
        step_options = build_step_options(self.config, self.args, num_domains, options)
        if step_options.loss_form is not None and step_options.loss_form.needs_reference:
            runner.reference = frozen_logits(runner, build_frozen_model(self.args, runner.model, device_map))
        optimizer = build_optimizer(self.args, unwrap(module))
        scheduler = build_scheduler(self.args, optimizer, num_steps)
        return FSDPEngine(runner, optimizer, scheduler, step_options)

    def _build_model(self, tokenizer: Any, device_map: dict[str, str] | None) -> Any:
        model = build_model(self.args, tokenizer, device_map)
        if self.config.dataflex.freeze_gate:
            freeze_gates(model)
        return model

    def export_state(self, tokenizer: Any, state: Path, folder: Path) -> None:
        """Load the model on the CPU, with the trained parameters of a checkpoint in it."""
        model = self._build_model(tokenizer, {"": "cpu"})
        if self.layout.mode == "fsdp2" and self.layout.precision != "fp32" and not hasattr(model, "peft_config"):
            model.float()  # as it was sharded
        load_and_export(model, state, folder)


def make_factory(config: RunConfig) -> FSDPFactory:
    """What run.engines.engine_factory calls."""
    return FSDPFactory(config)
