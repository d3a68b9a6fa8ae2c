"""Numbers made by the authors' own code; see the README of the folder they were copied from."""

from pathlib import Path

import numpy as np


def golden(name: str) -> dict[str, np.ndarray]:
    """All arrays of ``tests/golden/<name>.npz``."""
    with np.load(Path(__file__).with_name(f"{name}.npz")) as file:
        return {key: file[key] for key in file.files}
