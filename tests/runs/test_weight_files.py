"""Reading files of weights: nothing in them is run, what cannot be read is one clear error."""

import argparse
import os
import zipfile
from pathlib import Path, PosixPath
from typing import Any

import numpy
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

from repr.runs.weight_files import read_tensors

TENSORS = {"model": {"conv1.weight": torch.rand(99, 99)}}


class Attack:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


class Calls(Attack):
    def __reduce__(self) -> Any:
        return eval, (f"__import__('os').system({self.command!r})",)


class Own:
    """A class of somebody's program."""


def test_settings_beside_the_tensors_are_passed_over(tmp_path: Path) -> None:
    settings = {
        "args": argparse.Namespace(lr=0.1, output=PosixPath("/tmp"), betas=[0.9, 0.95]),  # DINO, MAE, torchvision
        "hyper_parameters": OmegaConf.create({"optim": {"lr": 0.1, "betas": [0.9, 0.95]}}),  # Lightning
        "best": numpy.float64(0.7),
    }
    for zipped in (True, False):
        others = settings if zipped else {"args": argparse.Namespace(lr=0.1)}  # torch before 1.6 wrote no zip
        torch.save(TENSORS | others, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
        tensors = read_tensors(tmp_path / "a.pth", "init_from")
        assert tensors.keys() == {"model.conv1.weight"}
        assert torch.equal(tensors["model.conv1.weight"], TENSORS["model"]["conv1.weight"])


@pytest.mark.parametrize("attack", [Attack, Calls])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_needs_code_is_refused_and_runs_none(attack: type[Attack], zipped: bool, tmp_path: Path) -> None:
    content = TENSORS | {"args": argparse.Namespace(hook=attack(f"touch {tmp_path}/ran"))}
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"^init_from=.*a\.pth is not read, .*(system|eval).*save its tensors alone"):
        read_tensors(tmp_path / "a.pth", "init_from")
    assert not (tmp_path / "ran").exists()


def test_what_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    torch.save(TENSORS | {"code": Own()}, tmp_path / "own.pth")
    torch.save(TENSORS, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    torch.save(TENSORS, tmp_path / "new.pth")
    torch.save({"epoch": 3}, tmp_path / "none.pt")
    save_file(TENSORS["model"], tmp_path / "whole.safetensors")
    for name, source in {
        "old_half": "old.pth",
        "half.safetensors": "whole.safetensors",
        "new_half.pt": "new.pth",
    }.items():
        data = (tmp_path / source).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) // 2])
    (tmp_path / "empty.pth").touch()
    (tmp_path / "page.bin").write_text("<html>404</html>")
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as archive:
        archive.writestr("readme", "no weights")
    os.mkfifo(tmp_path / "fifo.pt")
    round_and_round: dict[str, Any] = {}
    round_and_round["self"] = round_and_round
    torch.save(round_and_round, tmp_path / "round.pt")
    (tmp_path / "folder").mkdir()
    for name, words in {
        "own.pth": "it needs tests.runs.test_weight_files.Own",
        "old_half": "or a damaged one",
        "half.safetensors": "is damaged",
        "new_half.pt": "is damaged (cut short",
        "empty.pth": "or a damaged one",
        "page.bin": "or a damaged one",
        "other.pt": "or a damaged one",
        "none.pt": "holds no tensors by name",
        "round.pt": "holds no tensors by name",
        "fifo.pt": "is no plain file",
        "nowhere.pt": "does not exist",
        "folder": "holds no weights",
        ".": "several files of weights, name one: half.safetensors, whole.safetensors",
    }.items():
        with pytest.raises(ValueError, match=r"^init_from=") as refused:
            read_tensors(tmp_path / name, "init_from")
        assert words in str(refused.value), name
        assert len(str(refused.value).splitlines()) == 1, name
