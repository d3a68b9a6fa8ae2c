"""Objectives under a Trainer of one's own: loaders of torchvision's kind, a validation loss, and checkpoints."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import open_clip
import pytest
import timm
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import FakeData
from torchvision.transforms import v2

from repr.batch import Batch
from repr.config import ConfigError, compose
from repr.config_check import check
from repr.data.collate import Collate
from repr.data.views import View
from repr.models.masking import Masking
from repr.objectives.base import Objective
from repr.objectives.image_text import ImageText
from repr.objectives.joint_embedding import JointEmbedding
from repr.objectives.mixing import Mixing
from repr.objectives.mixup_contrast import MixupContrast
from repr.objectives.pixpro import PixPro
from repr.objectives.swav import SwAV
from repr.optim import Optim
from repr.runs.trained import Trained
from tests.objectives.conftest import make_batch, tokenizer

VIEWS = [View(32, (0.3, 1.0), count=2, flip=0.5, brightness=0.4, gray_prob=0.2)]
TRANSFORM = v2.Compose([v2.PILToTensor(), v2.RandomResizedCrop(32), v2.ToDtype(torch.float32, scale=True)])
SCALED = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
PICTURE = Image.new("RGB", (40, 32), "red")
SMALL: dict[str, Any] = {"hidden_dim": 32, "dim": 16}


def backbone() -> nn.Module:
    return timm.create_model("test_resnet", num_classes=0)


def text() -> nn.Module:
    return open_clip.transformer.TextTransformer(context_length=12, width=32, heads=2, layers=1, output_dim=16)


def trainer(**options: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    return pl.Trainer(**({"max_epochs": 1, "enable_model_summary": False} | quiet | options))


class Pairs(Dataset):
    """Gray pictures with several captions each, and a label; as CocoCaptions has them, and more."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> tuple:
        return Image.new("L", (40, 30 + i), 30 * i), [f"a {i}", f"the {i}"], i % 3


OBJECTIVES = {
    "views": (lambda: JointEmbedding(backbone(), **SMALL), Collate(VIEWS), FakeData(16, (3, 40, 40), 5)),
    "transforms": (lambda: SwAV(backbone(), **SMALL), Collate([TRANSFORM] * 2), FakeData(16, (3, 40, 40), 5)),
    "boxes": (lambda: PixPro(backbone(), **SMALL), Collate(VIEWS), FakeData(16, (3, 40, 40), 5)),
    "captions": (lambda: ImageText(backbone(), text()), Collate([TRANSFORM], tokenizer()), Pairs()),
    "both": (
        lambda: MixupContrast(backbone(), text(), num_classes=3, weights={"fusion": 1.0}),
        Collate(VIEWS, tokenizer()),
        Pairs(),
    ),
}


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.filterwarnings("ignore::UserWarning")  # of Lightning, about workers and tiny loaders
def test_a_trainer_of_ones_own_fits_rows_of_torchvisions_kind(name: str) -> None:
    make, collate, rows = OBJECTIVES[name]
    objective, plain = make(), trainer()
    plain.fit(objective, DataLoader(rows, 4, collate_fn=collate), DataLoader(rows, 3, collate_fn=collate))
    logged = plain.callback_metrics
    assert {f"{part}/{term}" for part in ("train", "val") for term in ("loss", *objective.weights)} <= logged.keys()
    assert all(torch.isfinite(value) for value in logged.values())


def test_batches_hold_what_rows_tell() -> None:
    batch = Collate(VIEWS, tokenizer())([Pairs()[i] for i in range(4)])
    assert {*batch} == {"seed", "views", "boxes", "text", "label"}
    assert [view.shape for view in batch["views"]] == [(4, 3, 32, 32)] * 2
    assert batch["label"].tolist() == [[0], [1], [2], [0]]
    for i, tokens in enumerate(batch["text"]):
        assert tokens.tolist() in tokenizer()([f"a {i}", f"the {i}"]).tolist()
    drawn = {tuple(text.tolist()) for _ in range(20) for text in Collate(VIEWS, tokenizer())([Pairs()[1]])["text"]}
    assert len(drawn) == 2
    assert {*Collate(VIEWS)([PICTURE, PICTURE])} == {"seed", "views", "boxes"}  # pictures alone
    several = [(PICTURE, torch.tensor([1, 0]), None), (PICTURE, torch.tensor([0, -1]), None)]  # as CelebA's
    assert Collate([TRANSFORM])(several)["label"].tolist() == [[1, 0], [0, -1]]


