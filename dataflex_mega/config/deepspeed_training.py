"""What a DeepSpeed configuration says of batches, clipping, the optimizer and its schedule."""

from __future__ import annotations

from typing import Any

from dataflex_mega.config.deepspeed_values import Section, Translation, is_on
from dataflex_mega.config.launcher_keys import contradiction, show
from dataflex_mega.errors import ConfigError

ADAMW = ("AdamW", "Adam")  # DeepSpeed's Adam decouples weight decay too, unless adam_w_mode is false
ADAMW_HERE = ("adamw_torch", "adamw_torch_fused")
SCHEDULES = {"WarmupLR": "constant_with_warmup", "WarmupDecayLR": "linear"}
PARAMETERS = (("lr", "learning_rate"), ("eps", "adam_epsilon"), ("weight_decay", "weight_decay"))
# Parameter of the optimizer -> the values that are what happens here.
AS_HERE: dict[str, tuple[bool, ...]] = {
    "bias_correction": (True,), "amsgrad": (False,), "adam_w_mode": (True,), "adamw_mode": (True,),
}  # fmt: skip


def take_gradients(root: Section, work: Translation) -> None:
    """Clipping, and the type in which gradients are accumulated."""
    if root.has("gradient_clipping"):
        value = root.number("gradient_clipping", 0.0)
        if value < 0:
            raise ConfigError(f"{root.name('gradient_clipping')}: expected a number >= 0, found {show(value)}")
        work.take("max_grad_norm", float(value), f"gradient_clipping: {show(value)}")
    if root.section("data_types").values.get("grad_accum_dtype") in ("fp16", "bf16"):
        work.clauses.append("gradients are accumulated in float32")


def take_batch_sizes(root: Section, work: Translation) -> None:
    """Sizes; their product over the processes must be DeepSpeed's global batch, where it gives one."""
    for key, ours in (
        ("train_micro_batch_size_per_gpu", "per_device_train_batch_size"),
        ("gradient_accumulation_steps", "gradient_accumulation_steps"),
    ):
        if root.has(key):
            value = root.integer(key, least=1, default=1)
            work.take(ours, value, f"{key}: {value}")
    ranks = work.ranks.data_parallel
    if not root.has("train_batch_size"):
        return
    total = root.integer("train_batch_size", least=1, default=1)
    micro, steps = work.keys.value("per_device_train_batch_size"), work.keys.value("gradient_accumulation_steps")
    if ranks is not None and total != micro * steps * ranks:
        product = f"per_device_train_batch_size: {micro} x gradient_accumulation_steps: {steps} x {ranks} processes"
        raise ConfigError(
            f"{root.name('train_batch_size')}: {total} contradicts {product}, which is {micro * steps * ranks}; "
            "correct one of them, or write auto"
        )


def take_optimizer(section: Section, work: Translation) -> None:
    """AdamW with its parameters; another optimizer is refused."""
    if not section.values:
        return
    name = str(section.values.get("type"))
    if name.lower() not in [known.lower() for known in ADAMW]:
        remedy = "write optim: in the run's configuration and leave the section out"
        raise ConfigError(f"{section.name('type')}: expected {' or '.join(ADAMW)}, found {name!r}; {remedy}")
    optim = str(work.keys.given.get("optim") or ADAMW_HERE[0])
    if optim not in ADAMW_HERE:
        raise ConfigError(contradiction(f"{section.name('type')}: {name}", f"optim: {optim}"))
    params = section.section("params")
    for key, allowed in AS_HERE.items():
        if params.has(key) and params.values[key] not in allowed:
            raise ConfigError(f"{params.name(key)}: {show(params.values[key])} is not supported; leave it out")
    for key, ours in PARAMETERS:
        if params.has(key):
            value = params.number(key, 0.0)
            work.take(ours, float(value), f"{params.path}.{key}: {show(value)}")
    if params.has("betas"):
        betas = params.values["betas"]
        if not isinstance(betas, list) or len(betas) != 2:
            raise ConfigError(f"{params.name('betas')}: expected two numbers or auto, found {betas!r}")
        for number, beta in enumerate(betas, start=1):
            value = Section(params.label, params.path, {"betas": beta}).number("betas", 0.0)
            work.take(f"adam_beta{number}", float(value), f"{params.path}.betas: {show(betas)}")


def take_scheduler(section: Section, work: Translation) -> None:
    """WarmupLR and WarmupDecayLR under LLaMA-Factory's names; another schedule is refused."""
    if not section.values:
        return
    name = str(section.values.get("type"))
    if name not in SCHEDULES:
        remedy = "write lr_scheduler_type: in the run's configuration and leave the section out"
        raise ConfigError(f"{section.name('type')}: expected {' or '.join(SCHEDULES)}, found {name!r}; {remedy}")
    work.take("lr_scheduler_type", SCHEDULES[name], f"{section.path}.type: {name}")
    params = section.section("params")
    if params.number("warmup_min_lr", 0.0) != 0:
        raise ConfigError(
            f"{params.name('warmup_min_lr')}: a warm-up begins at 0, found {params.values['warmup_min_lr']}"
        )
    if params.has("warmup_max_lr"):
        value = params.number("warmup_max_lr", 0.0)
        work.take("learning_rate", float(value), f"{params.path}.warmup_max_lr: {show(value)}")
    if params.has("warmup_num_steps"):
        _take_warmup(params, work)
    if params.word("warmup_type", ("log", "linear"), "log") == "log" and _warms_up(work):
        work.clauses.append("the warm-up is linear")
    if params.has("total_num_steps"):
        total, steps = params.integer("total_num_steps", least=1, default=1), work.keys.given.get("max_steps")
        if steps != total:
            raise ConfigError(
                f"{params.name('total_num_steps')}: {total} needs max_steps: {total}, "
                f"found {'none' if steps is None else steps}; write auto, or set max_steps"
            )


def _take_warmup(params: Section, work: Translation) -> None:
    steps = params.integer("warmup_num_steps", least=0, default=0)
    said = f"{params.path}.warmup_num_steps: {steps}"
    ratio: Any = work.keys.given.get("warmup_ratio")
    if ratio:
        raise ConfigError(contradiction(f"{params.label}: {said}", f"warmup_ratio: {ratio}"))
    work.take("warmup_steps", steps, said)


def _warms_up(work: Translation) -> bool:
    return bool(work.keys.value("warmup_steps") or is_on(work.keys.given.get("warmup_ratio")))
