"""BatchNorm over ranks, on one process."""

import copy

import pytest
import timm
import torch
from torch import nn

from repr.models.batchnorm import SyncBatchNorm, synchronise, unsynchronised_fault


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])  # plain, and with activations inside
def test_a_synchronised_backbone_is_the_same_on_one_process(name: str) -> None:
    plain = timm.create_model(name, num_classes=0)
    model = synchronise(copy.deepcopy(plain))
    kinds = {type(module).__name__ for module in model.modules() if "BatchNorm" in type(module).__name__}
    assert kinds <= {"SyncBatchNorm", "SyncBatchNormAct"}
    assert kinds
    for training in (True, False):
        x = torch.randn(4, 3, 32, 32)
        torch.testing.assert_close(model.train(training)(x), plain.train(training)(x))
    assert model.state_dict().keys() == plain.state_dict().keys()
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value)
    assert isinstance(synchronise(nn.BatchNorm1d(3)), SyncBatchNorm)
    kept = nn.SyncBatchNorm(3)
    assert synchronise(kept) is kept


def test_batch_norm_of_one_process_among_several_is_told() -> None:
    model = timm.create_model("test_resnet", num_classes=0)
    assert "conv1.1 is BatchNorm with the statistics of one of 2 processes" in (unsynchronised_fault(model, 2) or "")
    assert unsynchronised_fault(model, 1) is None
    assert unsynchronised_fault(copy.deepcopy(model).eval(), 2) is None
    assert unsynchronised_fault(synchronise(model), 2) is None
