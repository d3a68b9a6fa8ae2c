"""What a flow says it gives for clustering is what it gives."""

import pytest
import torch

from tests.objectives.conftest import OBJECTIVES, build


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_declared_embeddings_are_those_of_predict_step(name: str) -> None:
    objective = build(name).eval()
    batch = {"image": torch.randn(2, 3, 32, 32)}
    if getattr(objective, "text", None) is not None:
        batch["text"] = torch.ones(2, objective.text.context_length, dtype=torch.int64)
    with torch.no_grad():
        outputs = objective.predict_step(batch, 0)
    given = {name: value for name, value in vars(outputs).items() if isinstance(value, torch.Tensor)}
    assert set(objective.EMBEDDINGS) <= set(given)
    assert all(len(value) == 2 for value in [*given.values(), *outputs.poolings.values(), *outputs.logits.values()])
    assert set(objective.PAIRWISE) <= set(objective.TERMS)
