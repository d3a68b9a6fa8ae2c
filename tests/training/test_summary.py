"""What is printed before the first step, and after some."""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import timm
import torch
from torch.utils.data import DataLoader

from repr.config import compose
from repr.fit import fit
from repr.objectives.joint_embedding import JointEmbedding
from repr.training.summary import Summary, compile_hint, duration


def test_a_run_tells_what_it_will_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    run = ["smoke=true", "objective=simclr", "backbone.name=test_resnet", "freeze={backbone: 1}", "image_size=24"]
    run += ["trainer.accumulate_grad_batches=2", "trainer.limit_train_batches=8", "trainer.accelerator=cpu"]
    fit(compose([*run, f"run_folder={tmp_path}/run"]))
    shown = capsys.readouterr().out
    assert max(map(len, shown.partition("of val")[0].splitlines())) <= 80
    lines = " ".join(shown.split())
    for words in (
        "device 1 x cpu, 32-true",
        "k frozen",
        "steps 4 in all, 4 an epoch, 1 epochs",
        "batch 16 samples a step (2 batches of 8)",
        "data train 5,610 rows (Emoji), val",
        "ridge, ",
        "of val, test_style; every epoch, and after the last step",
        f"{tmp_path}"[:20],
        "of it left: 4 steps of",
    ):
        assert words in lines, words
    assert lines.index("device 1 x cpu") < lines.index("of it left")


def test_in_plain_lightning(capsys: pytest.CaptureFixture[str]) -> None:
    objective = JointEmbedding(timm.create_model("test_resnet", num_classes=0))
    batches = [{"views": [torch.rand(4, 3, 24, 24) for _ in range(2)], "index": torch.arange(4)}] * 4
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False,
        enable_progress_bar=False, callbacks=[Summary()],
    )  # fmt: skip
    trainer.fit(objective, DataLoader(batches, batch_size=None))
    shown = capsys.readouterr().out
    assert "steps    4 in all, 4 an epoch, 1 epochs" in shown
    assert "of it left: 4 steps" in shown


def test_a_time_is_said_as_a_person_says_it() -> None:
    told = [duration(seconds) for seconds in (0.4, 45, 100, 130, 7300, 3600 * 20, 3600 * 100)]
    assert told == ["0 s", "45 s", "2 min", "2 min", "2 h 2 min", "20 h 0 min", "4 days 4 h"]


def test_a_long_run_on_a_gpu_is_told_to_compile() -> None:
    assert str(compile_hint(7200, on_gpu=True, compiled=False)).startswith("hint: compile=true costs")
    assert compile_hint(600, on_gpu=True, compiled=False) is None
    assert compile_hint(7200, on_gpu=False, compiled=False) is None
    assert compile_hint(7200, on_gpu=True, compiled=True) is None
