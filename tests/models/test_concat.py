"""Several encoders as one: the numbers of MCL's authors, and both norms."""

import pytest
import torch
from torch import Tensor, nn

from repr.models.concat import Concat, Encoder, join
from tests.golden import golden

STAGES = {"stage0": [0], "stage1": [1], "stage2": [2], "concat012": [0, 1, 2]}


class Stored(nn.Module):
    """An encoder whose output for sample i is row i of a table."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table, self.num_features = table, table.shape[1]

    def forward(self, index: Tensor) -> Tensor:
        return self.table[index]


def scores(stages: list[int], norm: str) -> Tensor:
    """Of 135 pairs of images and statements, how much each statement belongs to each image: (135, 2, 2)."""
    data = golden("mcl")
    image, text = (
        Concat([Stored(torch.as_tensor(data[f"integ.stage_{name}_raw"][stage])) for stage in stages], norm=norm)(
            torch.arange(270)
        ).unflatten(0, (135, 2))
        for name in ("img", "txt")
    )
    return (100 * text @ image.mT).softmax(dim=2)


@pytest.mark.parametrize("name", STAGES)
def test_raw_outputs_joined_score_as_the_authors_do(name: str) -> None:
    data, ours = golden("mcl"), scores(STAGES[name], "joined")
    theirs = torch.as_tensor(data[f"integ.{name}.score_img1"]).float()
    torch.testing.assert_close(ours[:, :, 0], theirs, rtol=0, atol=6e-5)  # printed with four decimals
    assert (ours.argmax(dim=2).numpy() == data[f"integ.{name}.pred"]).all()


def test_one_norm_a_stage_is_another_rule() -> None:
    """On this toy it gets 94.1 % of the pairs right, joined raw outputs 84.4."""
    right = [(scores([0, 1, 2], norm).argmax(dim=2) == torch.tensor([0, 1])).all(dim=1) for norm in ("each", "joined")]
    assert [pairs.float().mean().item() for pairs in right] == pytest.approx([0.9407, 0.8444], abs=1e-4)
    for stage in range(3):
        torch.testing.assert_close(scores([stage], "each"), scores([stage], "joined"))


def test_it_is_called_like_a_backbone() -> None:
    short, long = nn.Linear(4, 2), nn.Linear(4, 3)
    short.num_features, long.output_dim = 2, 3
    encoder, x = Concat([short, long]), torch.randn(5, 4)
    out = encoder(x)
    assert out.shape == (5, encoder.num_features) == (5, encoder.output_dim)
    raw = torch.cat([short(x), long(x)], dim=1)
    torch.testing.assert_close(out, raw / raw.norm(dim=1, keepdim=True))
    each = join([short(x), long(x)], "each")
    torch.testing.assert_close(each[:, :2].norm(dim=1), each[:, 2:].norm(dim=1))
    torch.testing.assert_close(each.norm(dim=1), torch.ones(5))


def test_a_method_is_an_encoder_of_its_own() -> None:
    class Flow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def encode_image(self, images: Tensor) -> Tensor:
            return self.layer(images)

    flow, x = Flow(), torch.randn(4, 3)
    encoder = Encoder(flow, "encode_image", 2)
    torch.testing.assert_close(encoder(x), flow.layer(x))
    assert len(list(encoder.parameters())) == 2


def test_errors() -> None:
    with pytest.raises(ValueError, match="one encoder or more"):
        Concat([])
    with pytest.raises(ValueError, match="norm is 'raw'; set it to joined"):
        Concat([nn.Identity()], norm="raw")
