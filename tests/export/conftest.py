"""Small trained objectives, and a run with a checkpoint."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from hydra.utils import instantiate

from repr.config import compose
from repr.export.target import Samples
from repr.runs.trained import Trained
from tests.network import guarded
from tests.objectives.conftest import SMALL, SMALL_HEAD

RUN = [
    "smoke=true", "objective=clip", "image_size=32", "embed_dim=32", "text.width=32", "text.layers=1", "optim.lr=1e-2",
    "backbone.name=test_resnet", "data.bank_size=64", "data.batch_size=128", "data.eval_batch_size=256",
    "trainer.limit_train_batches=30", "trainer.limit_val_batches=1.0",
]  # fmt: skip


def trained(objective_name: str, *overrides: str, backbone: str = "test_resnet") -> Trained:
    """An objective of conf/objective whose every weight, mean and variance is its own."""
    # Without projections, as in M3CoL, both towers have the width of the backbone.
    width = timm.create_model(backbone, num_classes=0).num_features if objective_name.startswith("m3col") else 16
    small = [*SMALL, f"embed_dim={width}", "backbone=resnet", f"backbone.name={backbone}"]
    cfg = compose([f"objective={objective_name}", *small, *overrides])
    for key, value in SMALL_HEAD.items():
        if cfg.objective.get(key) is not None:
            cfg.objective[key] = value
    torch.manual_seed(0)
    objective = instantiate(cfg.objective)
    with torch.no_grad():
        for name, tensor in objective.state_dict().items():
            if tensor.is_floating_point():
                noise = 0.05 * torch.randn_like(tensor)
                tensor.add_(noise.abs() if name.endswith("running_var") else noise)
    return Trained.copy_of(objective, cfg, f"{objective_name} with {backbone}")


@pytest.fixture(scope="session")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Samples]:
    return Samples(tmp_path_factory.mktemp("samples"))


@pytest.fixture(scope="session")
def run_and_export(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run, its evaluation and its export to open_clip, all by the command line, in a process without network."""
    folder = tmp_path_factory.mktemp("run")
    evaluation = [f"model={folder}/run", "eval=[zero_shot]", f"out={folder}/evaluation", "data.num_workers=0"]
    program = "\n".join(
        f"from repr.{module} import main\nmain({words!r})"
        for module, words in (
            ("fit", [*RUN, f"run_folder={folder}/run"]),
            ("export.__main__", [f"run={folder}/run", "to=open_clip", f"out={folder}/export"]),
            ("evaluate.__main__", evaluation),
        )
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=guarded(folder), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"verified and written: {folder}/export" in done.stdout
    return folder / "run", folder / "export"
