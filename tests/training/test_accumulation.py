"""Every sample of a step has the same weight, also where the last step of an epoch has fewer batches."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from repr.batch import Batch, StepOutput
from repr.objectives.base import Objective
from repr.optim import Optim

pytestmark = pytest.mark.filterwarnings("ignore")


class Slope(Objective):
    """A loss whose gradient is the mean of the batch's pictures."""

    TERMS = ("slope",)

    def __init__(self) -> None:
        super().__init__(nn.Identity(), weights={"slope": 1.0}, optim=Optim(name="sgd", lr=0.0))
        self.scale = nn.Parameter(torch.ones(()))

    def step(self, batch: Batch) -> StepOutput:
        return StepOutput({"slope": self.scale * batch["image"].mean()}, {}, {})


class Gradients(Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seen: list[Tensor] = []

    def on_before_optimizer_step(self, trainer: Trainer, module: Slope, optimizer: object) -> None:
        self.seen.append(module.scale.grad.clone())

    def on_train_end(self, trainer: Trainer, module: Slope) -> None:
        torch.save(torch.stack(self.seen), self.folder / f"{trainer.global_rank}.pt")


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize(
    ("num_batches", "window", "expected"),
    [(5, 4, [1.5, 4.0]), (3, 4, [1.0]), (5, 2, [0.5, 2.5, 4.0]), (4, 2, [0.5, 2.5]), (5, 1, [0.0, 1.0, 2.0, 3.0, 4.0])],
)
def test_a_short_window_is_averaged_over_its_batches(
    num_batches: int, window: int, expected: list[float], devices: int, tmp_path: Path
) -> None:
    batches = [{"image": torch.full((2, 1), float(value))} for value in range(num_batches)]
    trainer = Trainer(
        accelerator="cpu", devices=devices, strategy="ddp_fork" if devices > 1 else "auto", max_epochs=2, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        use_distributed_sampler=False, accumulate_grad_batches=window, callbacks=[Gradients(tmp_path)],
    )  # fmt: skip
    trainer.fit(Slope(), DataLoader(batches, batch_size=None))
    for rank in range(devices):
        assert torch.load(tmp_path / f"{rank}.pt", weights_only=True).tolist() == pytest.approx(expected * 2)
