"""What the claims share: runs in processes of their own, tables over seeds, and whether two methods differ by more."""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig
from scipy import stats

from benchmarks.report import machine
from repr.config import compose
from repr.files import replacing
from repr.fit import fit
from repr.runs.folder import Results

ROOT = Path(__file__).parents[2]
Values = Mapping[str, float]  # column of a table -> number
RESERVE = 0.85  # share of the time that runs may take by what short ones took
device = "cpu"  # that the runs of this process train on


def evaluated(overrides: Sequence[str], seed: int, epochs: int) -> Results:
    """Train once, with one evaluation at the end, and leave nothing behind."""
    with tempfile.TemporaryDirectory() as folder:
        return fit(composed(overrides, seed, epochs, folder))


def composed(overrides: Sequence[str], seed: int, epochs: int, folder: str) -> DictConfig:
    """The config of a run in a folder, with one evaluation at the end; as long as it says where ``epochs`` is 0."""
    small = [f"trainer.max_epochs={epochs}", f"trainer.check_val_every_n_epoch={epochs}"] if epochs else []
    quiet = ["+trainer.enable_progress_bar=false", "callbacks.progress=null", "callbacks.pictures=null"]
    quiet += ["logger.tensorboard=null", f"trainer.accelerator={'gpu' if device == 'cuda' else 'cpu'}"]
    return compose([*overrides, f"seed={seed}", f"run_folder={folder}", *small, *quiet])


def trained(methods: Sequence[str], options: Namespace) -> dict[str, list[Any]]:
    """What the claim's ``train(method, seed, length)`` gives for each method: a list over seeds."""
    if options.minutes:
        options.length = fitting_length(methods, options)
    start = time.monotonic()
    with ThreadPoolExecutor(options.jobs) as pool:
        keys = [(method, seed) for seed in range(options.seeds) for method in methods]
        futures = {key: pool.submit(_in_process, *key, options) for key in keys}
        for (method, seed), future in futures.items():
            if (error := future.exception()) is not None:
                pool.shutdown(cancel_futures=True)
                raise error
            numbers = re.sub(r"(\.\d{3})\d+", r"\1", json.dumps(future.result()))
            line = f"{time.monotonic() - start:.0f} s: {method}, seed {seed}: {numbers}"
            print(line, file=sys.stderr, flush=True)
    return {method: [futures[method, seed].result() for seed in range(options.seeds)] for method in methods}


