import pytest
import torch
from torch.nn import functional as F

from repr.batch import Batch
from repr.config import ConfigError, compose
from repr.config_check import check
from tests.objectives.conftest import build


def test_queries_of_a_modality_meet_keys_of_the_other(batch: Batch) -> None:
    """The mean over pairs and both ways; the loss itself is the authors' in tests/losses/test_golden_rocket.py."""
    part = build("byolip").parts["byol"]
    for parameter in part.teacher.parameters():
        parameter.data.mul_(1.5)  # so that it is told apart from the student
    batch["views"] = batch["views"][:3]
    texts = batch["texts"].unbind(1)

    def projected(towers: torch.nn.Module) -> tuple[list, list]:
        text = part.text if towers is part else towers.text
        backbone = part.backbone if towers is part else towers.backbone
        images = [towers.image_projector(backbone(view)) for view in batch["views"]]
        return images, [towers.text_projector(text(tokens)) for tokens in texts]

    (images, words), (image_keys, word_keys) = projected(part), projected(part.teacher)
    distances = [2 - 2 * F.cosine_similarity(part.image_predictor(x), key).mean() for x in images for key in word_keys]
    distances += [2 - 2 * F.cosine_similarity(part.text_predictor(x), key).mean() for x in words for key in image_keys]
    assert len(distances) == 12
    torch.testing.assert_close(part.step(batch).terms["regression"], torch.stack(distances).mean())


@pytest.mark.parametrize("name", ["byolip", "siamlip"])
def test_keys_get_no_gradient(name: str, batch: Batch) -> None:
    part = next(part for key, part in build(name).parts.items() if key in ("byol", "simsiam"))
    part.image_predictor.register_forward_hook(lambda module, inputs, output: output.detach())
    part.text_predictor.register_forward_hook(lambda module, inputs, output: output.detach())
    assert not part.step(batch).terms["regression"].requires_grad


def test_without_further_captions_it_is_the_first_view_and_the_caption(batch: Batch) -> None:
    part = build("siamlip").parts["simsiam"]
    part.every_pair = False
    del batch["texts"]
    value = part.step(batch).terms["regression"]
    batch["views"] = batch["views"][:1]
    torch.testing.assert_close(part.step(batch).terms["regression"], value)
    part.every_pair = True
    with pytest.raises(ValueError, match="set distorted_captions=shuffled"):
        part.step(batch)


@pytest.mark.parametrize(("name", "passes"), [("clip_rocket", 3), ("barlip", 3), ("siamlip", 3), ("byolip", 5)])
def test_a_caption_passes_the_text_tower_once(name: str, passes: int, batch: Batch) -> None:
    """The plain one and two distorted ones; a teacher sees the distorted ones besides."""
    flow, seen = build(name), []
    texts = [flow.text, *(part.teacher.text for part in flow.parts.values() if part.teacher is not None)]
    for tower in texts:
        tower.transformer.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    flow.step(batch)
    assert sum(seen) == passes * len(batch["text"])


def test_what_a_config_gets_wrong_is_told() -> None:
    with pytest.raises(ConfigError, match=r"every_pair .* set distorted_captions=shuffled"):
        check(compose(["objective=byolip", "distorted_captions=none"]))
    with pytest.raises(ConfigError, match="takes two views and two further captions"):
        check(compose(["objective=swalip", "objective.views.local=[0,1,2]"]))
    with pytest.raises(ConfigError, match="batch_size to 2 or more"):
        check(compose(["objective=barlip", "data.batch_size=1"]))
