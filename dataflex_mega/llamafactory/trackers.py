"""`report_to` and `use_swanlab`: the trackers of experiments that Hugging Face and LLaMA-Factory have callbacks for.

TensorBoard is written by metrics.py, which has more to say; Hugging Face's callback takes its place where that is off.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from dataflex_mega.errors import ConfigError, did_you_mean
from dataflex_mega.llamafactory.args import LFArgs, first_line
from dataflex_mega.redaction import is_secret_name, without_secrets

# Value of report_to -> what pip calls the package that it needs.
PACKAGES = {
    "azure_ml": "azureml-mlflow", "clearml": "clearml", "codecarbon": "codecarbon", "comet_ml": "comet-ml",
    "dagshub": "dagshub", "dvclive": "dvclive", "flyte": "flytekit", "kubeflow": "kubeflow", "mlflow": "mlflow",
    "neptune": "neptune", "swanlab": "swanlab", "tensorboard": "tensorboard", "trackio": "trackio", "wandb": "wandb",
}  # fmt: skip
# The module of a package whose name says something else.
MODULES = {"azure_ml": "azureml", "flyte": "flytekit"}
PATHS = ("output_dir", "logging_dir")  # arguments that name folders stay as they are


def reports(value: Any) -> list[str]:
    """The value of report_to -> names of trackers; `all` are those whose package is installed.

    Raises ConfigError for a name that Hugging Face's Trainer does not know.
    """
    from transformers.integrations import get_available_reporting_integrations

    names = [] if value is None else [value] if isinstance(value, str) else list(value)
    names = [part.strip() for name in names for part in str(name).split(",") if part.strip()]
    if names in ([], ["none"]):
        return []
    if names == ["all"]:
        return get_available_reporting_integrations()
    for name in names:
        if name not in PACKAGES:
            near = did_you_mean(name, [*PACKAGES, "all", "none"])
            raise ConfigError(f"report_to: expected {', '.join(PACKAGES)}, all or none, found {name!r}{near}")
    return list(dict.fromkeys(names))


@dataclasses.dataclass(frozen=True)
class Trackers:
    """Callbacks of the trackers of a run, where they stand among the others.

    Attributes:
        before: those of report_to, ahead of the user's callbacks.
        after: that of use_swanlab, behind LLaMA-Factory's log.
    """

    before: Sequence[Any] = ()
    after: Sequence[Any] = ()

    @classmethod
    def load(cls, args: LFArgs, names: list[str], own_tensorboard: bool) -> Trackers:
        """Make the callbacks; nothing is sent before training begins. Raises ConfigError naming a package to install.

        Args:
            names: of `reports`.
            own_tensorboard: whether the run writes TensorBoard files itself.
        """
        before = [
            _make(name, args)
            for name in names
            if not (name == "tensorboard" and own_tensorboard)
            and not (name == "swanlab" and args.finetuning.use_swanlab)
        ]
        return cls(before, [_make("swanlab", args, "use_swanlab")] if args.finetuning.use_swanlab else [])


def _make(name: str, args: LFArgs, key: str = "report_to") -> Any:
    from llamafactory.train.trainer_utils import get_swanlab_callback
    from transformers.integrations import get_reporting_integration_callbacks

    module = MODULES.get(name, name)
    if find_spec(module) is None:
        raise ConfigError(
            f"{key}: {name} needs the package {module}, which is not installed; pip install {PACKAGES[name]}"
        )
    try:
        if name == "swanlab":  # transformers' own asks the swanlab of today for a run before there is one
            return get_swanlab_callback(_swanlab_keys(args))
        return get_reporting_integration_callbacks([name])[0]()
    except (ImportError, RuntimeError) as error:
        raise ConfigError(f"{key}: {name}: {first_line(error)}; pip install {PACKAGES[name]}") from error


def _swanlab_keys(args: LFArgs) -> Any:
    """The keys for SwanLab; those that are not set give way to SWANLAB_MODE and to run_name, as with other trackers."""
    keys = copy.copy(args.finetuning)
    if keys.swanlab_mode == "cloud":
        keys.swanlab_mode = os.environ.get("SWANLAB_MODE") or keys.swanlab_mode
    keys.swanlab_run_name = keys.swanlab_run_name or args.training.run_name
    return keys


def without_secret_values(args: LFArgs) -> LFArgs:
    """Copies of the arguments for callbacks and files: trackers store them, so tokens, keys and webhooks are left out."""
    return LFArgs(*map(_hide, args))


def _hide(arguments: Any) -> Any:
    hidden = copy.copy(arguments)
    if not dataclasses.is_dataclass(arguments):
        return hidden
    for field in dataclasses.fields(arguments):
        value = getattr(arguments, field.name, None)
        if is_secret_name(field.name):
            setattr(hidden, field.name, None)
        elif isinstance(value, str | dict) and field.name not in PATHS:
            setattr(hidden, field.name, without_secrets(value))
    return hidden
