"""What every benchmark tells: what it ran on, and its result, printed and kept."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def hardware(*libraries: str) -> str:
    """The day, CPU, cores, threads, GPU if there is one, load of the machine, and versions of ``libraries``."""
    import torch

    model = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            model = line.split(":")[1].strip()
            break
    parts = [date.today().isoformat(), model, f"{os.cpu_count()} cores", f"{torch.get_num_threads()} threads"]
    parts += [card] if (card := card_name()) else []
    parts.append(f"load {os.getloadavg()[0]:.1f}")
    for name in libraries:
        try:
            parts.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            parts.append(f"{name} not installed")
    return ", ".join(parts)


def card_name() -> str | None:
    """The name of the GPU, if there is one."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def publish(lines: Sequence[str], path: Path | None) -> None:
    """Print a result, and write it to ``path`` if there is one."""
    text = "\n".join(lines) + "\n"
    print(text)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
