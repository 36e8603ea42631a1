"""The state of optimizers that keep marks or objects beside their tensors goes to plain values and back."""

import copy

import torch
from llamafactory.third_party.muon import Muon

from dataflex_mega.engines.fsdp.optimizer_state import optimizer_state, set_optimizer_state


class Projector:
    """As GaLore's: a tensor, numbers, and one made with the first gradient."""

    def __init__(self, rank):
        self.rank, self.count, self.matrix = rank, 0, None

    def project(self, gradient):
        if self.matrix is None or self.count % 2 == 0:
            self.matrix = torch.linalg.svd(gradient)[2][: self.rank]
        self.count += 1
        return gradient @ self.matrix.T @ self.matrix


class Projected(torch.optim.Optimizer):
    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                projector = state.setdefault("projector", Projector(2))
                momentum = state.setdefault("momentum", torch.zeros_like(p))
                momentum.mul_(0.9).add_(projector.project(p.grad))
                p.add_(momentum, alpha=-group["lr"])


def model_of(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(6, 4, bias=False), torch.nn.Linear(4, 3, bias=False))


def make_muon(model):
    return Muon(lr=0.1, muon_params=[model[0].weight], adamw_params=[model[1].weight])


def make_projected(model):
    return Projected(model.parameters())


def train(model, optimizer, steps):
    for step in steps:
        torch.manual_seed(step)
        optimizer.zero_grad()
        model(torch.randn(5, 6)).square().mean().backward()
        optimizer.step()


def check(make):
    whole = model_of()
    optimizer = make(whole)
    train(whole, optimizer, range(3))
    optimizer.param_groups[0]["lr"] = 0.05  # as a schedule sets it
    weights, stored = copy.deepcopy(whole.state_dict()), copy.deepcopy(optimizer_state(whole, optimizer))
    train(whole, optimizer, range(3, 6))

    fresh = model_of(seed=9)
    other = make(fresh)
    before = copy.deepcopy(fresh.state_dict())
    template = optimizer_state(fresh, other)
    assert all(torch.equal(before[name], weight) for name, weight in fresh.state_dict().items())
    assert keys_of(template) == keys_of(stored)
    fresh.load_state_dict(weights)
    set_optimizer_state(fresh, other, stored)
    train(fresh, other, range(3, 6))
    assert all(torch.equal(fresh.state_dict()[name], weight) for name, weight in whole.state_dict().items())


def keys_of(value):
    return {key: keys_of(inner) for key, inner in value.items()} if isinstance(value, dict) else None


def test_muon():
    check(make_muon)


def test_objects_in_the_state():
    check(make_projected)
