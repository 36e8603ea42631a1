"""Dynamic domain mixing as a torch batch sampler, for training loops that are not ours.

A step's samples are a function of (plan, step), as in `data.sampler`; the mixer makes a new plan every `update_every` steps
from the domain losses that `observe` was told. What a step draws depends neither on how many ranks there are nor on when it
is fetched: an update before step t uses the losses of the steps up to t - prefetch, and no later ones.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypedDict, Unpack

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler as TorchSampler

from dataflex_mega.algorithms.base import DomainInfo, Mixer
from dataflex_mega.control import contracts
from dataflex_mega.control.schedule import UpdateSchedule
from dataflex_mega.data.loader import BatchPartition
from dataflex_mega.data.sampler import Sampler
from dataflex_mega.errors import CheckpointError, ConfigError, TrainingFault
from dataflex_mega.registry import build
from dataflex_mega.rng_streams import RngStream, generator
from dataflex_mega.types import SamplingPlan, StepStats, UpdateContext

VERSION = 1
TENSOR = "__tensor__"  # marks a tensor in a state of plain values


class MixtureOptions(TypedDict, total=False):
    """Further arguments of `MixtureBatchSampler`; see there."""

    warmup_steps: int
    proportions: Sequence[float] | None
    total_steps: int
    grad_accumulation: int
    prefetch: int


class MixtureBatchSampler(TorchSampler[list[int]]):
    """Batches of indices into the concatenation of the domains, in the order of `sizes`.

    Args:
        sizes: samples of each domain, by name or in order.
        batch_size: samples of an optimizer step over all ranks.
        seed: of the order and of the mixer's random numbers.
        mixer: an instance, a name such as "odm", or {"name": ..., parameters}; None keeps the initial proportions.
        update_every: optimizer steps from one update of the mixer to the next; 0: one plan for the whole run.
        warmup_steps: steps before the first update.
        proportions: at the start, one number >= 0 per domain; None: equal with a mixer, by size without.
        total_steps: length of the run, for mixers that follow a schedule; 0: unknown.
        dp_rank, dp_size: which contiguous part of each batch this process gets. batch_size is divisible by
            dp_size * grad_accumulation.
        grad_accumulation: micro-batches of an optimizer step on one rank; each is one batch of the data loader.
        prefetch: optimizer steps that the data loader fetches ahead (num_workers * prefetch_factor, or 1 for loaders that
            look one batch ahead). 0 demands that `observe` is called before the next update is fetched.

    Raises:
        ConfigError: sizes or divisions that do not fit, or a mixer that needs more than domain losses.
    """

    def __init__(
        self,
        sizes: Mapping[str, int] | Sequence[int],
        batch_size: int,
        seed: int = 0,
        *,
        mixer: Mixer | str | Mapping[str, Any] | None = None,
        update_every: int = 0,
        dp_rank: int = 0,
        dp_size: int = 1,
        **options: Unpack[MixtureOptions],
    ) -> None:
        unknown = set(options) - set(MixtureOptions.__annotations__)
        if unknown:
            raise TypeError(f"MixtureBatchSampler has no argument {sorted(unknown)[0]!r}")
        warmup_steps, proportions = options.get("warmup_steps", 0), options.get("proportions")
        grad_accumulation = options.get("grad_accumulation", 1)
        names = tuple(sizes) if isinstance(sizes, Mapping) else tuple(f"domain_{i}" for i in range(len(sizes)))
        counts = tuple(sizes.values()) if isinstance(sizes, Mapping) else tuple(sizes)
        _check_division(batch_size, dp_rank, dp_size, grad_accumulation)
        if mixer is not None and update_every < 1:
            raise ConfigError(f"MixtureBatchSampler: update_every must be >= 1 with a mixer, found {update_every}")
        micro_batch = batch_size // (dp_size * grad_accumulation)
        self.partition = BatchPartition(dp_rank, dp_size, micro_batch, grad_accumulation)
        self.domains = DomainInfo(names, counts, _initial(proportions, counts, mixer is not None))
        self.mixer = _build_mixer(mixer)
        if self.mixer is not None:
            contracts.setup(self.mixer, self.domains)
        self.schedule = UpdateSchedule(warmup_steps, update_every, -1, repeat_cycles=False)
        self.seed, self.total_steps = seed, options.get("total_steps", 0)
        self.prefetch = options.get("prefetch", 0)
        self._sampler = Sampler(counts, batch_size, seed)
        first = self._sampler.next_plan(
            None, 0, self.domains.initial_proportions, phase="warmup" if warmup_steps else "train"
        )
        self._plans: deque[SamplingPlan] = deque([first])  # ascending; older ones while a state may need them
        self._next_step = 0  # the step whose batches are fetched next
        self._observed = 0  # steps whose losses were told
        self._applied = 0  # of these, steps that the mixer has seen
        self._waiting: deque[tuple[Tensor, Tensor]] = deque()  # domain sums of the steps between the two

    # -- batches ---------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[list[int]]:
        """Batches from the next step on: `len(self)` of them, a pass over as many samples as there are."""
        steps = len(self) // self.partition.grad_accumulation
        end = (self._next_step // steps + 1) * steps
        while self._next_step < end:
            ids = self._sampler.global_batch(self._plan_for(self._next_step), self._next_step)
            self._next_step += 1
            for micro_batch in self.partition.local_micro_batches(ids):
                yield micro_batch.tolist()

    def __len__(self) -> int:
        """Micro-batches of this rank in an epoch: as many samples as the domains have, rounded up to whole steps."""
        steps = -(-sum(self.domains.num_samples) // self.partition.global_batch_size)
        return steps * self.partition.grad_accumulation

    def domain_ids(self, indices: Sequence[int] | np.ndarray | Tensor) -> Tensor:
        """[n] indices -> [n] int64 numbers of their domains."""
        ends = torch.tensor(self.domains.num_samples).cumsum(0)
        return torch.searchsorted(ends, torch.as_tensor(indices, dtype=torch.int64), right=True)

    def step_indices(self, step: int) -> list[np.ndarray]:
        """This rank's micro-batches of a step that was fetched and not yet observed, or was observed last."""
        plan = next(plan for plan in reversed(self._plans) if plan.start_step <= step)
        return self.partition.local_micro_batches(self._sampler.global_batch(plan, step))

    @property
    def proportions(self) -> dict[str, float]:
        """Of the plan made last, by domain."""
        return dict(zip(self.domains.names, self._plans[-1].proportions, strict=True))

    @property
    def domain_loss_weights(self) -> dict[str, float] | None:
        """The mixer's weights of the domains in the loss, None without; the training loop applies them."""
        weights = self._plans[-1].domain_loss_weights
        return None if weights is None else dict(zip(self.domains.names, weights, strict=True))

    def _plan_for(self, step: int) -> SamplingPlan:
        last = self._plans[-1]
        if self.mixer is None or not self.schedule.is_update(step) or (step <= last.start_step and step > 0):
            return next(plan for plan in reversed(self._plans) if plan.start_step <= step)
        self._apply_until(step)
        context = UpdateContext(step, self.total_steps, self.schedule.update_index(step), self.seed)
        rng = generator(self.seed, step, RngStream.MIXER)
        proportions = contracts.proportions(self.mixer, context, rng, len(self.domains))
        loss_weights = contracts.loss_weights(self.mixer, proportions)
        self._plans.append(self._sampler.next_plan(last, step, proportions, domain_loss_weights=loss_weights))
        return self._plans[-1]

    # -- losses ----------------------------------------------------------------------------------------------------

    def observe(self, domain_loss_sum: Tensor, domain_tokens: Tensor, domain_samples: Tensor | None = None) -> None:
        """Tell the losses of the next step, after it was trained; every rank tells the same sums.

        Args:
            domain_loss_sum: [k] sums of the token losses of each domain over all ranks and micro-batches.
            domain_tokens: [k] target tokens of each domain.
        """
        if self._observed >= self._next_step:
            raise TrainingFault(f"MixtureBatchSampler.observe: step {self._observed + 1} was not fetched yet")
        sums, tokens = (torch.as_tensor(x).detach().double().cpu() for x in (domain_loss_sum, domain_tokens))
        if sums.shape != (len(self.domains),) or tokens.shape != sums.shape:
            found = f"{tuple(sums.shape)} and {tuple(tokens.shape)}"
            raise TrainingFault(
                f"MixtureBatchSampler.observe: expected two tensors [{len(self.domains)}], found {found}"
            )
        self._waiting.append((sums, tokens))
        self._observed += 1
        oldest = min(self._applied, self._observed - 1) if self.mixer is not None else self._observed - 1
        while len(self._plans) > 1 and self._plans[1].start_step <= oldest:
            self._plans.popleft()

    def _apply_until(self, step: int) -> None:
        """Hand the mixer the losses of the steps before `step` - prefetch."""
        needed = max(0, step - self.prefetch)
        if self._observed < needed:
            raise TrainingFault(
                f"MixtureBatchSampler: step {step + 1} is fetched before the losses of step {self._observed + 1} were "
                f"observed; call observe after each step, or set prefetch to the steps that the loader fetches ahead"
            )
        assert self.mixer is not None
        while self._applied < needed:
            sums, tokens = self._waiting.popleft()
            plan = next(plan for plan in reversed(self._plans) if plan.start_step <= self._applied)
            counts = torch.from_numpy(self._sampler.counts_at(plan, self._applied)).double()
            self._applied += 1
            total = float(tokens.sum())
            mean = float(sums.sum()) / total if total else math.nan
            stats = StepStats(mean, 0.0, sums, tokens, counts, int(tokens.sum()))
            contracts.observe(self.mixer, stats, plan.proportions, self._applied)

    # -- restart ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain values, equal on every rank: the sampler after the steps that were observed (without a mixer, fetched)."""
        step = self._next_step if self.mixer is None else self._observed
        return {
            "version": VERSION,
            "step": step,
            "applied": self._applied,
            "identity": self._identity(),
            "plans": [{k: v for k, v in asdict(plan).items() if v is not None} for plan in self._plans],
            "waiting": [[sums.tolist(), tokens.tolist()] for sums, tokens in self._waiting],
            "mixer": None if self.mixer is None else _to_plain(contracts.state_dict(self.mixer)),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after the state's last step, on any `dp_size` and `grad_accumulation`.

        Raises CheckpointError for the state of a sampler with other sizes, seed, batch size or mixer.
        """
        if state.get("version") != VERSION:
            raise CheckpointError(f"MixtureBatchSampler: state has version {state.get('version')}, expected {VERSION}")
        other, own = state["identity"], self._identity()
        differing = [f"{key}: {other.get(key)} there, {own[key]} here" for key in own if other.get(key) != own[key]]
        if differing:
            raise CheckpointError(f"MixtureBatchSampler: the state is of another sampler: {'; '.join(differing)}")
        self._plans = deque(_plan_of(saved) for saved in state["plans"])
        self._next_step = self._observed = int(state["step"])
        self._applied = int(state["applied"])
        self._waiting = deque(
            (torch.tensor(sums, dtype=torch.float64), torch.tensor(tokens, dtype=torch.float64))
            for sums, tokens in state["waiting"]
        )
        if self.mixer is not None:
            contracts.load_state_dict(self.mixer, _from_plain(state["mixer"]))

    def _identity(self) -> dict[str, Any]:
        schedule = self.schedule
        return {
            "names": list(self.domains.names),
            "sizes": list(self.domains.num_samples),
            "initial_proportions": list(self.domains.initial_proportions),
            "batch_size": self.partition.global_batch_size,
            "seed": self.seed,
            "mixer": None if self.mixer is None else type(self.mixer).__name__,
            "update_every": schedule.update_every,
            "warmup_steps": schedule.warmup_steps,
            "prefetch": self.prefetch,
        }


def _check_division(batch_size: int, dp_rank: int, dp_size: int, grad_accumulation: int) -> None:
    if dp_size < 1 or grad_accumulation < 1 or not 0 <= dp_rank < dp_size:
        found = f"dp_rank {dp_rank}, dp_size {dp_size}, grad_accumulation {grad_accumulation}"
        raise ConfigError(
            f"MixtureBatchSampler: expected 0 <= dp_rank < dp_size and grad_accumulation >= 1, found {found}"
        )
    if batch_size < 1 or batch_size % (dp_size * grad_accumulation):
        raise ConfigError(
            f"MixtureBatchSampler: batch_size must be a multiple of dp_size * grad_accumulation = "
            f"{dp_size * grad_accumulation}, found {batch_size}"
        )


def _initial(proportions: Sequence[float] | None, sizes: Sequence[int], equal: bool) -> tuple[float, ...]:
    given = list(proportions) if proportions is not None else [1.0 if equal else float(n) for n in sizes]
    if len(given) != len(sizes) or min(given, default=-1) < 0 or sum(given) <= 0:
        raise ConfigError(
            f"MixtureBatchSampler: proportions must be {len(sizes)} numbers >= 0, not all 0, found {given}"
        )
    return tuple(x / sum(given) for x in given)


def _build_mixer(mixer: Mixer | str | Mapping[str, Any] | None) -> Mixer | None:
    if mixer is None:
        return None
    built = mixer if isinstance(mixer, Mixer) else build("mixer", mixer)
    assert isinstance(built, Mixer)
    if built.requests():
        names = ", ".join(type(request).__name__ for request in built.requests())
        raise ConfigError(
            f"MixtureBatchSampler: mixer {type(built).__name__} asks for {names}, but a sampler knows domain losses only; "
            "use dm.train"
        )
    return built


def _plan_of(saved: Mapping[str, Any]) -> SamplingPlan:
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list | tuple) else v for k, v in saved.items()}
    return SamplingPlan(**values)


def _to_plain(value: Any) -> Any:
    """A state with tensors -> plain values that JSON takes and `_from_plain` reads back exactly."""
    if isinstance(value, Tensor):
        return {TENSOR: [str(value.dtype).removeprefix("torch."), value.tolist()]}
    if isinstance(value, Mapping):
        return {str(key): _to_plain(item) for key, item in value.items()}
    return [_to_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _from_plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        if set(value) == {TENSOR}:
            dtype, numbers = value[TENSOR]
            return torch.tensor(numbers, dtype=getattr(torch, dtype))
        return {key: _from_plain(item) for key, item in value.items()}
    return [_from_plain(item) for item in value] if isinstance(value, list) else value
