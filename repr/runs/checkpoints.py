"""Which checkpoints of a run are there and whole."""

from __future__ import annotations

import pickle
import sys
import zipfile
import zlib
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only

from repr.runs.checkpoint_files import read_beside, shards_fault
from repr.runs.folder import CHECKPOINTS

_CHECKPOINT_KEYS = ("state_dict", "optimizer_states", "loops", "global_step")


def checkpoint_path(folder: str | Path, step: int) -> Path:
    """Where the checkpoint of a run after so many optimizer steps lies."""
    return Path(folder, CHECKPOINTS, f"step={step}.ckpt")


def checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoints of a run folder, that of the highest step first; they may be damaged."""
    steps = {path.stem.removeprefix("step="): path for path in Path(folder, CHECKPOINTS).glob("step=*.ckpt")}
    return [steps[step] for step in sorted(filter(str.isdigit, steps), key=int, reverse=True)]


def last_checkpoint(folder: str | Path) -> Path | None:
    """The whole checkpoint of the highest step of a run folder, or None where there is none at all.

    A damaged one is passed over, with a line on the terminal that names it and says what is wrong.

    Raises:
        ValueError: there are checkpoints, but none is whole.
    """
    faults = []
    for path in checkpoints(folder):
        fault = damage(path)
        if fault is None:
            return path
        faults.append(f"{path} is damaged ({fault})")
        _say(f"skipped: {faults[-1]}")
    if faults:
        raise ValueError(f"no whole checkpoint to go on from: {'; '.join(faults)}. Start the run anew")
    return None


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint of a run, or None."""
    if fault := broken(path):
        return fault
    try:
        content = read_beside(path)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        return f"not a checkpoint: {str(error).splitlines()[0]}"
    missing = [key for key in _CHECKPOINT_KEYS if not isinstance(content, dict) or key not in content]
    return f"not a checkpoint of a run: it has no {', '.join(missing)}" if missing else None


def broken(path: Path) -> str | None:
    """Whether a checkpoint is cut short or changed; every byte is compared with the checksums it holds."""
    if path.is_dir():
        return shards_fault(path)
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError, ValueError, zlib.error) as error:
        return "it is empty" if path.stat().st_size == 0 else f"cut short or overwritten: {error}"
    return None if broken is None else f"{broken} does not have the checksum it was written with"


@rank_zero_only
def _say(line: str) -> None:
    print(line, file=sys.stderr)
