"""Questions that are answered by the likelihood of captions: as cosines would, and by what is compared with what."""

from collections.abc import Callable

import torch
from torch.nn import functional as F

from repr.data.questions.compositional import Questions, compared
from repr.metrics.captions import likelihood
from repr.metrics.compositional import compositional
from repr.metrics.features import Features

NUM, DIM = 40, 6
OWN = torch.arange(NUM)
CANDIDATES = torch.stack([OWN, OWN ^ 1, torch.where(OWN % 3 == 0, NUM + OWN, -1)], 1)
ITEMS = OWN.view(-1, 2)
KNOWN = {"candidates": CANDIDATES, "items": ITEMS, "attribute": "split", "names": "ab"}


def test_likelihoods_answer_as_cosines_do(table: Callable[..., Features]) -> None:
    """Of pictures in another order than their source, one of which could not be read."""
    rng = torch.Generator().manual_seed(0)
    image, text = torch.randn(NUM, DIM, generator=rng), torch.randn(2 * NUM, DIM, generator=rng)
    rows = torch.randperm(NUM, generator=rng)[:-1]
    query = table(image[rows], split=rows // 20)
    query = Features(rows, query.image, query.trunk, labels=query.labels)
    expected = compositional(query, captions=text, **KNOWN)
    asked = Questions([""] * 2 * NUM, CANDIDATES, ITEMS, "split")
    texts = compared(asked)
    cosines = F.normalize(image.double()) @ F.normalize(text.double()).T
    values = cosines.gather(1, texts.clamp(min=0)).masked_fill(texts < 0, torch.nan)
    values[[row for row in range(NUM) if row not in rows]] = torch.nan
    found = likelihood(query, texts=texts, values=values, **KNOWN)
    assert {f"likelihood_{name}": value for name, value in expected.items() if name != "num_items"} == found
    assert 0.1 < found["likelihood_text_score"] < 0.9
    assert 0.1 < found["likelihood_image_score"] < 0.9


def test_what_is_compared() -> None:
    """A row's candidates, and the right captions of the other rows of its item, each once."""
    candidates = torch.tensor([[4, 7, -1], [5, 4, 6], [8, -1, -1], [9, -1, -1]])
    texts = compared(Questions([""] * 10, candidates, torch.tensor([[0, 1], [3, 2]]), "split"))
    assert texts.tolist() == [[4, 5, 7], [4, 5, 6], [8, 9, -1], [8, 9, -1]]
