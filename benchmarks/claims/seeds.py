"""What the claims share: a run in a process of its own, and whether two methods differ by more than seeds do."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scipy import stats

from repr.config import compose
from repr.fit import fit
from repr.runs.folder import Results

ROOT = Path(__file__).parents[2]


def evaluated(overrides: Sequence[str], seed: int, epochs: int) -> Results:
    """Train once, with one evaluation at the end, and leave nothing behind."""
    with tempfile.TemporaryDirectory() as folder:
        small = [f"trainer.max_epochs={epochs}", f"trainer.check_val_every_n_epoch={epochs}"]
        quiet = ["+trainer.enable_progress_bar=false", "callbacks.progress=null", "callbacks.pictures=null"]
        quiet += ["logger.tensorboard=null"]
        return fit(compose([*overrides, f"seed={seed}", f"run_folder={folder}", *small, *quiet]))


def in_process(module: str, method: str, seed: int, epochs: int) -> Any:
    """``module.train(method, seed, epochs)`` in a process with one thread; what it returns goes through JSON."""
    program = (
        f"import json, sys, torch; torch.set_num_threads(1); from {module} import train; "
        "print(json.dumps(train(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))"
    )
    command, one_thread = [sys.executable, "-c", program, method, str(seed), str(epochs)], {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ | one_thread)
    if done.returncode:
        raise RuntimeError(f"{method}, seed {seed}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def compared(differences: Sequence[float]) -> tuple[str, float, float | None]:
    """Differences, one a seed: above, below or level with (paired t-test, 5 %), their mean, and its standard error."""
    mean, many = statistics.mean(differences), len(differences) > 1
    error = statistics.stdev(differences) / len(differences) ** 0.5 if many else None
    limit = float("inf") if error is None else stats.t.ppf(0.975, len(differences) - 1) * error
    return "level with" if abs(mean) <= limit else "above" if mean > 0 else "below", mean, error
