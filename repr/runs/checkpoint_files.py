"""The files of checkpoints: one file that holds all, or a folder to which every process has written its shards.

A folder ``step=<n>.ckpt`` holds the tensors in the format of torch.distributed.checkpoint (``.metadata`` and
``__<rank>_<i>.distcp``), all else in ``meta.pt``, and ``checksums.json``, which is written last. It appears under its
name once it is complete. Reading runs no code: tensors and values alone are unpickled, and of the metadata the classes
of torch that describe tensors.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path, PurePath
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from repr.distributed import gather_objects, on_first, rank
from repr.files import PART, checksum, disk_full, put_in_place

CHECKSUMS, METADATA, REST = "checksums.json", ".metadata", "meta.pt"
_WEIGHTS, _OPTIMIZERS = "state_dict", "optimizer_states"
_DESCRIBE = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")

Template = Callable[[str, torch.Size, torch.dtype], Tensor]


def write_shards(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a checkpoint of sharded tensors as a folder; every rank must call it, and see the same disk.

    Raises:
        OSError: the disk is full; what stood at ``path`` stays.
    """
    partial = path.with_name(path.name + PART)

    def begin() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    on_first(begin)
    tensors, rest = _split(checkpoint)
    try:
        dcp.save(tensors, storage_writer=FileSystemWriter(partial, sync_files=True))
    except CheckpointException as error:  # no Exception; holds those of all ranks
        faults = [disk_full(failure[0]) for failure in error.failures.values()]
        full = next((fault for fault in faults if fault is not None), None)
        if full is None:
            raise
        raise OSError(
            full.errno, f"{path} cannot be written ({full.strerror}); what was saved before is kept"
        ) from None
    mine = {file.name: checksum(file) for file in partial.glob(f"__{rank()}_*")}
    sums = {name: value for part in gather_objects(mine) for name, value in part.items()}

    def finish() -> None:
        torch.save(rest, partial / REST)
        others = {name: checksum(partial / name) for name in (METADATA, REST)}
        (partial / CHECKSUMS).write_text(json.dumps(sums | others, indent=1))
        put_in_place(partial, path)

    on_first(finish)


def _split(checkpoint: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of weights and optimizers by path, and everything else."""
    tensors = {f"{_WEIGHTS}.{name}": tensor for name, tensor in checkpoint[_WEIGHTS].items()}
    rest: list[dict[str, Any]] = []
    for number, optimizer in enumerate(checkpoint.get(_OPTIMIZERS, [])):
        states: dict[int, dict[str, Any]] = {}
        for index, state in optimizer["state"].items():
            found = {key: value for key, value in state.items() if isinstance(value, Tensor)}
            tensors |= {f"{_OPTIMIZERS}.{number}.{index}.{key}": value for key, value in found.items()}
            states[index] = {key: value for key, value in state.items() if key not in found}
        rest.append({**optimizer, "state": states})
    return tensors, {**checkpoint, _WEIGHTS: {}, _OPTIMIZERS: rest}


def shards_fault(path: Path) -> str | None:
    """What is wrong with a folder of shards, or None; every byte is compared with the checksums."""
    try:
        sums = json.loads((path / CHECKSUMS).read_bytes())
        for name, expected in sums.items():
            found = checksum(path / name)
            if found != expected:
                reason = "was cut short" if found[0] != expected[0] else "does not have its checksum"
                return f"{name} {reason}"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, OSError) as error:
        return f"{CHECKSUMS} cannot be read: {error}"
    return None if {METADATA, REST} <= sums.keys() else f"{CHECKSUMS} does not list {METADATA} and {REST}"


def read_beside(path: Path) -> dict[str, Any]:
    """What a checkpoint holds beside weights and optimizer; of those no more than shapes."""
    if path.is_dir():
        return torch.load(path / REST, map_location="meta", weights_only=True)
    return torch.load(path, map_location="meta", weights_only=True, mmap=True)


def read_checkpoint(
    path: Path, *, optimizer: bool = True, template: Template | None = None, mmap: bool = True
) -> dict[str, Any]:
    """A checkpoint, of one file or of shards, with whole tensors on the CPU.

    Args:
        path: the file or folder.
        optimizer: whether the state of the optimizer is wanted.
        template: gives for the path, shape and type of a tensor of shards what is to be filled; a DTensor is read
            only as far as it lies on this process. None: the whole of each.
        mmap: tensors of a file are read when they are looked at; for those who copy what they want of them.

    Raises:
        pickle.UnpicklingError: it holds something else than tensors and plain values.
    """
    if not path.is_dir():
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    content = torch.load(path / REST, map_location="cpu", weights_only=True)
    reader = _Reader(path)
    entries = reader.read_metadata().state_dict_metadata
    tensors: dict[str, Tensor] = {}
    for key, entry in entries.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise pickle.UnpicklingError(f"{path} holds '{key}', which is no tensor")
        if optimizer or key.startswith(f"{_WEIGHTS}."):
            dtype = entry.properties.dtype
            tensors[key] = (
                torch.empty(entry.size, dtype=dtype) if template is None else template(key, entry.size, dtype)
            )
    _load_state_dict(tensors, storage_reader=reader, no_dist=True)
    return _joined(tensors, content)


def _joined(tensors: Mapping[str, Tensor], content: dict[str, Any]) -> dict[str, Any]:
    """The reverse of :func:`_split`."""
    for key, tensor in tensors.items():
        kind, name = key.split(".", 1)
        if kind == _WEIGHTS:
            content[_WEIGHTS][name] = tensor
        else:
            number, index, name = name.split(".", 2)
            content[_OPTIMIZERS][int(number)]["state"].setdefault(int(index), {})[name] = tensor
    return content


class _Reader(FileSystemReader):
    """torch's, with a metadata file that cannot run code."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with Path(self.path, METADATA).open("rb") as file:
            metadata: Metadata = _Describing(file).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Describing(pickle.Unpickler):
    """Knows only what describes tensors."""

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "pathlib":  # where the folder was written
            return PurePath
        found = super().find_class(module, name) if module.partition(".")[0] == "torch" else None
        described = module in _DESCRIBE and isinstance(found, type) and found.__module__ == module
        plain = found is torch.Size or isinstance(found, torch.dtype | torch.layout | torch.memory_format)
        if not (described or plain or found is torch.serialization._get_layout):
            raise pickle.UnpicklingError(f"the metadata of shards holds {module}.{name}, which describes no tensor")
        return found
