"""Dynamic mixing in a bare training loop, stopped and resumed: `python examples/python/plain_loop.py`."""

import torch
from torch.utils.data import DataLoader, TensorDataset

import dataflex_mega as dm

SIZES = {"easy": 200, "hard": 600}
DOMAINS = torch.tensor([0] * SIZES["easy"] + [1] * SIZES["hard"])


def train(sampler, model, steps):
    """Fit y = w x on both domains; the hard one has noise -> the domain of every sample that was drawn."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(len(DOMAINS), 4, generator=generator)
    noise = torch.randn(len(DOMAINS), generator=generator) * DOMAINS
    data = TensorDataset(x, x.sum(1) + noise, DOMAINS)
    optimizer, drawn = torch.optim.SGD(model.parameters(), lr=0.05), []
    batches = iter(DataLoader(data, batch_sampler=sampler))
    for _ in range(steps):
        x, y, domains = next(batches)
        losses = (model(x).squeeze(1) - y).square()
        losses.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        hot = torch.nn.functional.one_hot(domains, 2).double()
        sampler.observe(losses.detach().double() @ hot, hot.sum(0))
        drawn += domains.tolist()
    return drawn


def make():
    """A sampler and a model, the same at every call."""
    torch.manual_seed(0)
    return dm.MixtureBatchSampler(SIZES, 16, seed=0, mixer="odm", update_every=4), torch.nn.Linear(4, 1)


sampler, model = make()
whole = train(sampler, model, 40)

sampler, model = make()
begun = train(sampler, model, 15)
state = sampler.state_dict()
resumed = dm.MixtureBatchSampler(SIZES, 16, seed=0, mixer="odm", update_every=4)
resumed.load_state_dict(state)
assert begun + train(resumed, model, 25) == whole
print("drawn from easy and hard:", torch.tensor(whole).bincount().tolist(), "the same when stopped and resumed")
