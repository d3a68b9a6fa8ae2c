"""The progress bar."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from repr.training.progress import Progress


class Seen(Progress):
    """Keeps what stood to the right of the bar after each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def get_metrics(self, *args: Any) -> dict[str, Any]:
        metrics = super().get_metrics(*args)
        self.seen.append(metrics["loss"])
        return metrics


class Counting(pl.LightningModule):
    """Its loss is the number of the step."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.zeros(1))

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        self.log("train/loss", float(index), prog_bar=True)
        return self.one.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_numbers_are_collected_a_few_times_a_second_and_for_the_last_batch() -> None:
    """In 300 steps, which would take half a minute to show them all."""
    bar = Seen()
    quiet: Any = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "accelerator": "cpu"}
    pl.Trainer(max_epochs=1, callbacks=[bar], **quiet).fit(Counting(), torch.utils.data.DataLoader(torch.zeros(300)))
    assert bar.seen[0] == "0.000"
    assert bar.seen[-1] == "299.000"
    assert len(set(bar.seen)) < 150