@pytest.mark.parametrize("pixels", [torch.full((3, 8, 8), 200 / 255), np.full((8, 8, 3), 200, np.uint8)])
def test_pictures_may_be_tensors_and_arrays(pixels: Any) -> None:
    found = Collate([View(8, (1.0, 1.0))], mean=(0, 0, 0), std=(1, 1, 1))([(pixels, 3)])
    assert torch.allclose(found["views"][0], torch.tensor(200 / 255))


@pytest.mark.parametrize(
    ("views", "row", "message"),
    [
        (VIEWS, (PICTURE, 0.5), "no caption .* no label"),
        (VIEWS, (PICTURE, {"boxes": 1}), "no caption .* no label"),
        (VIEWS, {"image": PICTURE}, "begins with a dict"),
        (VIEWS, (torch.full((3, 8, 8), -1.0), 3), "Normalize"),
        (VIEWS, (np.full((8, 8, 3), 200.0), 3), "Normalize"),
        (VIEWS, (np.zeros((8, 8, 5), np.uint8), 3), "no picture can be made of ndarray"),
        ([v2.PILToTensor()], (PICTURE, 3), "torch.uint8"),
        ([lambda picture: picture], (PICTURE, 3), "a view is Image"),
        ([v2.RandomCrop(8)], (torch.ones(1, 8, 8), 3), r"float32 \(1, 8, 8\)"),
    ],
)
def test_rows_of_another_form_are_refused(views: Any, row: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Collate(views)([row])


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(ValueError, match="one kind"):
        Collate([*VIEWS, TRANSFORM])
    with pytest.raises(ValueError, match="at least one view"):
        Collate([])
    with pytest.raises(ValueError, match="no caption"):
        Collate(VIEWS, tokenizer())([(PICTURE, "red"), (PICTURE, 3)])
    with pytest.raises(ValueError, match="labels"):
        Collate(VIEWS)([(PICTURE, [1, 2]), (PICTURE, 3)])
    with pytest.raises(ValueError, match="one size"):
        Collate([SCALED])([PICTURE, PICTURE.rotate(90, expand=True)])


class Noisy(JointEmbedding):
    """A flow that changes state and draws random numbers in its step."""

    def __init__(self) -> None:
        super().__init__(backbone(), **SMALL)
        self.register_buffer("count", torch.tensor(0))

    def step(self, batch: Batch) -> Any:
        self.count += 1
        batch["views"] = [view + torch.randn_like(view) for view in batch["views"]]
        return super().step(batch)


def swav() -> Objective:
    optim = Optim(lr=0.1, warmup_steps=0)
    return SwAV(backbone(), **SMALL, num_prototypes=12, queue_length=16, optim=optim)


@pytest.mark.parametrize("make", [swav, Noisy])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_validation_loss_leaves_training_as_it_is(make: Any) -> None:
    """Queue, prototypes, statistics, random numbers; a last batch that the queue would refuse."""
    trained = []
    for loader in (None, DataLoader([7, 3], batch_size=None, collate_fn=make_batch, generator=torch.Generator())):
        torch.manual_seed(0)
        objective = make()
        plain = trainer(max_epochs=3, val_check_interval=1)
        batches = DataLoader([8, 8], batch_size=None, collate_fn=make_batch)
        plain.fit(objective, batches, loader)
        trained.append({name: tensor.clone() for name, tensor in objective.state_dict().items()})
        assert ("val/loss" in plain.callback_metrics) is (loader is not None)
    torch.testing.assert_close(trained[1], trained[0], rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_training_without_a_last_step_is_refused() -> None:
    batches = DataLoader([8], batch_size=None, collate_fn=make_batch)
    plain = trainer(max_epochs=None, max_time={"seconds": 1})  # for which Lightning trains without end
    with pytest.raises(ValueError, match=r"no last step, .*: give the Trainer max_steps"):
        plain.fit(JointEmbedding(backbone(), **SMALL), batches)


def test_evaluation_batches_are_embedded_and_log_nothing() -> None:
    objective = JointEmbedding(backbone(), **SMALL)  # without a Trainer, `log` would fail
    image = torch.randn(2, 3, 32, 32)
    found = objective.eval().validation_step(Batch(index=torch.arange(2), image=image), 0)
    assert torch.equal(found.image, objective.encode_image(image))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_checkpoints_are_read_with_the_arguments_of_the_constructor(tmp_path: Path) -> None:
    path, objective, plain = tmp_path / "plain.ckpt", JointEmbedding(backbone(), **SMALL), trainer()
    plain.fit(objective, DataLoader([8], batch_size=None, collate_fn=make_batch))
    plain.save_checkpoint(path)
    again = JointEmbedding.load_from_checkpoint(path, backbone=backbone(), **SMALL)
    assert type(again) is JointEmbedding
    torch.testing.assert_close(again.state_dict(), objective.state_dict(), rtol=0, atol=0)
    for options, fault in (
        ({}, "'backbone'"),
        ({"backbone": backbone()}, "size mismatch for head"),
        (SMALL | {"backbone": backbone(), "temprature": 1}, "'temprature'"),
    ):
        with pytest.raises(ValueError, match=f"(?s){fault}.*load_from_checkpoint.*backbone=.*Trained.read"):
            JointEmbedding.load_from_checkpoint(path, **options)
    with pytest.raises(ValueError, match=r"Trained\.read\(RUN_FOLDER\)"):
        JointEmbedding.load_from_checkpoint(tmp_path, backbone=backbone(), **SMALL)


@pytest.mark.parametrize(
    ("objective", "option", "message"),
    [
        ("mae", "masking.ratio=1.5", "masking.ratio=1.5 would keep nothing"),
        ("pixpro", "momentum=2", "momentum=2; set it from 0 to 1"),
        ("mae", "decoder.dim=30", "decoder.dim=30; set it to a multiple of 4 and of objective.decoder.num_heads"),
        ("simclr", "exchange=ward", "exchange=ward; set it to gather"),
    ],
)
def test_the_command_line_names_in_full_what_constructors_call_arguments(
    objective: str, option: str, message: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        check(compose([f"objective={objective}", f"objective.{option}", "image_size=32", "run_folder=x"]))
    assert refused.value.faults[0].startswith(f"objective.{message}")
    if option.startswith("exchange"):  # an option of the whole config, which the objective takes over
        with pytest.raises(ConfigError, match=f"^{message}"):
            check(compose([f"objective={objective}", option, "image_size=32", "run_folder=x"]))


def test_constructors_speak_of_arguments() -> None:
    for make, message in (
        (lambda: ImageText(backbone(), text(), temperature=5.0), r"^temperature=5.0 lies outside temperature_range="),
        (lambda: JointEmbedding(backbone(), weights={"contrast": 0}), "^weights are all zero"),
        (lambda: Masking(ratio=1.5), "^ratio=1.5 would keep nothing"),
        (lambda: Mixing(switch=2), "^switch=2; "),
    ):
        with pytest.raises(ValueError, match=message):
            make()


@pytest.mark.slow
def test_checkpoints_of_a_run_are_read_so_too(tmp_path: Path) -> None:
    from repr.fit import fit

    fit(compose(["objective=simclr", "smoke=true", "backbone.name=test_resnet", f"run_folder={tmp_path}"]))
    kept = Trained.read(tmp_path)
    options = {name: kept.cfg.objective[name] for name in ("hidden_dim", "dim", "num_layers", "last_norm", "last_bias")}
    (path,) = (tmp_path / "checkpoints").glob("*.ckpt")
    objective = JointEmbedding.load_from_checkpoint(path, backbone=backbone(), **options)
    torch.testing.assert_close(objective.state_dict(), kept.objective.state_dict(), rtol=0, atol=0)
    assert "val/loss" not in (tmp_path / "metrics.csv").read_text()
