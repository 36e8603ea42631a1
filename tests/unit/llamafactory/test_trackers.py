"""Which callbacks report_to and use_swanlab give, and that none of them gets a secret."""

import dataclasses
import sys
from types import ModuleType, SimpleNamespace

import pytest
from transformers import TrainerCallback
from transformers.integrations import INTEGRATION_TO_CALLBACK, TensorBoardCallback, get_available_reporting_integrations

import dataflex_mega.llamafactory.trackers as trackers
from dataflex_mega.errors import ConfigError
from dataflex_mega.llamafactory.args import LFArgs
from dataflex_mega.llamafactory.callback_list import in_order
from dataflex_mega.llamafactory.trackers import PACKAGES, Trackers, reports, without_secret_values

ABSENT = "neptune"  # in none of our environments


def arguments(**finetuning):
    keys = {"use_swanlab": False, "early_stopping_steps": None, **finetuning}
    empty = SimpleNamespace()
    return LFArgs(empty, empty, SimpleNamespace(profile_modules=None, run_name="named"), SimpleNamespace(**keys), empty)


def test_every_tracker_of_transformers_has_a_package_to_install():
    assert PACKAGES.keys() == INTEGRATION_TO_CALLBACK.keys()


@pytest.mark.parametrize(
    ("value", "names"),
    [
        (None, []), ("none", []), ([], []), (["none"], []), ("wandb", ["wandb"]), ("wandb, mlflow", ["wandb", "mlflow"]),
        (["tensorboard", "trackio", "tensorboard"], ["tensorboard", "trackio"]),
    ],
)  # fmt: skip
def test_the_names_of_report_to(value, names):
    assert reports(value) == names


def test_all_are_those_that_are_installed():
    assert reports("all") == get_available_reporting_integrations() == reports(["all"])


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"report_to: expected azure_ml.*found 'wandd'.*did you mean 'wandb'"):
        reports("tensorboard,wandd")


def test_a_missing_package_is_one_line_with_the_command():
    with pytest.raises(ConfigError, match=r"^report_to: neptune needs the package neptune, .*; pip install neptune$"):
        Trackers.load(arguments(), [ABSENT], True)


def test_tensorboard_is_ours_unless_that_is_off():
    assert Trackers.load(arguments(), ["tensorboard"], True) == Trackers([], [])
    (callback,) = Trackers.load(arguments(), ["tensorboard"], False).before
    assert isinstance(callback, TensorBoardCallback)


@pytest.mark.parametrize("use", [True, False])
def test_swanlab_reports_once_through_llamafactorys_callback(monkeypatch, use):
    class SwanLabCallback(TrainerCallback):
        def __init__(self, **keys):
            self.keys = keys

    swanlab, part = ModuleType("swanlab"), ModuleType("swanlab.integration.transformers")
    part.SwanLabCallback = SwanLabCallback  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "swanlab", swanlab)
    monkeypatch.setattr(trackers, "find_spec", lambda _: object())
    monkeypatch.setitem(sys.modules, "swanlab.integration", ModuleType("swanlab.integration"))
    monkeypatch.setitem(sys.modules, "swanlab.integration.transformers", part)
    names = ("api_key", "lark_webhook_url", "lark_secret", "project", "workspace", "run_name", "mode", "logdir")
    args = arguments(use_swanlab=use, **{f"swanlab_{name}": None for name in names} | {"swanlab_mode": "cloud"})
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    loaded = Trackers.load(args, ["swanlab"], True)
    assert (len(loaded.before), len(loaded.after)) == ((0, 1) if use else (1, 0))
    (callback,) = [*loaded.before, *loaded.after]
    assert isinstance(callback, SwanLabCallback) and callback.keys["experiment_name"] == "named"
    assert callback.keys["mode"] == "offline"


def test_the_order_is_that_of_hugging_face_and_llamafactory():
    first, last, user = (type(name, (TrainerCallback,), {})() for name in ("First", "Last", "User"))
    line = in_order(arguments(), [user], TrainerCallback(), Trackers([first], [last]), {"model": None})
    assert [type(callback).__name__ for callback in line] == [
        "DefaultFlowCallback", "First", "User", "LogCallback", "Last", "TrainerCallback", "ReporterCallback"
    ]  # fmt: skip


@dataclasses.dataclass
class Arguments:
    output_dir: str = "out"
    swanlab_api_key: str | None = "sk-0123456789"
    swanlab_lark_webhook_url: str | None = "https://open.example/hook/0123456789"
    hub_token: str | None = "hf_abcdefghijklmnopqrstuvwxyz0123456789"
    ray_init_kwargs: dict | None = dataclasses.field(
        default_factory=lambda: {"address": "auto", "api_token": "0123456789"}
    )
    proxy: str | None = "https://user:0123456789@example.org"


def test_no_secret_reaches_a_callback_or_a_file():
    given = Arguments()
    hidden = without_secret_values(LFArgs(given, None, None, None, None)).model
    assert "0123456789" not in repr(hidden) and hidden.output_dir == "out"
    assert hidden.ray_init_kwargs == {"address": "auto"} and hidden.swanlab_lark_webhook_url is None
    assert given.swanlab_api_key == "sk-0123456789"
