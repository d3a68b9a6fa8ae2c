"""Re-ranking against the order of all candidates, and its ties."""

import pytest
import torch
from torch.nn import functional as F

from repr.metrics.features import Features
from repr.metrics.rerank import reranked, shortlist
from repr.metrics.retrieval import retrieval


def tables() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    queries, candidates = torch.randn(9, 4, generator=generator), torch.randn(14, 4, generator=generator)
    right = torch.stack([torch.arange(14) % 9, torch.arange(14)], 1)
    return queries, candidates, right


def test_scores_order_the_nearest_and_cosines_the_others() -> None:
    queries, candidates, right = tables()
    listed = shortlist(queries, candidates, 5, chunk_size=4)
    cosine = F.normalize(queries.double(), dim=1) @ F.normalize(candidates.double(), dim=1).T
    assert torch.equal(listed, cosine.topk(5).indices)
    scores = torch.randn(9, 5, generator=torch.Generator().manual_seed(1))
    found = reranked(queries, candidates, right, listed, scores, ks=[1, 3, 5, 7])
    order = cosine.clone() - 10
    order.scatter_(1, listed, scores.double())
    own = torch.zeros(9, 14, dtype=torch.bool)
    own[right[:, 0], right[:, 1]] = True
    best = order.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
    rank = ((order > best) & ~own).sum(1)
    assert {k: found[f"R@{k}"] for k in (1, 3, 5, 7)} == {
        k: pytest.approx((rank < k).double().mean().item()) for k in (1, 3, 5, 7)
    }


def test_cosines_as_scores_change_nothing() -> None:
    queries, candidates, right = tables()
    listed = shortlist(queries, candidates, 50)  # more than there are
    assert listed.shape == (9, 14)
    scores = (F.normalize(queries, dim=1) @ F.normalize(candidates, dim=1).T).gather(1, listed)
    table = Features(torch.arange(9), queries, queries, text=candidates, pairs=right)
    expected, found = retrieval(table), reranked(queries, candidates, right, listed, scores)
    assert found == {name.removeprefix("i2t_"): value for name, value in expected.items() if name.startswith("i2t")}


def test_ties_and_no_numbers_count_against_it() -> None:
    queries, candidates = torch.eye(2), torch.eye(2)
    right, listed = torch.arange(2).unsqueeze(1).repeat(1, 2), torch.tensor([[0, 1], [1, 0]])
    values = [reranked(queries, candidates, right, listed, torch.tensor(scores), ks=[1])["R@1"] for scores in (
        [[1.0, 0.0], [1.0, 0.0]], [[1.0, 1.0], [1.0, 0.0]], [[1.0, 2.0], [1.0, torch.nan]],
    )]  # fmt: skip
    assert values == [1, 0.5, 0]
