"""The choice between the Triton kernel and torch operations, and its message."""

import pytest
import torch

from dataflex_mega.errors import ConfigError
from dataflex_mega.signals import kernel_choice
from dataflex_mega.signals.per_sample_gradients import TorchAccumulator

CPU = torch.device("cpu")


def test_a_cpu_has_torchs_operations_and_the_line_says_why(monkeypatch):
    monkeypatch.delenv(kernel_choice.VARIABLE, raising=False)
    choice = kernel_choice.choose_kernel(CPU)
    assert not choice.uses_triton and choice.accumulator_class is TorchAccumulator
    assert "torch operations" in choice.message and "cpu" in choice.message


def test_the_variable_decides(monkeypatch):
    monkeypatch.setattr(kernel_choice, "unavailable_reason", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    for value, uses_triton in (("auto", True), ("triton", True), ("torch", False)):
        monkeypatch.setenv(kernel_choice.VARIABLE, value)
        assert kernel_choice.choose_kernel(CPU).uses_triton is uses_triton


@pytest.mark.parametrize(("value", "message"), [("triton", "needs a GPU"), ("tritn", "did you mean 'triton'")])
def test_what_cannot_be_is_refused(monkeypatch, value, message):
    monkeypatch.setenv(kernel_choice.VARIABLE, value)
    with pytest.raises(ConfigError, match=message):
        kernel_choice.choose_kernel(CPU)
