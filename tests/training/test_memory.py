"""A run that cannot fit into the memory says so before it begins."""

import warnings
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate

from repr.config import ConfigError, compose
from repr.training.forecast import Planner
from repr.training.memory import check_memory, free_memory
from repr.training.trainer import make_trainer

CPU = torch.device("cpu")


def machine(root: Path, free: int) -> str:
    """The root of a machine of which so many bytes are free."""
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "meminfo").write_text(
        f"MemTotal:  9000000 kB\nMemAvailable:  {free // 1024} kB\nHugePages_Total: 0\n"
    )
    (root / "proc" / "self" / "cgroup").write_text("0::/job\n")
    return str(root)


def test_a_step_that_does_not_fit_is_refused_and_one_that_does_is_not(tmp_path: Path) -> None:
    small = ["backbone.name=test_resnet", "text.layers=1", "text.width=16", "text.heads=1", "embed_dim=16"]
    cfg = compose(["objective=clip", *small, "trainer=cpu", f"run_folder={tmp_path}", "data.batch_size=64"])
    with torch.device("meta"):
        objective = instantiate(cfg.objective)
    trainer = make_trainer(cfg, [], [])
    before = torch.get_rng_state()
    full = machine(tmp_path / "full", 102_400)
    with pytest.raises(ConfigError) as refused:
        check_memory(cfg, objective, trainer, full)
    told = str(refused.value)
    for words in ("on cpu", "0.0 GB are free", "data.batch_size (it is 64)", "micro_batch=64", "chunk_size=1024",
                  "grad_checkpointing=true", "forecast=false"):  # fmt: skip
        assert words in told, words
    assert torch.equal(before, torch.get_rng_state())
    needed = float(told.partition("about ")[2].partition(" GB")[0]) * 1e9
    assert needed < 1e9
    cfg.forecast = False
    check_memory(cfg, objective, trainer, full)
    cfg.forecast = True
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_memory(cfg, objective, trainer, str(tmp_path / "unknown"))
        check_memory(cfg, objective, trainer, machine(tmp_path / "free", 2_000_000_000))


def test_what_is_free_is_what_machine_and_control_group_leave(tmp_path: Path) -> None:
    assert free_memory(CPU, str(tmp_path)) is None
    machine(tmp_path, 5_120_000_000)
    assert free_memory(CPU, str(tmp_path)) == 5.12e9
    group = tmp_path / "sys" / "fs" / "cgroup" / "job"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    assert free_memory(CPU, str(tmp_path)) == 5.12e9
    (group / "memory.max").write_text("3000000000\n")
    (group / "memory.current").write_text("1500000000\n")
    (group / "memory.stat").write_text("anon 100\ninactive_file 500000000\n")
    assert free_memory(CPU, str(tmp_path)) == 2e9
    assert free_memory(CPU) is None or free_memory(CPU) > 0


def test_a_head_on_hidden_patches_alone_is_foreseen() -> None:
    """How many there are is drawn; a forecast takes half of all."""
    small = ["image_size=32", "small_size=16", "embed_dim=32", "backbone.depth=1", "objective.hidden_dim=16"]
    few, many = (
        Planner(compose(["objective=ibot", *small, f"objective.num_prototypes={num}"]), gpus=1).at(16)[""]
        for num in (1000, 9000)
    )
    hidden, views = 2 * 16 * 16 // 2, 2 * 16 + 10 * 16
    assert few.phase != "optimizer"
    assert many.total - few.total > 4 * 8000 * (hidden + views)
