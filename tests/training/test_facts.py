"""What a run tells of itself: the time that it has taken, over all of its stops, and where it ran."""

import platform
from pathlib import Path

import lightning.pytorch as pl
import pytest
from lightning.pytorch.demos.boring_classes import BoringModel

from repr.runs.folder import FACTS, load_facts, save_facts
from repr.training.facts import Facts


def train(folder: Path) -> None:
    pl.Trainer(
        max_steps=1, callbacks=[Facts(folder)], logger=False, enable_checkpointing=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0, default_root_dir=folder,
    ).fit(BoringModel())  # fmt: skip


def test_time_before_a_stop_counts(tmp_path: Path) -> None:
    train(tmp_path)
    facts = load_facts(tmp_path)
    assert 0 < facts["seconds"] < 100
    assert (facts["processes"], facts["precision"]) == (1, "32-true")
    assert facts["device"].startswith("CPU")
    assert facts["versions"]["python"] == platform.python_version()
    save_facts(facts | {"seconds": 3600.0}, tmp_path)
    train(tmp_path)
    assert 3600 < load_facts(tmp_path)["seconds"] < 3700


@pytest.mark.parametrize("content", ["[]", "{", '{"seconds": "long"}', '{"meanings": []}'])
def test_a_damaged_file_is_one_error(tmp_path: Path, content: str) -> None:
    (tmp_path / FACTS).write_text(content)
    with pytest.raises(ValueError, match=rf"{FACTS} is damaged .*move it away"):
        load_facts(tmp_path)


def test_runs_of_before_have_none(tmp_path: Path) -> None:
    assert load_facts(tmp_path) == {}
