"""What every benchmark tells: what it ran on, and its result, printed and kept."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from repr.files import replacing


def machine() -> str:
    """The day, CPU, cores, and GPU if there is one."""
    model = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            model = line.split(":")[1].strip()
            break
    card = card_name()
    return ", ".join([date.today().isoformat(), model, f"{os.cpu_count()} cores", *([card] if card else [])])


def hardware(*libraries: str) -> str:
    """The machine, its load, how many threads PyTorch uses, and versions of ``libraries``."""
    import torch

    parts = [machine(), f"{torch.get_num_threads()} threads", f"load {os.getloadavg()[0]:.1f}"]
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
        with replacing(path) as file:
            file.write(text.encode())
