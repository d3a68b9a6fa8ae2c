"""Files of weights, whoever wrote them: their tensors by name, read without running code."""

from __future__ import annotations

import pickle
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repr.errors import first_line
from repr.models.meta import REFUSALS
from repr.runs.checkpoint_files import read_checkpoint
from repr.runs.checkpoints import broken, last_checkpoint

_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".tar")
_WRAPPERS = ("module", "_orig_mod")  # of DDP and of torch.compile, no part of a name
# Where settings come from that stand beside tensors: argparse of DINO and MAE, OmegaConf of Lightning's modules, ...
_SETTINGS = re.compile(
    r"(argparse|collections|numpy|omegaconf|pathlib|typing)\..*|builtins\.(bool|dict|float|int|list|object|str|tuple)"
)


class _Setting:
    """Stands in for an object that is no tensor; nothing of it is kept."""

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...


def read_tensors(path: Path, option: str) -> dict[str, Tensor]:
    """The tensors of a file or folder, on the CPU, in its order.

    Args:
        path: what torch or safetensors saved, our sharded checkpoint, a run folder (its last checkpoint), or a folder
            of one file of weights, such as an export or what ``local-dir:`` of timm and open_clip means.
        option: where it was named, for errors.

    Returns:
        Tensors by the keys that lead to them through nested mappings, joined by dots, without those of wrappers.

    Raises:
        ValueError: there is no such file, it is damaged, it holds no tensors, or reading it would run code.
    """
    path = _file(path, option)
    if not (path.is_file() or path.is_dir()):
        what = "is no plain file" if path.exists() else "does not exist"
        raise ValueError(f"{option}={path} {what}; give a file of weights, open_clip:NAME/TAG or timm:NAME")
    zipped = path.is_file() and path.open("rb").read(2) == b"PK"  # as torch saves since 1.6
    if (path.is_dir() or zipped) and (fault := broken(path)):
        raise ValueError(f"{option}={path} is damaged ({fault}); give another checkpoint")
    content: Any
    if path.is_dir():
        content = read_checkpoint(path, optimizer=False)
    elif path.suffix == ".safetensors":
        content = _read_safetensors(path, option)
    else:
        content = _unpickle(path, option, zipped=zipped)
    if not (tensors := _flat(content)):
        raise ValueError(f"{option}={path} holds no tensors by name: save a model's state_dict()")
    return tensors


def _file(path: Path, option: str) -> Path:
    """The file that a folder stands for; a checkpoint of shards is one."""
    if not path.is_dir() or path.suffix == ".ckpt":
        return path
    if (last := last_checkpoint(path)) is not None:
        return last
    # An export of images alone for open_clip has them a folder below.
    files = sorted(file for file in (*path.iterdir(), *path.glob("image_tower/*")) if file.suffix in _ENDINGS)
    # A folder of open_clip may hold the same weights for transformers, too, and both kinds may be there as pickles.
    for kind in ("open_clip*.safetensors", "*.safetensors", "open_clip*", "*"):
        if found := [file for file in files if file.match(kind)]:
            break
    if len(found) != 1:
        there = (
            f"several files of weights, name one: {', '.join(file.name for file in found)}" if found else "no weights"
        )
        raise ValueError(f"{option}={path} is a folder without checkpoints/step=*.ckpt that holds {there}")
    return found[0]


def _read_safetensors(path: Path, option: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{option}={path} is damaged ({error}); give another file") from error


def _unpickle(path: Path, option: str, *, zipped: bool) -> Any:
    """What torch saved, with nothing but tensors and plain values in it; settings are passed over."""
    try:
        # Files of torch before 1.6 do not tell; of them those are read that hold nothing else, or argparse's options.
        others = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipped else ["argparse.Namespace"]
        code = [name for name in others if not _SETTINGS.fullmatch(name)]
        if not code:
            with torch.serialization.safe_globals([(_Setting, name) for name in others]):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except (*REFUSALS, EOFError, pickle.UnpicklingError, struct.error) as error:
        code = re.findall(r"GLOBAL (\S+)", str(error))
        if not code:
            told = first_line(error)
            raise ValueError(f"{option}={path} is no file of weights, or a damaged one: {told}") from error
    raise ValueError(
        f"{option}={path} is not read, since that might run code: it needs {', '.join(sorted(code)[:3])}. "
        "If you trust it, save its tensors alone: torch.save(model.state_dict(), ...)"
    )


def _flat(content: Any) -> dict[str, Tensor]:
    """Tensors by their way through nested mappings; a mapping that is met again, perhaps inside itself, counts once."""
    tensors: dict[str, Tensor] = {}
    nodes, seen = [("", content)], set()
    while nodes:
        name, node = nodes.pop()
        if isinstance(node, Tensor):
            tensors[".".join(part for part in name.split(".") if part not in _WRAPPERS)] = node
        elif isinstance(node, Mapping) and id(node) not in seen:
            seen.add(id(node))
            nodes += [(f"{name}.{key}".lstrip("."), node[key]) for key in reversed(node)]
    return tensors
