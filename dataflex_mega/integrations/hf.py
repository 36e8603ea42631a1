"""Dynamic mixing inside the Hugging Face Trainer.

    sampler = dm.MixtureBatchSampler(...)
    trainer = dm.integrations.MixtureTrainer(model, args, train_dataset=ds, mixture=sampler)

`MixtureTrainer` is transformers' Trainer with the sampler as the batch sampler of its training data loader. A Trainer of
one's own needs `DomainLossCallback(sampler)` and a `get_train_dataloader` like the one below. accelerate's prepared data
loader fetches one batch ahead; the one below is not prepared, so updates see the losses of every step before them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback

from dataflex_mega.errors import CheckpointError, ConfigError
from dataflex_mega.files import atomic_write
from dataflex_mega.mixture_sampler import MixtureBatchSampler
from dataflex_mega.types import IGNORE_INDEX

STATE_FILE = "dataflex_mixture.json"  # in each checkpoint


class DomainLossCallback(TrainerCallback):
    """Measures the domain losses of each step in the forward pass that trains it, and tells them to the sampler.

    The model is called with `labels` and returns `logits`, as causal models of transformers do. The sampler's state is
    written into each checkpoint and read back from the one that the Trainer resumes from.
    """

    def __init__(self, sampler: MixtureBatchSampler) -> None:
        self.sampler = sampler
        self._handle: Any = None
        self._step = 0  # optimizer steps done
        self._micro_batch = 0  # of the step under way
        k = len(sampler.domains)
        self._sums = torch.zeros(2, k, dtype=torch.float64)

    # -- Trainer's events ------------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any) -> None:
        """Listen to the model; after a restart, go on where the checkpoint was. Raises ConfigError or CheckpointError."""
        assert model is not None
        if state.global_step > 0:
            self._restore(args, state.global_step)
        self._step, self._micro_batch = state.global_step, 0
        self._sums.zero_()
        self._handle = model.register_forward_hook(self._add, with_kwargs=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Add up the ranks, and tell the sampler."""
        sums = self._sums
        if dist.is_initialized() and dist.get_world_size() > 1:
            sums = sums.to(args.device)
            dist.all_reduce(sums)
        loss_sum, tokens = sums.cpu()
        self.sampler.observe(loss_sum, tokens)
        self._sums = torch.zeros_like(self._sums)
        self._step, self._micro_batch = self._step + 1, 0

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write the sampler's state into the checkpoint."""
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            atomic_write(folder / STATE_FILE, json.dumps(self.sampler.state_dict()))

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Remove the hook from the model."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    # -- losses ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _add(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """Forward hook: token losses of a micro-batch, added up by domain. Evaluation and repeated passes are left out."""
        labels = kwargs.get("labels")
        if not module.training or labels is None:
            return
        micro_batches = self.sampler.step_indices(self._step)
        if self._micro_batch >= len(micro_batches):
            return
        domain_ids = self.sampler.domain_ids(micro_batches[self._micro_batch])
        self._micro_batch += 1
        loss, tokens = sample_sums(output.logits, labels)
        if len(loss) != len(domain_ids):
            raise ConfigError(
                f"DomainLossCallback: a batch has {len(loss)} rows, the sampler gave {len(domain_ids)} samples; pack no "
                "rows, and set per_device_train_batch_size and gradient_accumulation_steps as the sampler has them"
            )
        hot = F.one_hot(domain_ids, len(self.sampler.domains)).double()
        self._sums[0] += loss.double().cpu() @ hot
        self._sums[1] += tokens.double().cpu() @ hot

    # -- restart ---------------------------------------------------------------------------------------------------

    def _restore(self, args: Any, step: int) -> None:
        if not args.ignore_data_skip:
            raise ConfigError(
                "ignore_data_skip: must be true to resume with a MixtureBatchSampler, which goes on by itself; the Trainer "
                "would skip batches that the sampler does not repeat"
            )
        given = args.resume_from_checkpoint
        folder = Path(given) if isinstance(given, str) else Path(args.output_dir) / f"checkpoint-{step}"
        path = folder / STATE_FILE
        if not path.is_file():
            raise CheckpointError(f"{folder} has no {STATE_FILE}: it was saved without DomainLossCallback")
        self.sampler.load_state_dict(json.loads(path.read_text()))


def sample_sums(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """[b, S, V] logits, [b, S] labels, not shifted -> ([b] float32 sums of the token losses, [b] target tokens)."""
    shifted = F.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:]
    losses = F.cross_entropy(
        logits.float().flatten(0, 1), shifted.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
    )
    return losses.view_as(shifted).sum(1), (shifted != IGNORE_INDEX).sum(1)


class MixtureTrainer(Trainer):
    """transformers' Trainer that draws its training batches from a `MixtureBatchSampler`."""

    def __init__(self, *args: Any, mixture: MixtureBatchSampler, **kwargs: Any) -> None:
        """Raises ConfigError when the sampler's batch is not the Trainer's."""
        super().__init__(*args, **kwargs)
        self.mixture = mixture
        partition, own = mixture.partition, self.args
        expected = (own.per_device_train_batch_size, own.gradient_accumulation_steps, own.world_size)
        found = (partition.micro_batch_size, partition.grad_accumulation, partition.dp_size)
        if found != expected:
            keys = "per_device_train_batch_size, gradient_accumulation_steps and the number of processes"
            raise ConfigError(f"MixtureTrainer: {keys} are {expected}, the sampler has {found}")
        self.add_callback(DomainLossCallback(mixture))

    def get_train_dataloader(self) -> DataLoader:
        """The training set in the order of the sampler, fetched when it is needed."""
        return DataLoader(
            self.train_dataset,  # type: ignore[arg-type]
            batch_sampler=self.mixture,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
        )