def fitting_length(methods: Sequence[str], options: Namespace) -> int:
    """The length at which all runs are done in time, by what a round of lengths one and three takes."""
    lengths, seconds = (1, 3), []
    some = [methods[job * len(methods) // options.jobs] for job in range(options.jobs)]
    for length in lengths:
        start, short = time.monotonic(), Namespace(**{**vars(options), "length": length, "kept": None})
        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(_in_process, some, range(options.jobs), [short] * options.jobs))
        seconds.append(time.monotonic() - start)
    each = max((seconds[1] - seconds[0]) / (lengths[1] - lengths[0]), 1e-3)
    rounds = -(-len(methods) * options.seeds // options.jobs)
    left = 60 * options.minutes - sum(seconds)
    length = max(1, int((RESERVE * left / rounds - (seconds[0] - each)) / each))
    told = f"a run takes {seconds[0] - each:.0f} s and {each:.1f} s for each unit of length"
    print(f"{told}; {rounds} rounds of {options.jobs} runs of length {length}", file=sys.stderr, flush=True)
    return length


def _in_process(method: str, seed: int, options: Namespace) -> Any:
    """A run in a process with one thread, whose result goes through JSON; or what is kept of it from before."""
    kept = options.kept and kept_file(options.kept, options.name, method, seed, options.length, options.device)
    if kept and kept.is_file():
        before = json.loads(kept.read_text())
        options.made.add(before["made"])
        return before["result"]
    program = (
        f"import json, sys, torch; torch.set_num_threads(1); from benchmarks.claims import runs; "
        f"runs.device = {options.device!r}; from benchmarks.claims.{options.name} import train; "
        "print(json.dumps(train(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))"
    )
    words = [method, str(seed), str(options.length)]
    command, one_thread = [sys.executable, "-c", program, *words], {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ | one_thread)
    if done.returncode:
        raise RuntimeError(f"{method}, seed {seed}:\n{done.stderr}")
    result = json.loads(done.stdout.splitlines()[-1])
    if kept:
        made = f"{machine()}, torch {version('torch')}"
        with replacing(kept) as file:
            file.write((json.dumps({"made": made, "result": result}, indent=1) + "\n").encode())
    return result


def kept_file(folder: Path, claim: str, method: str, seed: int, length: int, device: str) -> Path:
    """Where the result of a run is kept."""
    words = "-".join(re.findall(r"[a-z0-9.]+", method.lower()))
    on_gpu = "-cuda" if device == "cuda" else ""
    return folder / claim / f"{words}-seed{seed}-length{length}{on_gpu}.json"


def table(
    rows: Mapping[str, Sequence[Values]],
    columns: Mapping[str, str] | Sequence[str],
    *,
    corner: str = "method",
    chance: Values | None = None,
) -> list[str]:
    """A line a row, a cell a column: mean and deviation over seeds, empty where a row has no such number.

    Args:
        rows: name -> numbers by column, of each seed.
        columns: those that are shown; a mapping gives their titles.
        corner: title of the names; a bar in it, as in the names, makes two columns of them.
        chance: numbers of the last line; None: there is none.
    """
    titles = columns if isinstance(columns, Mapping) else dict(zip(columns, columns, strict=True))
    left = "---|" * (1 + corner.count("|"))
    lines = [f"| {corner} | {' | '.join(titles.values())} |", f"|{left}" + "---:|" * len(titles)]
    for name, values in rows.items():
        numbers = [[value[column] for value in values if column in value] for column in titles]
        lines.append(f"| {name} | {' | '.join(_cell(over_seeds) for over_seeds in numbers)} |")
    if chance is not None:
        cells = [f"{chance[column]:.3f}" if column in chance else "" for column in titles]
        lines.append(f"| chance {'| ' * corner.count('|')}| {' | '.join(cells)} |")
    return lines


def _cell(over_seeds: Sequence[float]) -> str:
    if not over_seeds:
        return ""
    mean = statistics.mean(over_seeds)
    digits = 0 if abs(mean) >= 10 or all(isinstance(value, int) for value in over_seeds) else 3
    spread = f" ± {statistics.stdev(over_seeds):.{digits}f}" if len(over_seeds) > 1 else ""
    return f"{mean:.{digits}f}{spread}"


class Compared(NamedTuple):
    """Whether one method is above another: a paired t-test over seeds (5 %).

    Attributes:
        word: ``above``, ``below`` or ``level with``.
        mean: of the differences.
        limit: how large a mean would count; infinite with one seed.
        told: mean and, with several seeds, its standard error, as words.
    """

    word: str
    mean: float
    limit: float
    told: str


def compared(ours: Sequence[Values], theirs: Sequence[Values], columns: Sequence[str]) -> Compared:
    """Compare two methods, seed by seed, in the mean over some columns."""
    pairs = zip(ours, theirs, strict=True)
    differences = [statistics.mean(a[column] - b[column] for column in columns) for a, b in pairs]
    mean, limit, spread = statistics.mean(differences), float("inf"), ""
    if len(differences) > 1:
        error = statistics.stdev(differences) / len(differences) ** 0.5
        limit, spread = stats.t.ppf(0.975, len(differences) - 1) * error, f" ± {error:.3f}"
    word = "level with" if abs(mean) <= limit else "above" if mean > 0 else "below"
    return Compared(word, mean, limit, f"{mean:+.3f}{spread}")


def against(
    runs: Mapping[str, Sequence[Values]],
    methods: Sequence[str],
    others: Sequence[str],
    kinds: Mapping[str, Sequence[str]],
) -> list[str]:
    """A line a method: whether it is above each of the others, by the mean over the columns of each kind."""
    lines = []
    for method in methods:
        told = [
            f"{kind} {(result := compared(runs[method], runs[other], columns)).word} {other} ({result.told})"
            for kind, columns in kinds.items()
            for other in others
            if other != method
        ]
        lines.append(f"- {method}: {', '.join(told)}.")
    return lines
