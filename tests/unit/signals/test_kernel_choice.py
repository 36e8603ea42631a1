"""Which implementation of gradient scores is taken, and that a run says so."""

import pytest
import torch

from dataflex_mega.errors import ConfigError
from dataflex_mega.signals import kernel_choice as capability
from dataflex_mega.signals.gradients import Plain

CPU = torch.device("cpu")


def test_a_cpu_has_torchs_operations_and_the_line_says_why(monkeypatch):
    monkeypatch.delenv(capability.VARIABLE, raising=False)
    choice = capability.choose(CPU)
    assert not choice.fused and choice.adder is Plain
    assert "torch operations" in choice.line and "cpu" in choice.line


def test_the_variable_decides(monkeypatch):
    monkeypatch.setattr(capability, "obstacle", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    for value, fused in (("auto", True), ("triton", True), ("torch", False)):
        monkeypatch.setenv(capability.VARIABLE, value)
        assert capability.choose(CPU).fused is fused


@pytest.mark.parametrize(("value", "part"), [("triton", "needs a GPU"), ("tritn", "did you mean 'triton'")])
def test_what_cannot_be_is_refused(monkeypatch, value, part):
    monkeypatch.setenv(capability.VARIABLE, value)
    with pytest.raises(ConfigError, match=part):
        capability.choose(CPU)
