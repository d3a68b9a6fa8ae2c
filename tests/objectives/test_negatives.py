"""What samples have in common, and what an objective makes of it."""

import pytest
import torch

from repr.batch import Batch
from repr.objectives.image_text import ImageText
from repr.objectives.joint_embedding import JointEmbedding
from repr.objectives.negatives import sample_keys, share_in_common
from tests.objectives.conftest import build, make_batch
from tests.objectives.test_constructors import vit


def same(batch: Batch) -> list[tuple[int, int]]:
    keys = sample_keys(batch, ("picture", "text", "label"))
    shared = (keys.unsqueeze(1) == keys).any(2).triu(1)
    return [(int(i), int(j)) for i, j in shared.nonzero()]


def test_pictures_captions_and_labels_are_compared_each_by_itself():
    text = torch.tensor([[1, 2, 0], [2, 1, 0], [1, 2, 0], [1, 2, 3], [5, 6, 7]])
    batch = Batch(index=torch.arange(5), text=text)
    assert same(batch) == [(0, 2)]
    batch["picture"] = torch.tensor([7, 8, 9, 9, 10])
    assert same(batch) == [(0, 2), (2, 3)]
    batch["label"] = torch.tensor([[0, 1], [0, 1], [0, 2], [-1, 1], [-1, 1]])  # the last two lack one
    assert same(batch) == [(0, 1), (0, 2), (2, 3)]
    assert share_in_common(sample_keys(batch, ("text", "label"))).item() == pytest.approx(3 / 5)
    assert share_in_common(sample_keys(batch)).item() == pytest.approx(3 / 5)  # not by labels


def test_a_sample_without_labels_is_like_no_other():
    index = torch.arange(6)
    assert same(Batch(index=index, label=torch.tensor([[5], [-1], [-1], [0], [1], [2]]))) == []
    assert same(Batch(index=index)) == []


@pytest.mark.parametrize("name", ["clip", "siglip", "cuaxu", "simclr", "cmae", "mae_clip"])
def test_objectives_leave_out_what_is_no_negative(name):
    objectives = [build(name, f"false_negatives={kind}") for kind in ("keep", "mask", "mask_labels")]
    for objective in objectives[1:]:
        objective.load_state_dict(objectives[0].state_dict())
    batch = make_batch(8)
    batch["picture"], batch["label"] = torch.arange(8), torch.arange(8).unsqueeze(1) % 4
    batch["text"] = torch.arange(8 * batch["text"].shape[1]).view(8, -1)
    outputs = [objective.step(batch) for objective in objectives]
    assert torch.equal(outputs[1].terms["contrast"], outputs[0].terms["contrast"])
    assert outputs[2].terms["contrast"] < outputs[0].terms["contrast"]
    assert [output.logs.get("false_negatives") for output in outputs] == [None, 0, 1]
    batch["picture"] = torch.arange(8) % 4
    found = objectives[1].step(batch)
    torch.testing.assert_close(found.terms["contrast"], outputs[2].terms["contrast"])
    assert found.logs["false_negatives"] == 1
    del batch["picture"]
    batch["label"] = torch.arange(8).unsqueeze(1)
    alone = [objective.step(batch).terms["contrast"] for objective in objectives]
    assert torch.equal(alone[0], alone[2])


def test_what_cannot_mask_says_so():
    with pytest.raises(ValueError, match="false_negatives=drop; set it to keep, mask, mask_labels"):
        ImageText(vit(num_classes=0), torch.nn.Identity(), false_negatives="drop")
    with pytest.raises(ValueError, match="contrast, the term with negatives, has no weight"):
        JointEmbedding(vit(num_classes=0), false_negatives="mask", weights={"invariance": 1.0})
    with pytest.raises(ValueError, match="the loss of contrast takes no keys"):
        JointEmbedding(vit(num_classes=0), false_negatives="mask", losses={"contrast": lambda a, b: (a - b).sum()})
