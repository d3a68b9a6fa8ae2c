"""A run that cannot fit into the memory says so before it begins."""

import warnings
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate

from repr.config import ConfigError, compose
from repr.training.memory import check_memory, free_memory
from repr.training.trainer import make_trainer

CPU = torch.device("cpu")


def test_a_step_that_does_not_fit_is_refused_and_one_that_may_not_is_warned_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = ["backbone.name=test_resnet", "text.layers=1", "text.width=16", "text.heads=1", "embed_dim=16"]
    cfg = compose(["objective=clip", *small, "trainer=cpu", f"run_folder={tmp_path}", "data.batch_size=64"])
    with torch.device("meta"):
        objective = instantiate(cfg.objective)
    trainer = make_trainer(cfg, [], [])
    before = torch.get_rng_state()
    monkeypatch.setattr("repr.training.memory.free_memory", lambda device: 1e5)
    with pytest.raises(ConfigError) as refused:
        check_memory(cfg, objective, trainer)
    told = str(refused.value)
    for words in ("on cpu", "0.0 GB are free", "data.batch_size (it is 64)", "micro_batch=64", "chunk_size=1024",
                  "grad_checkpointing=true", "forecast=false"):  # fmt: skip
        assert words in told, words
    assert torch.equal(before, torch.get_rng_state())
    needed = float(told.partition("about ")[2].partition(" GB")[0]) * 1e9
    assert needed < 1e9
    cfg.forecast = False
    check_memory(cfg, objective, trainer)
    cfg.forecast = True
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monkeypatch.setattr("repr.training.memory.free_memory", lambda device: None)  # it is not known
        check_memory(cfg, objective, trainer)
        monkeypatch.setattr("repr.training.memory.free_memory", lambda device: 2e9)
        check_memory(cfg, objective, trainer)


def test_what_is_free_is_what_machine_and_control_group_leave(tmp_path: Path) -> None:
    assert free_memory(CPU, str(tmp_path)) is None
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text("MemTotal:  9000000 kB\nMemAvailable:  5000000 kB\nHugePages_Total: 0\n")
    (tmp_path / "proc" / "self" / "cgroup").write_text("0::/job\n")
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
