"""What cluster_less makes of the scores of clusters, and its parameters."""

import pytest
import torch

from dataflex_mega.algorithms.base import DomainInfo
from dataflex_mega.algorithms.requests import ClusterGradientSignal, PoolClusterRequest, requests_of
from dataflex_mega.algorithms.selectors.cluster_less import ClusterLess
from dataflex_mega.errors import ConfigError
from dataflex_mega.types import Clusters, ProjectionSpec, SignalTable
from tests.unit.algorithms.examples import DOMAINS, generator, update_context


def clusters_of(selector):
    """What the provider of its scores reads."""
    return requests_of(selector, ClusterGradientSignal)[0].clusters()


def test_a_cluster_scores_the_cosine_of_its_mean_direction():
    """Representatives (1,0) and (0.6,0.8) of one cluster, (0,1) of another; U = mean of (1,0), (0.8,0.6)."""
    units = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    u = torch.tensor([[0.9, 0.3]])
    means = torch.stack([units[:2].mean(0), units[2]])
    own = torch.tensor([0, 1, 0, 0])
    signals = {"dot": (means @ u.t())[own], "norm2": means.square().sum(1)[own]}
    scores = ClusterLess().score(SignalTable(torch.arange(4), torch.zeros(4), signals))
    assert scores.tolist() == pytest.approx([0.84 / (0.64 + 0.16) ** 0.5, 0.3, 0.84 / 0.8**0.5, 0.84 / 0.8**0.5])
    assert ClusterLess().select(scores, 2, update_context(), generator()).tolist() == [0, 2]


def test_the_number_of_clusters():
    for given, expected in (({}, 2), ({"cluster_size": 10}, 8), ({"num_clusters": 5}, 5)):
        made = ClusterLess(**given)
        made.setup(DOMAINS)
        assert made.cluster_count == expected


def test_clusters_are_state():
    made, again = ClusterLess(), ClusterLess()
    again.load_state_dict(made.state_dict())
    assert clusters_of(again) is None
    (request,) = requests_of(made, PoolClusterRequest)
    assert made.is_due(request, 0)
    made.receive(request, Clusters(torch.arange(3), torch.ones(3)), 0)
    assert not made.is_due(request, 5), "the pool is clustered once"
    again.load_state_dict(made.state_dict())
    clusters = clusters_of(again)
    assert clusters is not None and clusters.cluster_ids.tolist() == [0, 1, 2] and not again.is_due(request, 5)


def test_what_it_asks_for():
    made = ClusterLess(num_clusters=5, gradient_type="sgd", samples_per_cluster=2, side=8, seed=3)
    made.setup(DOMAINS)
    clusters, scores = made.requests()
    assert isinstance(clusters, PoolClusterRequest) and (clusters.num_clusters, clusters.seed) == (5, 3)
    assert isinstance(scores, ClusterGradientSignal) and scores.name == "cluster_sgd" and not scores.adam
    assert (scores.num_clusters, scores.samples_per_cluster) == (5, 2)
    assert scores.projection == ProjectionSpec("two_sided", 8, 3)


@pytest.mark.parametrize("name", ["cluster_size", "num_clusters", "samples_per_cluster", "clustering_max_iter", "side"])
def test_what_cannot_be_is_named(name):
    with pytest.raises(ConfigError, match=rf"selector\.cluster_less\.{name}: must be >= 1, found 0"):
        ClusterLess(**{name: 0})


def test_more_clusters_than_samples_are_refused():
    with pytest.raises(ConfigError, match="num_clusters: at most one per sample, 3, found 4"):
        ClusterLess(num_clusters=4).setup(DomainInfo(("a",), (3,), (1.0,)))
