"""What a GPU shows: speed, memory and share of the peak, ours beside others', in one run of some minutes.

Run from the root of the repository, on an otherwise idle machine with a GPU (docs/gpu.md tells how one is prepared)::

    python -m benchmarks.gpu --minutes 8                  # all parts; writes benchmarks/results/gpu-<card>.md and .json
    python -m benchmarks.gpu clip_b16 steps --minutes 5   # some of them
    python -m benchmarks.gpu --quick --device cpu --out /tmp/gpu    # tiny sizes on any machine: does all of it work?

A part is a module of this folder with a ``TITLE``, ``settings(options)``, a paragraph on what is measured, and
``rows(options)``, which yields rows (column -> value) as they are known; a row with ``note`` is a sentence, such as a
verdict. Each part runs in a process of its own with a share of the time that is left, and both files are written at
every row, so that a stop, a fault or a peer that is missing costs no more than its own rows.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.report import hardware

ROOT = Path(__file__).parents[2]
# Part -> its module and its share of the time; what is worth most comes first.
PARTS = {
    "clip_b16": ("clip", 30),
    "steps": ("steps", 20),
    "data": ("data", 14),
    "colour": ("colour", 6),
    "loss": ("loss", 6),
    "planner": ("planner", 12),
    "clip_b32": ("clip", 12),
}
LIBRARIES = ("torch", "torchvision", "timm", "lightning", "open_clip_torch", "lightly", "stable-pretraining", "kornia")
START = 25.0  # seconds that a process takes to begin; with less it is not begun


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all parts together; default: 8")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, without verdicts")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results", help="folder of the two files")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := [part for part in options.parts if part not in PARTS]:
        raise SystemExit(f"there is no part {unknown[0]}; choose among {', '.join(PARTS)}")
    if options.minutes <= 0:
        raise SystemExit(f"--minutes {options.minutes:g}: give a number above 0")
    if options.child:
        child(options)
        return
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("this machine has no GPU: nothing is measured; --quick --device cpu shows whether it works")
    if options.device == "cpu" and not options.quick:
        raise SystemExit("--device cpu measures nothing that counts here: add --quick")
    parts = options.parts or list(PARTS)
    results = Results(options, torch.cuda.get_device_name() if options.device == "cuda" else "cpu")
    end = time.monotonic() + 60 * options.minutes
    for number, part in enumerate(parts):
        left, shares = end - time.monotonic(), [PARTS[later][1] for later in parts[number:]]
        seconds = left * shares[0] / sum(shares)
        if left < START:
            results.note(part, f"{part} was not begun: the time was up")
            continue
        measure(part, max(seconds, START), options, results)
    print(results.markdown.read_text())


def child(options: Any) -> None:
    """Run a part and append each of its rows to a file."""
    (options.part,), options.end = options.parts, time.monotonic() + 60 * options.minutes
    for row in import_module(f"benchmarks.gpu.{PARTS[options.part][0]}").rows(options):
        with options.child.open("a") as file:
            file.write(json.dumps(row) + "\n")


def measure(part: str, seconds: float, options: Any, results: Results) -> None:
    """Run a part in a process of its own, which is ended some seconds after its time."""
    rows, log = results.folder / f"{part}.rows", results.folder / f"{part}.log"
    rows.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu", part, "--child", str(rows), "--device", options.device]
    command += ["--minutes", f"{(seconds - 5) / 60:.3f}", *["--quick"] * options.quick]
    print(f"{part}: at most {seconds:.0f} s", file=sys.stderr, flush=True)
    start = time.monotonic()
    with log.open("w") as file, subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file) as process:
        status = None
        while status is None and time.monotonic() < start + seconds + 10:
            time.sleep(0.2)
            status = process.poll()
            results.read(part, rows)
        process.kill()
    results.read(part, rows)
    said = log.read_text(errors="replace").splitlines()
    for line in dict.fromkeys(line for line in said if " is left out: " in line):
        results.note(part, line)
    if status is None:
        results.note(part, f"ended after its {seconds:.0f} s; the rows before stand")
    elif status:
        last = next((line for line in reversed(said) if line.strip()), "")
        results.note(part, f"failed, the rows before stand: {last[:300]} (status {status}, {log.name})")
    rows.unlink(missing_ok=True)
    results.took(part, time.monotonic() - start)


class Results:
    """The rows of all parts, in ``gpu-<card>.json`` and ``gpu-<card>.md``, which are written at every change.

    Parts of an earlier run on the same card stay until they are measured again.
    """

    def __init__(self, options: Any, card: str) -> None:
        name = f"gpu-{card.lower().replace(' ', '-')}{'-quick' if options.quick else ''}"
        options.out.mkdir(parents=True, exist_ok=True)
        self.json, self.markdown = options.out / f"{name}.json", options.out / f"{name}.md"
        self.folder = options.out / f"{name}-logs"
        self.folder.mkdir(exist_ok=True)
        self.options, self.card = options, card
        self.parts: dict[str, dict[str, Any]] = json.loads(self.json.read_text()) if self.json.is_file() else {}
        self.command, self.hardware = " ".join(["python -m benchmarks.gpu", *sys.argv[1:]]), hardware(*LIBRARIES)
        self.begun: set[str] = set()

    def part(self, name: str) -> dict[str, Any]:
        if name not in self.begun:
            self.begun.add(name)
            told = {"command": self.command, "hardware": self.hardware, "quick": self.options.quick}
            self.parts[name] = told | {"rows": [], "notes": []}
        return self.parts[name]

    def read(self, name: str, path: Path) -> None:
        """Take what a part has written so far."""
        lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
        found = [json.loads(line) for line in lines if line.endswith("\n")]
        part = self.part(name)
        if len(found) != len(part["rows"]):
            for row in found[len(part["rows"]) :]:
                print(f"{name}: {row}", file=sys.stderr, flush=True)
            part["rows"] = found
            self.write()

    def note(self, name: str, text: str) -> None:
        print(f"{name}: {text}", file=sys.stderr, flush=True)
        self.part(name)["notes"].append(text)
        self.write()

    def took(self, name: str, seconds: float) -> None:
        self.part(name)["seconds"] = round(seconds)
        self.write()

    def write(self) -> None:
        self.json.write_text(json.dumps(self.parts, indent=1) + "\n")
        lines = [f"# On {'a CPU, tiny' if self.card == 'cpu' else f'one {self.card}'}"]
        for name in (name for name in PARTS if name in self.parts):
            part, module = self.parts[name], import_module(f"benchmarks.gpu.{PARTS[name][0]}")
            took = f", {part['seconds']} s" if "seconds" in part else ""
            self.options.part = name
            lines += ["", f"## {module.TITLE[name]}", "", module.settings(self.options), ""]
            lines += [f"`{part['command']}`{took}. {part['hardware']}", "", *table(part["rows"])]
            lines += ["", *(f"- {row['note']}" for row in part["rows"] if "note" in row)]
            lines += [f"- {note}" for note in part["notes"]]
        self.markdown.write_text("\n".join(lines) + "\n")


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The rows without notes, a column for each key that one of them has."""
    rows = [row for row in rows if "note" not in row]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    if not rows:
        return ["Nothing was measured."]
    marks = ["---:" if any(isinstance(row.get(column), int | float) for row in rows) else "---" for column in columns]
    lines = [f"| {' | '.join(columns)} |", f"| {' | '.join(marks)} |"]
    return [*lines, *(f"| {' | '.join(cell(row.get(column)) for column in columns)} |" for row in rows)]


def cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


if __name__ == "__main__":
    main()
