"""What is kept of a finished stage: ``stage.json``, written last, and ``clusters.npz`` beside it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from repr.files import replacing
from repr.runs.checkpoint_files import CHECKSUMS
from repr.runs.folder import CLUSTERS, STAGE


@dataclass(frozen=True)
class StageRecord:
    """A finished stage. As long as a folder has no such record, its stage is not finished.

    Attributes:
        stage: number, from 0.
        seed: of the order of samples, their views, and the clustering.
        keys: :func:`repr.data.clusters.keys_hash` of the training set.
        checkpoint: path of the final one, relative to the stage's folder.
        checkpoint_sha256: of that file.
        results: name -> [value, level at chance or None] of the evaluation after the stage.
        clustering: how the features were clustered (config, features, number of rows); empty after the last stage.
        clusters_sha256: of ``clusters.npz``, which holds the ids of all stages so far, see
            :func:`repr.data.clusters.save_clusters`; None after the last stage.
        coverage: what an epoch of the next stage shows.
    """

    stage: int
    seed: int
    keys: str
    checkpoint: str
    checkpoint_sha256: str
    results: dict[str, tuple[float, float | None]]
    clustering: dict[str, Any]
    clusters_sha256: str | None
    coverage: dict[str, int]

    def write(self, folder: Path) -> None:
        """Write the record into a stage's folder, where everything else is already."""
        with replacing(folder / STAGE) as file:
            file.write(json.dumps(asdict(self), indent=1).encode())


def read_record(folder: Path, *, verify: bool = True) -> StageRecord | None:
    """The record of a stage; None: it is not finished.

    Args:
        folder: of the stage.
        verify: whether to read the files that belong to it and compare their hashes.

    Raises:
        ValueError: the record, or a file that belongs to it, is damaged, missing or of another run.
    """
    path = folder / STAGE
    remedy = f"remove {folder} and those of the stages after it, and resume the run: they are done again"
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        content["results"] = {name: tuple(pair) for name, pair in content["results"].items()}
        record = StageRecord(**content)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is damaged ({error}); {remedy}") from error
    if verify:
        for name, expected in ((record.checkpoint, record.checkpoint_sha256), (CLUSTERS, record.clusters_sha256)):
            if expected is not None and not (folder / name).exists():
                raise ValueError(f"{folder / name} is missing, and {path} needs it; {remedy}")
            if expected is not None and sha256(folder / name) != expected:
                raise ValueError(f"{folder / name} is not the file that {path} was written with; {remedy}")
    return record


def sha256(path: Path) -> str:
    """The hash of a file. A folder of shards has that of its list of checksums, which are compared when it is read."""
    with (path / CHECKSUMS if path.is_dir() else path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
